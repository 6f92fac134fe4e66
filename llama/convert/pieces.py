"""A SentencePiece tokenizer as Hugging Face's tokenizer.json, with the same ids for every text.

In: our tokenizer (paper §2.1). Out: tokenizer.json, tokenizer_config.json, special_tokens_map.json.
A BPE piece of SentencePiece is joined from any two pieces that make it, the best score first; here
that is a list of merges. BOS goes before every text, as it does before every document in training.
Text never turns into control pieces, neither there nor here (`split_special_tokens`).
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from llama import files
from tokenizer.tokenizer import SPACE_PIECE, Tokenizer

FILE = "tokenizer.json"


def write(tokenizer: Tokenizer, part: Path, context: int) -> None:
    """The three files. Not LlamaTokenizer: transformers would build another one from it."""
    fast, control = build(tokenizer)
    fast.save(str(part / FILE))
    files.write_json(part / "special_tokens_map.json", control)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **control,
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        # transformers 4 would add token types, which LlamaForCausalLM does not take
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files.write_json(part / "tokenizer_config.json", settings)


def build(tokenizer: Tokenizer) -> tuple[FastTokenizer, dict[str, str]]:
    """The tokenizer, and its control pieces under transformers' names."""
    spec, kinds = tokenizer.spec, tokenizer.spec.SentencePiece
    vocabulary = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    joins = [
        (-piece.score, i, piece.piece[:k], piece.piece[k:])
        for i, piece in enumerate(spec.pieces)
        if piece.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
        for k in range(1, len(piece.piece))
        if piece.piece[:k] in vocabulary and piece.piece[k:] in vocabulary
    ]
    unknown, bos, eos = (
        spec.pieces[i].piece for i in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    )
    merges, bytewise = [join[2:] for join in sorted(joins)], spec.trainer_spec.byte_fallback
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytewise)
    fast = FastTokenizer(model)
    prefixed = tokenizer.adds_space
    spaces = [normalizers.Replace(" ", SPACE_PIECE)]
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_PIECE)] * prefixed + spaces)
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefixed
    )
    silent = [p.piece for p in spec.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in silent])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    return fast, {"bos_token": bos, "eos_token": eos, "unk_token": unknown}


def encode(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids that a written tokenizer.json gives, with what it adds in front."""
    fast = FastTokenizer.from_file(str(folder / FILE))
    fast.encode_special_tokens = True
    return [encoding.ids for encoding in fast.encode_batch(texts)]


def awkward(tokenizer: Tokenizer) -> list[str]:
    """Texts that tokenizers disagree on; then every piece of the vocabulary, ten to a text."""
    texts = ["", " ", "a", " a  b   c ", "\n\n\ta\r\n", "<s>a</s> <unk><0x41>", f"a{SPACE_PIECE}b"]
    texts += ["é e\u0301 日本 \U0001f999", "x" * 99, " " * 99, "=" * 99, "0" * 99, "\0\x7f\ufeff"]
    rows = range(0, tokenizer.vocab_size, 10)
    return texts + [tokenizer.decode(range(i, min(i + 10, rows.stop))) for i in rows]
