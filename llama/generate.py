"""Text from a checkpoint: `python -m llama.generate runs/quickstart --prompt "def main("`.

A run folder or checkpoint and prompts go in, sampled continuations come out on the terminal as they
are drawn. Prompts of one call form one batch, padded at the left; padding is a document of its own,
so that attention never sees it.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama import cli
from llama.cli import UserError
from llama.config import ModelConfig
from llama.model import KVCache, Transformer
from llama.runtime import checkpoint, world
from tokenizer.tokenizer import Tokenizer


def sample(
    logits: Tensor, draws: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One id per row of (B, V) logits, by inverting the distribution at (B,) draws from [0, 1).

    `temperature` 0 takes the likeliest. Otherwise the `top_k` likeliest stay (0: all), of these the
    fewest that hold a share of `top_p` (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    if top_k:
        probabilities[:, top_k:] = 0
    before = probabilities.cumsum(-1) - probabilities
    held = before + probabilities
    probabilities[before >= top_p * held[:, -1:]] = 0
    held = probabilities.cumsum(-1)
    rank = (held <= draws.to(held).unsqueeze(1) * held[:, -1:]).sum(-1)
    return ids.gather(1, rank.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Next id of every prompt, step by step; None from a row's EOS on, until all rows have ended.

    Row i draws from a seed of its own, `seed + i`, whatever the other prompts are.
    """
    device = model.output.weight.device
    tokens, doc_ids = _padded(prompts, device)
    cache = [KVCache(tokens.shape[1] + max_tokens) for _ in model.layers] if use_cache else None
    # one number per token, drawn on the CPU: the same on every device
    draws = torch.stack(
        [
            torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(prompts))
        ]
    ).to(device)
    ended = [False] * len(prompts)
    new = tokens
    for step in range(max_tokens):
        logits = model(new if use_cache else tokens, doc_ids=doc_ids, cache=cache)
        assert isinstance(logits, Tensor)
        drawn = sample(logits[:, -1], draws[:, step], temperature, top_k, top_p)
        ids = drawn.tolist()
        ended = [end or i == eos_id for end, i in zip(ended, ids, strict=True)]
        yield [None if end else i for end, i in zip(ended, ids, strict=True)]
        if all(ended):
            return
        new = drawn.unsqueeze(1)
        tokens = torch.cat((tokens, new), 1)
        if doc_ids is not None:
            doc_ids = torch.cat((doc_ids, torch.ones_like(new)), 1)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as one (B, T) batch, padded at the left, and document ids: 1, of padding 0."""
    assert prompts and all(prompts), "every prompt holds a token, at least BOS"
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + list(p) for p in prompts]
    tokens = torch.tensor(rows, device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    if bool((lengths == longest).all()):
        return tokens, None
    padding = longest - lengths
    return tokens, (torch.arange(longest, device=device) >= padding[:, None]).long()


def load(
    run: str | Path, tokenizer: str | Path | None = None
) -> tuple[Transformer, Tokenizer, int]:
    """Model, tokenizer and context length of a run's newest checkpoint, or of a checkpoint.

    Raises `UserError` for damaged files and for a tokenizer that is not the one trained with.
    """
    path = checkpoint.newest(run)
    if problem := checkpoint.damage(path):
        raise UserError(f"{path} is damaged: {problem}")
    state = checkpoint.read_state(path)
    cfg, trained_with = state["config"], state["fingerprints"]["tokenizer"]
    place = Path(tokenizer or Path(cfg["data"]["path"]).parent / "tokenizer")
    try:
        pieces = Tokenizer(place / "tokenizer.model" if place.is_dir() else place)
    except ValueError as error:
        raise UserError(f"{error}; name it with --tokenizer") from error
    if pieces.sha256 != trained_with:
        raise UserError(
            f"{pieces.path} (sha256 {pieces.sha256[:12]}) is not the tokenizer that {path} was "
            f"trained with ({trained_with[:12]}): name that one with --tokenizer"
        )
    with torch.device("meta"):
        model = Transformer(ModelConfig(**cfg["model"]))
    here = world.start()
    try:
        model.to_empty(device=here.device)
        weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        checkpoint.load(path, weights, here)
    finally:
        world.stop()
    if here.device.type == "cuda":
        model.bfloat16()
    return model.eval(), pieces, cfg["data"]["seq_len"]


class _Text:
    """A growing list of ids as text; characters appear once all their bytes are there."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self.tokenizer, self.ids, self.shown = tokenizer, list(ids), 0

    def grown(self, ids: Sequence[int], last: bool = False) -> str:
        """What can be shown since the last call, after appending `ids`."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and not last:
            return ""
        new, self.shown = text[self.shown :], len(text)
        return new


def main(argv: list[str]) -> None:
    """The command: one prompt is streamed, several are printed one after the other."""
    p = cli.parser("python -m llama.generate", "Text from a checkpoint.")
    p.add_argument("run", type=str, help="A run folder (its newest checkpoint) or a checkpoint.")
    p.add_argument("--prompt", type=str, nargs="+", required=True, help="One or more prompts.")
    p.add_argument("--max_tokens", type=int, default=200, help="Most tokens to draw per prompt.")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token.")
    p.add_argument("--top_p", type=float, default=0.95, help="Share of probability to draw from.")
    p.add_argument("--top_k", type=int, default=0, help="Likeliest tokens to draw from; 0: all.")
    p.add_argument("--seed", type=int, default=0, help="Of the first prompt; then counting up.")
    p.add_argument("--tokenizer", type=str, default=None, help="Where the run's tokenizer now is.")
    a = p.parse_args(argv)
    for name, good, expected in [
        ("max_tokens", a.max_tokens > 0, "more than 0"),
        ("temperature", a.temperature >= 0, "0 or more"),
        ("top_p", 0 < a.top_p <= 1, "a share above 0"),
        ("top_k", a.top_k >= 0, "0 or more"),
        ("seed", 0 <= a.seed < 2**32, "0 or more"),
    ]:
        if not good:
            raise UserError(f"--{name} is {getattr(a, name)}, expected {expected}")
    model, tokenizer, context = load(a.run, a.tokenizer)
    prompts = [[tokenizer.bos_id, *_encoded(tokenizer, text)] for text in a.prompt]
    longest = max(map(len, prompts))
    if longest >= context:
        raise UserError(f"--prompt has {longest} tokens, the context of {a.run} holds {context}")
    if a.max_tokens > context - longest:
        print(f"stopping where the context of {context} tokens is full", file=sys.stderr)
    steps = generate(
        model,
        prompts,
        min(a.max_tokens, context - longest),
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        seed=a.seed,
        eos_id=tokenizer.eos_id,
    )
    show(steps, [_Text(tokenizer, prompt[1:]) for prompt in prompts])


def show(steps: Iterator[list[int | None]], texts: Sequence[_Text]) -> None:
    """Print prompts and what follows: a single one as it grows, several when all have ended."""
    outputs = [text.grown([]) for text in texts]
    if len(texts) == 1:
        print(outputs[0], end="", flush=True)
    for ids in steps:
        for i, token in enumerate(ids):
            new = texts[i].grown([] if token is None else [token])
            outputs[i] += new
            if len(texts) == 1:
                print(new, end="", flush=True)
    rest = [text.grown([], last=True) for text in texts]
    if len(texts) == 1:
        print(rest[0])
        return
    for i, (output, end) in enumerate(zip(outputs, rest, strict=True)):
        print(f"--- {i + 1} of {len(texts)}\n{output}{end}")


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from error


if __name__ == "__main__":
    cli.run(main)
