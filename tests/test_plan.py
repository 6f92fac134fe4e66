"""The planner: speed against published points, layouts it offers and refuses."""

import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import train
from llama import config, costs
from llama.cli import UserError, show_bytes
from llama.config import Bytes, Config, Count, ModelConfig, ParallelConfig
from llama.costs import Layout, chips
from llama.model import Transformer
from llama.parallel.layout import SIZES, divisors, resolve, share, with_micro_batch
from llama.plan import __main__ as plan_command
from llama.plan import dry, layouts, published, speed

ROOT = Path(__file__).parent.parent
A100 = chips()["a100-80g"]


# -- speed -----------------------------------------------------------------------------------------


def test_held_back_points_are_within_15_percent() -> None:
    for stack in published.tables()["stacks"]:
        kinds = {"fit": 0, "held back": 0}
        e = published.efficiency(stack)
        assert 0.3 < e <= 1, "nothing is quicker than the chip"
        for point in published.points(stack):
            kinds[point.kind] += 1
            off = published.planned(stack, point, e) / point.tokens_per_s - 1
            assert abs(off) < 0.15, (stack, point, off)
        assert min(kinds.values()) >= 1, stack


# TFLOP/s of causal attention, forward and backward, at 2k, 4k, 8k and 16k tokens: the pictures
# assets/flash2_*_fwd_bwd_benchmark.png of Dao-AILab/flash-attention
FLASH_2 = {
    ("a100-80g", 64): (140, 156, 165, 171),
    ("a100-80g", 128): (155, 173, 182, 189),
    ("h100-80g", 64): (232, 257, 273, 284),
    ("h100-80g", 128): (265, 294, 308, 328),
}


def test_attention_falls_off_as_it_was_measured() -> None:
    for (chip, width), rates in FLASH_2.items():
        for tokens, rate in zip((2048, 4096, 8192, 16384), rates, strict=True):
            ours = speed.attention_rate(chips()[chip], tokens, width) / 1e12
            assert ours == pytest.approx(rate, rel=0.04), (chip, width, tokens)


def test_results_of_products_are_written_after_them() -> None:
    cfg = ModelConfig(dim=1024, n_layers=1, n_heads=8, ffn_dim=2048, vocab_size=64)
    # without attention and the rest all that is left of a pass is what it writes: 5d + 2f numbers
    # forward, 6d + f backward, beside what elementwise kernels move
    slow = replace(A100, flops=1e30, matmul=1e30, attention=1e30)
    terms = speed.step(cfg, Layout(2048), slow, 1.0, 1).terms
    a_number = 2048 * 2 / A100.bandwidth
    assert terms["forward pass"] == pytest.approx((17 * 1024 + 5 * 2048) * a_number)
    assert terms["backward pass"] == pytest.approx((20 * 1024 + 6 * 2048) * a_number)
    assert terms["head and loss"] == pytest.approx((4 * 64 + 1024) * a_number)


def test_a_better_chip_is_never_slower(rng: random.Random) -> None:
    for _ in range(200):
        model = published.model(rng.choice(["MPT-1B", "LLaMA-7B", "Llama-3-70B"]))
        at = Layout(
            seq_len=rng.choice([512, 2048, 8192]),
            micro_batch=rng.choice([1, 2, 8]),
            shard=rng.choice([1, 2, 7, 64]),
            replicate=rng.choice([1, 3, 16]),
            tensor=rng.choice([1, 2, 8]),
            context=rng.choice([1, 2, 4]),
            recompute=rng.choice(layouts.MODES),
            accumulate=rng.choice(["sharded", "unsharded", "replica_deferred"]),
            reshard=rng.random() < 0.5,
        )
        chip, passes = rng.choice(list(chips().values())), rng.choice([1, 5])
        before = speed.step(model, at, chip, 0.7, passes).seconds
        for key in ("matmul", "attention", "bandwidth", "link", "node_link"):
            better = replace(chip, **{key: 1.3 * getattr(chip, key)})
            after = speed.step(model, at, better, 0.7, passes).seconds
            assert after <= before * (1 + 1e-9), (key, at, chip)


def test_the_page_shows_what_is_computed() -> None:
    page = (ROOT / "docs/planner.md").read_text()
    assert published.table() in page and published.paper_table() in page


