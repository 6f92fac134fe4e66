"""Speed of generation beside transformers: `python -m benchmarks.generate`.

In: shapes of a model. Out, per shape and batch: tokens/s of this model and of transformers'
`generate` with the same weights and prompts, greedy, each with its cache, in alternation in one
process, and their ratio. Of transformers' caches the one that is faster here is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, twin
from benchmarks.harness import Comparison
from llama import cli, costs, generate
from llama.config import ModelConfig
from llama.model import Transformer

SHAPES = {
    "quickstart": ModelConfig(vocab_size=4096),
    "30M": ModelConfig(dim=512, n_layers=7, n_heads=8, vocab_size=8192),
    "30M grouped": ModelConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=2, vocab_size=8192),
}
CACHES = ("dynamic", "static")


@dataclass(frozen=True)
class Job:
    """What both do: go on after `batch` prompts."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (self.batch, self.prompt_tokens), generator=draw)


def ours(model: Transformer, prompts: Tensor, new_tokens: int) -> Callable[[], Tensor]:
    rows: list[list[int]] = prompts.tolist()

    def run() -> Tensor:
        return torch.tensor(list(generate.generate(model, rows, new_tokens))).t()

    return run


def theirs(model: nn.Module, prompts: Tensor, new_tokens: int, cache: str) -> Callable[[], Tensor]:
    """transformers' `generate` without an end-of-text token, so that it draws them all."""
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        "cache_implementation": cache,
    }
    mask = torch.ones_like(prompts)
    model.eval()

    def run() -> Tensor:
        out: Tensor = model.generate(prompts, attention_mask=mask, **options)  # type: ignore[operator]
        return out[:, prompts.shape[1] :]

    return run


def faster_cache(model: nn.Module, prompts: Tensor, new_tokens: int) -> str:
    """Which of their caches is the faster one here: the best of two turns after a first."""
    seconds = {}
    for cache in CACHES:
        run = theirs(model, prompts, new_tokens, cache)
        seconds[cache] = min([harness.timed(run).wall_s for _ in range(3)][1:])
    return min(CACHES, key=lambda cache: seconds[cache])


def measure(cfg: ModelConfig, job: Job, n: int) -> dict[str, Any]:
    """Both in turns."""
    model = Transformer(cfg).eval()
    model.init_weights(0)
    other = twin.of(model, job.prompt_tokens + job.new_tokens)
    assert cfg.vocab_size
    prompts = job.prompts(cfg.vocab_size)
    cache = faster_cache(other, prompts, job.new_tokens)
    runs = ours(model, prompts, job.new_tokens), theirs(other, prompts, job.new_tokens, cache)
    speed = Comparison.of(harness.rounds(n, *runs))
    tokens = job.batch * job.new_tokens
    return {
        "tokens_per_s": tokens / speed.ours_s.median,
        "their_tokens_per_s": tokens / speed.theirs_s.median,
        "their_cache": cache,
        # random weights: two tokens may be equally likely but for rounding
        "same_tokens": float((runs[0]() == runs[1]()).float().mean()),
        "speed": speed,
    }


def show(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    header = ("shape", "batch", "tokens/s", "theirs", "cache", "ratio", "of CPU time", "same")
    rows: list[Sequence[object]] = []
    for name, of_batch in results.items():
        for batch, found in of_batch.items():
            speed: Comparison = found["speed"]
            tokens_per_s = (f"{found[key]:.0f}" for key in ("tokens_per_s", "their_tokens_per_s"))
            ratios = speed.ratio.show(), speed.ratio_cpu.show()
            same = f"{found['same_tokens']:.0%}"
            rows.append((name, batch, *tokens_per_s, found["their_cache"], *ratios, same))
    return cli.table(header, rows)


def main(argv: list[str]) -> None:
    p = harness.parser("generate", "Generation beside transformers.")
    p.add_argument("--shape", type=str, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once")
    p.add_argument("--prompt_tokens", type=int, default=64)
    p.add_argument("--new_tokens", type=int, default=128)
    p.add_argument("--pairs", type=int, default=10, help="turns of each")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    results = {
        name: {
            batch: measure(SHAPES[name], Job(batch, a.prompt_tokens, a.new_tokens), a.pairs)
            for batch in a.batch
        }
        for name in a.shape
    }
    print(f"{a.prompt_tokens} tokens of prompt, {a.new_tokens} new ones, {a.threads} threads")
    print(show(results))
    facts = vars(a) | {"parameters": {name: costs.parameters(SHAPES[name]) for name in a.shape}}
    facts |= harness.versions("torch", "transformers")
    harness.keep(a.save, "generate", {**facts, "shapes": results})


if __name__ == "__main__":
    cli.run(main)
