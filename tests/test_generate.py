"""Sampling, the cache, batches, and transformers' greedy `generate`."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_convert import SHAPES, convert, fresh_rng, make_run, without_transformers
from made_generate import continued, small
from torch import Tensor

from llama import files, generate
from llama.convert import check


@pytest.fixture
def seed(rng: random.Random) -> int:
    torch.manual_seed(rng.randrange(2**31))
    return rng.randrange(2**31)


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


THEIRS = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

place = Path(sys.argv[1])
asked = json.loads((place / "asked.json").read_bytes())
tokens = torch.tensor(asked["tokens"])
mask = torch.tensor(asked["mask"])
answers = {}
for name in asked["shapes"]:
    model = AutoModelForCausalLM.from_pretrained(place / name / "hf", torch_dtype=torch.float32)
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=asked["n"], do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )
    answers[name] = out[:, tokens.shape[1] :].tolist()
(place / "answers.json").write_text(json.dumps(answers))
"""
N_GREEDY = 40


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """Runs of several shapes, prompts, and in answers.json how transformers goes on."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    folder, rng = tmp_path_factory.mktemp("greedy"), fresh_rng()
    with without_transformers():
        for name, shape in SHAPES.items():
            convert(make_run(folder / name, rng, **shape), folder / name / "hf", "hf")
    prompts = [[1, *(rng.randrange(3, 250) for _ in range(n))] for n in (9, 0, 20, 4)]
    longest = max(map(len, prompts))
    asked = {
        "shapes": list(SHAPES),
        "n": N_GREEDY,
        "tokens": [[0] * (longest - len(p)) + p for p in prompts],
        "mask": [[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
    }
    files.write_json(folder / "asked.json", asked)
    # outside the repository root: transformers looks for a package `kernels`, which is not ours
    kept = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    kept = [p for p in kept if Path(p).resolve() != check.ROOT]
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(kept)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", THEIRS, str(folder)],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder, prompts


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_that_of_transformers(
    greedy: tuple[Path, list[list[int]]], shape: str, use_cache: bool
) -> None:
    folder, prompts = greedy
    theirs = json.loads((folder / "answers.json").read_text())[shape]
    model, _, _ = generate.load(folder / shape / "runs/run")
    assert model.output.weight.dtype == torch.float32 or torch.cuda.is_available()
    ours = continued(model.float(), prompts, N_GREEDY, use_cache=use_cache)
    for prompt, row, truth in zip(prompts, ours, theirs, strict=True):
        if list(row) == truth:
            continue
        # two tokens as likely but for rounding are the only excuse
        step = next(i for i in range(N_GREEDY) if row[i] != truth[i])
        place = model.output.weight.device
        logits = model(torch.tensor([[*prompt, *truth[:step]]], device=place))[0, -1]
        assert logits.max() - logits[truth[step]] < 1e-5 * logits.abs().max(), (step, row, truth)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_the_benchmark_compares_equal_texts() -> None:
    options = ["--shape=quickstart", "--batch", "1", "2", "--new_tokens=4", "--pairs=1"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.generate", *options],
        cwd=check.ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("quickstart")]
    assert [(row[1], row[-1]) for row in rows] == [("1", "100%"), ("2", "100%")]