def test_energy_of_the_papers_runs() -> None:
    for hours, _, mwh, tonnes in published.tables()["paper"].values():
        ours = speed.energy(hours, A100.watts)
        # Table 15 has whole numbers, some cut off
        assert mwh <= ours[0] < mwh + 1 and abs(ours[1] - tonnes) <= 0.5


def test_a_collective_by_hand() -> None:
    inside = speed.Group(A100, 8, 1)
    simple = 7 / 8 * 8e9 / A100.link + 7 * 3.4e-6
    assert inside.seconds(8e9) == pytest.approx(simple)
    # two machines of one GPU each that counts: an eighth of the cards is theirs
    across = speed.Group(A100, 2, 8)
    assert across.inside == 1 and across.machines == 2
    assert across.seconds(1e9) == pytest.approx(0.5e9 / (0.9 * 25e9) + 9.6e-6)
    # nothing to send still takes 2,047 hops, by the quicker protocol
    many = speed.Group(A100, 2048, 1)
    assert many.seconds(0) == pytest.approx((2047 - 255) * 1.9e-6 + 255 * 4e-6)
    assert speed.Group(A100, 1, 1).seconds(1e9) == 0


def test_mfu_of_a_step_follows_from_its_speed() -> None:
    model = published.model("LLaMA-65B")
    step = speed.step(model, Layout(2048, shard=128, replicate=16), A100, 0.8, 1)
    causal, palm = costs.flops_per_token(model, 2048)
    assert step.mfu == (step.tokens_per_s * causal / 312e12, step.tokens_per_s * palm / 312e12)
    assert step.tokens_per_s == 2048 / sum(step.terms.values())
    # 380 tokens/s are 48.5 % causal, 49.5 % by PaLM's definition
    assert 380 * causal / 312e12 == pytest.approx(0.485, abs=5e-4)
    assert 380 * palm / 312e12 == pytest.approx(0.495, abs=5e-4)


def test_collectives_of_the_last_micro_batch_alone_are_counted_once() -> None:
    model = published.model("LLaMA-7B")
    at = Layout(2048, shard=16, replicate=16)

    def terms(passes: int, **changes: Any) -> list[float]:
        found = speed.step(model, replace(at, **changes), A100, 0.8, passes).terms
        return [found["FSDP beside them"], found["FSDP before and after"]]

    once, five = terms(1), terms(5)
    assert five == pytest.approx([5 * seconds for seconds in once])
    # each leaves out more of the other micro-batches, and none of the last one
    for name in ("replica_deferred", "unsharded"):
        assert terms(1, accumulate=name) == once
        fewer = terms(5, accumulate=name)
        assert all(a < b < c for a, b, c in zip(once, fewer, five, strict=True))
        five = fewer
    shards, replicas = speed.Group(A100, 16, 1), speed.Group(A100, 16, 16)
    block, root = (sum(r * c for r, c in part.values()) for part in costs.shapes(model, 1))
    edges = 5 * shards.seconds(2 * (root + block)) + shards.seconds(4 * root)
    assert five[1] == pytest.approx(edges + replicas.all_reduce(4 * root / 16))
    # gathered weights that stay are asked for once a step, and never for the backward pass
    stay = terms(5, reshard=False, accumulate="unsharded")
    assert all(a < b for a, b in zip(stay, five, strict=True))
    assert stay == pytest.approx(terms(1, reshard=False))


# -- layouts ---------------------------------------------------------------------------------------


def run_config(name: str = "llama_65b", **parallel: Any) -> Config:
    cfg = config.load(["--config", str(ROOT / f"configs/{name}.yaml")])
    return replace(cfg, parallel=replace(cfg.parallel, **parallel))


@pytest.mark.parametrize("name", ["llama_7b", "llama_65b"])
def test_ranked_layouts_divide_fit_and_fall_in_speed(name: str) -> None:
    cfg = run_config(name)
    plans = layouts.ranked(cfg, 2048, A100, 0.78)
    assert plans[0].step.tokens_per_s >= plans[-1].step.tokens_per_s
    for plan in plans:
        at = plan.layout
        assert at.gpus == 2048 and layouts.fits(cfg, at, A100.memory)
        assert 2048 % (at.replicate * at.shard) == 0 == 64 % at.tensor == 2048 % at.context
        sizes = {k: getattr(at, k) for k in ("replicate", "shard", "tensor", "context")}
        assert resolve(run_config(**sizes), 2048).gpus == 2048


