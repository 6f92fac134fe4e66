"""Sampling, the cache, batches of prompts, and the command on a run of its own."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import Tensor

from llama import config, generate
from llama.cli import UserError
from llama.config import Config, ModelConfig
from llama.model import Transformer
from llama.runtime import checkpoint, world
from tokenizer.tokenizer import Tokenizer

CONTEXT = 64


@pytest.fixture
def seed(rng: random.Random) -> int:
    torch.manual_seed(rng.randrange(2**31))
    return rng.randrange(2**31)


def small(seed: int, vocab_size: int = 60) -> Transformer:
    cfg = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocab_size)
    model = Transformer(cfg)
    model.init_weights(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(8)
    return model


def continued(model: Transformer, prompts: list[list[int]], n: int, **options: object) -> list:
    return list(zip(*generate.generate(model, prompts, n, **options), strict=True))  # type: ignore[arg-type]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(1, 60, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize("lengths", [[5], [7, 7], [1, 9, 4]])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20}])
def test_a_cache_and_other_prompts_change_nothing(
    lengths: list[int], options: dict[str, float], seed: int
) -> None:
    model, prompts = small(seed).double(), prompts_of(lengths)
    truth = continued(model, prompts, 20, use_cache=False, seed=seed, **options)
    assert continued(model, prompts, 20, seed=seed, **options) == truth
    for i, prompt in enumerate(prompts):
        assert continued(model, [prompt], 20, seed=seed + i, **options) == [truth[i]]


def test_greedy_takes_the_likeliest_token(seed: int) -> None:
    model, (prompt,) = small(seed).double(), prompts_of([6])
    for token in continued(model, [prompt], 10)[0]:
        logits = model(torch.tensor([prompt]))
        assert isinstance(logits, Tensor)
        assert token == int(logits[0, -1].argmax())
        prompt.append(token)


def test_seeds(seed: int) -> None:
    model, (prompt,) = small(seed), prompts_of([6])
    first = continued(model, [prompt, prompt], 20, temperature=2.0, seed=seed)
    assert first == continued(model, [prompt, prompt], 20, temperature=2.0, seed=seed)
    assert first[0] != first[1]
    assert first[1] == continued(model, [prompt], 20, temperature=2.0, seed=seed + 1)[0]


def test_rows_end_at_eos(seed: int) -> None:
    model, prompts = small(seed).double(), prompts_of([3, 8])
    free = continued(model, prompts, 30, temperature=1.0, seed=seed)
    # a token that one row draws in the middle plays the part of EOS
    eos = free[0][10]
    ended = continued(model, prompts, 30, temperature=1.0, seed=seed, eos_id=eos)
    lengths = []
    for row, truth in zip(ended, free, strict=True):
        length = truth.index(eos) if eos in truth else 30
        lengths.append(length)
        assert row[:length] == truth[:length]
        assert set(row[length:]) <= {None}
    assert len(ended[0]) == min(30, max(lengths) + 1)


def shares(logits: Tensor, **options: float) -> Tensor:
    """How often each token is drawn, by an even grid of draws."""
    n = 20_000
    draws = (torch.arange(n) + 0.5) / n
    ids = generate.sample(logits.expand(n, -1), draws, **options)  # type: ignore[arg-type]
    return torch.bincount(ids, minlength=len(logits)) / n


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0])
    for temperature in (0.5, 1.0, 3.0):
        truth = (logits / temperature).softmax(0)
        torch.testing.assert_close(
            shares(logits, temperature=temperature), truth, rtol=0, atol=2e-4
        )
    assert shares(logits, temperature=0.0).tolist() == [0, 1, 0, 0]


def test_top_k_and_top_p_cut_the_tail() -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.2, 0.25])
    cases: list[tuple[dict[str, float], list[int]]] = [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 4, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 4]),
        ({"top_p": 0.84}, [1, 4, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        # of the 0.65 that two tokens hold, 0.6 are a share of 0.39
        ({"top_k": 2, "top_p": 0.6}, [1]),
        ({"top_k": 2, "top_p": 0.63}, [1, 4]),
    ]
    for options, kept in cases:
        truth = torch.zeros(5)
        truth[kept] = p[kept] / p[kept].sum()
        torch.testing.assert_close(shares(p.log(), **options), truth, rtol=0, atol=2e-4)


def test_the_largest_and_smallest_draw_are_tokens() -> None:
    logits = torch.randn(500, 1000) * 5
    for draw in (0.0, 1 - 2**-24):
        ids = generate.sample(logits, torch.full((500,), draw), top_p=0.9)
        assert (ids < 1000).all()
        if draw == 0:
            assert torch.equal(ids, logits.argmax(-1))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that falls back to bytes."""
    folder = tmp_path_factory.mktemp("set") / "tokenizer"
    folder.mkdir()
    text = folder / "text"
    text.write_text("def main():\n    return 0\nthe cat sat on the mat and the dog\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder


@pytest.fixture
def run(tmp_path: Path, pieces: Path, seed: int) -> Path:
    """A run folder with a checkpoint of random weights."""
    vocab_size = Tokenizer(pieces / "tokenizer.model").vocab_size
    model = small(seed, vocab_size)
    cfg = Config(model=model.cfg)
    cfg.data.path, cfg.data.seq_len = str(pieces.parent / "tokens"), CONTEXT
    state = {
        "config": config.to_dict(cfg),
        "fingerprints": {"tokenizer": Tokenizer(pieces / "tokenizer.model").sha256},
    }
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    here = world.start()
    assert checkpoint.save(tmp_path / "run", 7, weights, state, here, keep=1) is None
    world.stop()
    return tmp_path / "run"


Capture = pytest.CaptureFixture[str]


def test_the_command_prints_prompt_and_continuation(run: Path, seed: int, capsys: Capture) -> None:
    generate.main([str(run), "--prompt", "the cat", "--max-tokens", "12", "--temperature", "0"])
    printed = capsys.readouterr().out
    model, tokenizer, context = generate.load(run)
    assert context == CONTEXT
    prompt = tokenizer.encode("the cat")
    (ids,) = continued(model, [[tokenizer.bos_id, *prompt]], 12, eos_id=tokenizer.eos_id)
    truth = tokenizer.decode(prompt + [i for i in ids if i is not None])
    assert printed == truth + "\n"
    assert printed.startswith("the cat")
    generate.main([str(run), "--prompt", "the cat", "the dog sat", "--max_tokens=5", "--seed=3"])
    both = capsys.readouterr().out
    generate.main([str(run), "--prompt", "the cat", "--max_tokens=5", "--seed=3"])
    one = capsys.readouterr().out
    assert both.startswith(f"--- 1 of 2\n{one}--- 2 of 2\nthe dog sat")


def test_characters_appear_when_all_their_bytes_are_there(pieces: Path) -> None:
    tokenizer = Tokenizer(pieces / "tokenizer.model")
    text = "a déjà 🦙 x"
    ids = tokenizer.encode(text)
    grown = generate._Text(tokenizer, [])
    shown = [grown.grown([i]) for i in ids]
    assert "".join(shown) == text and "\ufffd" not in "".join(shown)
    assert shown.count("") >= 3
    # bytes that never become a character are shown in the end
    assert generate._Text(tokenizer, ids[:-3]).grown([], last=True)


def test_prompts_fill_the_context_and_no_more(run: Path, capsys: Capture) -> None:
    _, tokenizer, _ = generate.load(run)
    fits, text = "", " cat"
    while len(tokenizer.encode(fits + text)) + 1 < CONTEXT:
        fits += text
    generate.main([str(run), "--prompt", fits])
    assert "context of 64 tokens is full" in capsys.readouterr().err
    with pytest.raises(UserError, match="context of .* holds 64"):
        generate.main([str(run), "--prompt", fits + 3 * text])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "prompt"),
        (["--prompt", "a", "--max_tokens", "0"], "max_tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--temperature", "inf"], "temperature.*inf"),
        (["--prompt", "a", "--top_p", "0"], "top_p is 0"),
        (["--prompt", "a", "--top_p", "nan"], "top_p.*nan"),
        (["--prompt", "a", "--top_k", "-1"], "top_k is -1"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "\ud800"], "surrogate"),
        (["--prompt", "a", "--tokenizer", "nowhere"], "nowhere.*--tokenizer"),
    ],
)
def test_bad_options_are_one_sentence(run: Path, options: Sequence[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        generate.main([str(run), *options])
    assert "\n" not in str(caught.value)


def flip(run: Path) -> None:
    path = next((run / "ckpt").glob("step-*/__0_*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_tokenizer(run: Path) -> None:
    path = next((run / "ckpt").glob("step-*"))
    state = checkpoint.read_state(path)
    state["fingerprints"]["tokenizer"] = "0" * 64
    here = world.start()
    tensors: dict[str, Tensor] = {"model.norm.weight": torch.ones(32)}
    assert checkpoint.save(run, 8, tensors, state, here, keep=1) is None
    world.stop()


def empty(run: Path) -> None:
    for path in (run / "ckpt").iterdir():
        path.rename(run / path.name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, "is damaged: the content of __0_0.distcp"),
        (change_tokenizer, "is not the tokenizer that"),
        (empty, "holds no complete checkpoint"),
    ],
)
def test_bad_runs_are_refused(run: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(run)
    with pytest.raises(UserError, match=words):
        generate.main([str(run), "--prompt", "a"])
