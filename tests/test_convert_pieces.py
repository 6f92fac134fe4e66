"""tokenizer.json against SentencePiece itself, on texts that tokenizers disagree on."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from made_convert import fuzz
from made_data import make_tokenizer
from tokenizers import Tokenizer as FastTokenizer

from llama.convert import pieces
from tokenizer.tokenizer import Tokenizer

FUZZ = 10_000


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("pieces"))


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> Path:
    pieces.write(Tokenizer(folder / "tokenizer.model"), tmp_path, 64)
    return tmp_path


def test_ids_and_texts_are_those_of_sentencepiece(
    folder: Path, written: Path, rng: random.Random
) -> None:
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = fuzz(Tokenizer(folder / "tokenizer.model"), FUZZ, rng)
    found = pieces.encode(written, texts)
    fast = FastTokenizer.from_file(str(written / "tokenizer.json"))
    for text, (bos, *ids) in zip(texts, found, strict=True):
        assert bos == 1
        assert ids == truth.encode(text), repr(text)
        assert fast.decode([bos, *ids]) == truth.decode(ids), repr(text)
    # the texts hold what they are meant to hold
    assert sum("</s>" in text for text in texts) > FUZZ / 50
    assert sum("  " in text for text in texts) > FUZZ / 20
    assert any(max(text, default="") > "\uffff" for text in texts)
    assert len({id for ids in found for id in ids}) > 0.8 * truth.get_piece_size()


def test_settings_name_the_control_pieces(written: Path) -> None:
    settings = json.loads((written / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert settings["model_max_length"] == 64
    control = json.loads((written / "special_tokens_map.json").read_text())
    assert control == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.filterwarnings("ignore:.*without a cache")
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_options_of_a_model_are_kept(
    tmp_path: Path, prefix: bool, byte_fallback: bool, rng: random.Random
) -> None:
    lines = [" ".join(rng.choices(["the", "cat", "sat", "=="], k=8)) for _ in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=280 if byte_fallback else 24,
        model_type="bpe",
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    pieces.write(tokenizer, tmp_path, 64)
    texts = fuzz(tokenizer, 500, rng)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert pieces.encode(tmp_path, texts) == [[1, *truth.encode(text)] for text in texts]