@pytest.mark.parametrize(
    ("parallel", "gpus", "said"),
    [
        (
            {"replicate": 31, "shard": 64},
            2048,
            "do not make a world of 2048: parallel.replicate 32, or ",
        ),
        (
            {"replicate": 1, "shard": 48},
            2048,
            "parallel.replicate 32 and parallel.shard 64, or .* would",
        ),
        ({"replicate": -1, "shard": 48}, 2048, "parallel.shard 64, or parallel.shard 32 would"),
        (
            {"tensor": 3, "shard": 1},
            3,
            "tensor 3 does not divide model.n_heads 64: parallel.tensor 2 on 2 processes",
        ),
        (
            {"context": 7, "shard": 2},
            14,
            "7 pieces do not divide data.seq_len 2048: parallel.shard 1 and parallel.context 8",
        ),
        (
            {"replicate": 1, "shard": -1},
            3000,
            r"2048 windows .* = 3000 \(train.batch_tokens 6144000 would\): 2048 processes, or",
        ),
        ({"tensor": 3, "shard": 1}, 8, "parallel.tensor 4, or parallel.tensor 2 would"),
        ({"async_tensor": True, "shard": 8}, 8, "parallel.async_tensor with parallel.tensor 1"),
        (
            {"async_tensor": True, "tensor": 2, "shard": 4, "recompute": "manual"},
            8,
            "needs tensor groups on GPUs and compiled blocks, which manual and budget do not have$",
        ),
    ],
)
def test_what_does_not_divide_is_named_with_what_would(
    parallel: dict[str, Any], gpus: int, said: str
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        resolve(run_config(**parallel), gpus)
    assert "\n" not in str(raised.value)


def drawn(rng: random.Random) -> Config:
    """A configuration whose sizes rarely divide each other."""
    kv, T = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 7, 16, 33, 48, 60, 128])
    heads = kv * rng.choice([1, 2, 3])
    model = ModelConfig(dim=4 * heads, n_layers=2, n_heads=heads, n_kv_heads=kv)
    model.ffn_dim, model.vocab_size = rng.choice([37, 96, 172]), rng.choice([97, 100, 512])
    sizes = {name: rng.choice([1, 1, 1, 2, 3, 4, 5, 8, 100]) for name in SIZES}
    sizes[rng.choice(SIZES)] = rng.choice([-1, 1])
    cfg = Config(model=model, parallel=ParallelConfig(**sizes))
    if rng.random() < 0.2:
        cfg.parallel.recompute = "budget"
        cfg.parallel.budget = Bytes(rng.choice([10**3, 10**6]))
    cfg.data.seq_len, cfg.train.micro_batch = T, rng.choice([1, 5, 1000])
    cfg.train.batch_tokens = Count(T * rng.choice([1, 2, 3, 8, 12, 64, 100]))
    if rng.random() < 0.3:
        cfg.train.batch_ramp = [(Count(T * rng.choice([1, 2, 3, 4, 12])), 5)]
    return cfg


def asked(cfg: Config, words: str) -> Config:
    """The configuration with every `section.key value` of an offer."""
    for section, key, value in re.findall(r"(train|parallel)\.(\w+) (\w+)", words):
        part = replace(getattr(cfg, section), **{key: yaml.safe_load(value)})
        cfg = replace(cfg, **{section: part})
    return cfg


def test_every_layout_that_is_offered_works(rng: random.Random) -> None:
    offers: Counter[str] = Counter()
    for _ in range(600):
        cfg, world = drawn(rng), rng.choice([1, 2, 3, 4, 6, 8, 16, 24, 100, 3000])
        on_gpu = rng.random() < 0.5
        try:
            resolve(cfg, world, on_gpu)
            continue
        except UserError as error:
            said = str(error)
        if found := re.search(r": (.*) would$", said):
            for words in found[1].split(", or "):
                fewer = re.search(r"(\d+) processes$", words)
                n = int(fewer[1]) if fewer else world
                at = resolve(asked(cfg, words), n, on_gpu)
                assert at.gpus == n <= world and (words.startswith("parallel") or n < world)
                offers["fewer" if fewer else "layout"] += 1
        if found := re.search(r"\((\d+) would hold all blocks full", said):
            resolve(asked(cfg, f"parallel.budget {found[1]}"), world, on_gpu)
            offers["budget"] += 1
        if found := re.search(r"\((train.batch_tokens \d+) would\)", said):
            cfg.parallel = replace(cfg.parallel, recompute="none")
            resolve(asked(cfg, found[1]), world, on_gpu)
            offers["batch"] += 1
    assert min(offers[kind] for kind in ("layout", "fewer", "batch")) > 0, offers


def test_what_may_wait_for_the_last_micro_batch_is_offered_where_it_fits_and_gains() -> None:
    cfg = run_config("llama_7b", shard=8)
    cfg.train.micro_batch = 2
    own = layouts.configured(cfg, 64, A100, 0.78)
    best = layouts.waiting(cfg, own, A100, 0.78)
    assert best.step.tokens_per_s > 1.01 * own.step.tokens_per_s and best.bytes > own.bytes
    shown = list(plan_command.report(cfg, 64, "a100-80g", published.usual(A100), False))
    said = next(part for part in shown if part.startswith("the configuration's layout"))
    options = said.splitlines()[-1].split()
    assert options and max(map(len, said.splitlines())) <= 80
    path = ["--config", str(ROOT / "configs/llama_7b.yaml"), "--train.micro_batch", "2"]
    offered = config.load([*path, "--parallel.shard", "8", *options])
    found = layouts.configured(offered, 64, A100, 0.78)
    assert found == replace(best, layout=found.layout) and found.bytes <= 0.92 * A100.memory
    # what is asked for already is not offered, nor what does not fit
    assert layouts.waiting(offered, found, A100, 0.78) == found
    small = replace(A100, memory=own.bytes / 0.92)
    assert layouts.waiting(cfg, own, small, 0.78).bytes <= own.bytes


def test_a_micro_batch_that_is_too_big_is_told_what_fits() -> None:
    cfg = run_config("llama_7b", shard=8)
    cfg.train.micro_batch = 64
    with pytest.raises(UserError, match="train.micro_batch 64 takes .* of 85.0 GB") as raised:
        layouts.configured(cfg, 8, A100, 0.78)
    found = re.search(
        r"train.micro_batch (\d+) with parallel.recompute (\w+) takes", str(raised.value)
    )
    assert found
    cfg.train.micro_batch = int(found[1])
    cfg.parallel.recompute = found[2]  # type: ignore[assignment]
    assert layouts.fits(cfg, layouts.configured(cfg, 8, A100, 0.78).layout, A100.memory)
    with pytest.raises(UserError, match="parallel.shard 16 on 16 GPUs takes"):
        layouts.configured(run_config("llama_65b", shard=8), 8, A100, 0.78)


def test_everything_that_is_offered_in_place_of_too_much_fits(rng: random.Random) -> None:
    """Not only the bytes: batch, budget and number of GPUs have to agree with it too."""
    refused = 0
    while refused < 15:
        tensor, context = rng.choice([(1, 1), (1, 1), (2, 1), (1, 2), (4, 1)])
        shard, replicate = rng.choice([1, 2, 8]), rng.choice([1, 3, 4])
        cfg = run_config(
            rng.choice(["llama_7b", "llama_65b"]), shard=shard, replicate=replicate,
            tensor=tensor, context=context, reshard=rng.random() < 0.5,
            recompute=rng.choice(["none", "full", "budget"]),
            accumulate=rng.choice(["sharded", "unsharded"]),
        )  # fmt: skip
        if cfg.parallel.recompute == "budget":
            cfg.parallel.budget = Bytes(60e9)
        windows = replicate * shard * rng.choice([1, 3, 4])
        cfg.train.batch_tokens, cfg.train.micro_batch = Count(2048 * windows), rng.choice([1, 64])
        gpus = replicate * shard * tensor * context
        try:
            layouts.configured(cfg, gpus, A100, 0.78)
            continue
        except UserError as error:
            said = str(error)
        if "budget 60" not in said:
            words = said.split(": ")[-1]
            more = re.search(r"on (\d+) GPUs takes", words)
            offered = asked(cfg, words)
            config.check(offered)
            plan = layouts.configured(offered, int(more[1]) if more else gpus, A100, 0.78)
            assert f"takes {show_bytes(plan.bytes)}" in words
            refused += 1


def test_whole_gradients_of_65b_are_refused() -> None:
    cfg = run_config("llama_65b", shard=128, accumulate="unsharded")
    # 4 windows a process: with one a pass, 261 GB of gradients wait for the last
    said = "train.micro_batch 1 takes 316\\.. GB on .* and parallel.accumulate sharded takes"
    with pytest.raises(UserError, match=said):
        layouts.configured(cfg, 512, A100, 0.78)
    at = replace(layouts.resolve(cfg, 512), micro_batch=1)
    assert at.accumulates
    gradients = max(part["gradients"] for part in costs.memory(cfg.model, at).values())
    assert gradients == 4 * costs.parameters(cfg.model)
    # with one pass there is nothing to wait for
    cfg.parallel.recompute = "full"
    assert layouts.configured(cfg, 512, A100, 0.78).layout.micro_batch == 4
    layouts.configured(run_config("llama_65b", shard=128, accumulate="sharded"), 512, A100, 0.78)


def test_what_a_run_is_held_to() -> None:
    cfg = run_config("llama_7b", shard=8)
    found = layouts.expected(cfg, 4, 8, "NVIDIA A100-SXM4-80GB")
    assert 3000 < found["planned_tokens_per_s_gpu"] < 6000
    assert 30 < found["planned_memory_gib"] < 80
    # nothing is known of a CPU's speed; it trains in float32
    assert layouts.expected(cfg, 4, 8, "cpu").keys() == {"planned_memory_gib"}


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(1) == [1]


# -- the command -----------------------------------------------------------------------------------


def plan(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama.plan", "--config", "configs/llama_65b.yaml", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_shows_everything_without_torch() -> None:
    done = plan("--gpus", "2048", "--gpu", "a100-80g", "--explain")
    assert done.returncode == 0, done.stderr
    for word in ("optimizer", "tCO2eq", "tok/s/GPU", "FSDP beside them", "peak"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    code = "import sys, llama.plan.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "b9"], "--gpu is 'b9', expected one of a100-40g"),
        (["--stack", "x"], "--stack is 'x', expected one of llm-foundry/a100"),
        (["--gpus", "0"], "--gpus is 0, expected 1 or more"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], said: str) -> None:
    done = plan(*options)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "missing .* 'driver'"),
        ({"flop": 1.0}, "unexpected keyword argument 'flop'"),
        ({"link": "fast"}, "could not convert string to float: 'fast'"),
        ({"watts": 0}, "watts is 0.0, expected more than 0"),
        (None, "'NoneType' object"),
    ],
)
def test_an_entry_that_is_no_chip_is_named(
    entry: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = entry and vars(A100) | entry
    (tmp_path / "chips.yaml").write_text(yaml.safe_dump({"a": vars(A100), "mine": given}))
    monkeypatch.setattr(costs, "CHIPS_FILE", tmp_path / "chips.yaml")
    costs.chips.cache_clear()
    try:
        with pytest.raises(UserError, match=rf"chips.yaml: mine.*{said}") as raised:
            costs.chip_of("cpu")
        assert "\n" not in str(raised.value)
        # a number without a point is text to YAML
        (tmp_path / "chips.yaml").write_text(
            yaml.safe_dump({"a": vars(A100) | {"flops": "312e12"}})
        )
        assert costs.chip_of(A100.driver) == A100
    finally:
        costs.chips.cache_clear()


# -- before a run starts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "changes", "said"),
    [
        ("cpu", {"shard": 2}, "do not make a world of 3: 2 processes, or"),
        ("cpu", {"shard": 3}, "parallel.replicate x shard = 3 .train.batch_tokens 4196352 would"),
        ("cpu", {"shard": 3, "async_tensor": True}, "on CPUs needs tensor groups on GPUs"),
        # in float32, unlike on a GPU
        ("cpu", {"shard": 3, "recompute": "budget", "budget": 8 * 10**8}, "800000000 is too small"),
        ("cpu", {"shard": 1, "tensor": 3}, "tensor 3 does not divide model.n_heads 32"),
        (A100.driver, {"shard": 3, "micro_batch": 64}, "train.micro_batch 64 takes .* of 85.0 GB"),
    ],
)
def test_a_run_is_refused_before_a_process_group_starts(
    device: str, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_config("llama_7b", replicate=1)
    changes = dict(changes)
    cfg.train.micro_batch = changes.pop("micro_batch", 1)
    if cfg.train.micro_batch > 1 or len(changes) > 1:
        cfg.train.batch_tokens = Count(3 * 64 * 2048)
    cfg.parallel = replace(cfg.parallel, **changes)
    monkeypatch.setattr(train, "open_data", lambda cfg: {})
    monkeypatch.setattr(train.world, "start", lambda: pytest.fail("a process group is started"))
    monkeypatch.setattr(train.world, "chip", lambda _: device)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        train.train(cfg)


def test_auto_takes_the_largest_micro_batch_that_is_planned_to_fit(rng: random.Random) -> None:
    cfg = run_config("llama_7b", replicate=1, shard=8)
    cfg.train.batch_tokens = Count(8 * 2048 * rng.choice([24, 60, 64]))
    for mode in ("none", "full", "budget"):
        cfg.parallel.recompute = mode
        cfg.parallel.budget = Bytes(30e9) if mode == "budget" else None
        at = resolve(cfg, 8)
        free, each = int(rng.uniform(40e9, 150e9)), share(cfg, at)
        found = layouts.fitting(cfg, at, free, most=each)
        sizes = [n for n in range(1, each + 1) if each % n == 0]
        larger = [with_micro_batch(cfg, at, n) for n in sizes if n > found]
        assert costs.needed(cfg.model, with_micro_batch(cfg, at, found)) <= 0.92 * free
        for other in larger:
            kept = costs.kept(cfg.model, other)
            assert costs.needed(cfg.model, other) > 0.92 * free or (at.budget and kept > 30e9)
        assert layouts.fitting(cfg, at, free, most=1) == 1


# -- a cluster that is not there -------------------------------------------------------------------


def test_a_dry_run_holds_what_the_arithmetic_says(rng: random.Random) -> None:
    model = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300)
    # neither the widths nor the vocabulary are multiples of most of these
    shard, replicate = rng.randrange(1, 70), rng.randrange(1, 4)
    tensor, context = rng.choice([(1, 1), (2, 1), (1, 2), (2, 2)])
    sizes = {"replicate": replicate, "shard": shard, "tensor": tensor, "context": context}
    cfg = Config(model=model, parallel=ParallelConfig(**sizes))
    cfg.train.batch_tokens = Count(256 * shard * replicate)
    table = dry.spread(cfg, shard * replicate * tensor * context)
    assert re.search(r"parameters +([\d.]+ \w+) +\1 ", table), table
    assert re.search(r"optimizer +([\d.]+ \w+) +\1 ", table), table
    assert not dist.is_initialized()


def test_a_dry_run_is_of_gpus() -> None:
    """What only they allow, and the bytes of bfloat16, on a machine that has none."""
    cfg = run_config("llama_150m", shard=4, tensor=2, async_tensor=True)
    dry.spread(cfg, 8)
    cfg.parallel = replace(cfg.parallel, async_tensor=False, recompute="budget", budget=Bytes(1))
    with pytest.raises(UserError) as raised:
        resolve(cfg, 8)
    cfg = asked(
        cfg, re.sub(r".*too small.*\((\d+) would.*", r"parallel.budget \1", str(raised.value))
    )
    dry.spread(cfg, 8)


def test_a_dry_run_names_the_weight_whose_shape_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = run_config("llama_7b", replicate=4, shard=8)
    whole = costs.shapes

    def wrong(cfg: ModelConfig, tensor: int = 1) -> Any:
        block, rest = whole(cfg, tensor)
        return block | {"feed_forward.w2": (4096, 11000)}, rest

    monkeypatch.setattr(costs, "shapes", wrong)
    said = r"layers.0.feed_forward.w2 is \(512, 11008\) in torch.float32 on rank 0 of 32, .* 11000"
    with pytest.raises(UserError, match=said):
        dry.spread(cfg, 32)
    monkeypatch.setattr(costs, "shapes", whole)

    class Changed(Transformer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.extra = torch.nn.Linear(4, 4, bias=False)

    monkeypatch.setattr(dry, "Transformer", Changed)
    with pytest.raises(UserError, match="extra is a weight of the model or of llama.costs, not of"):
        dry.spread(cfg, 32)
    assert not dist.is_initialized()
