"""Text from a checkpoint: `python -m llama.generate runs/quickstart --prompt "def main("`.

Weights of any format that llama.convert reads and prompts go in, from the command line, a pipe or a
terminal; continuations come out as they are drawn, up to a stop string. Prompts of one call form
one batch, padded at the left; padding is a document of its own, so that attention never sees it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import cli
from llama.cli import UserError, expect, show_count
from llama.convert.load import open_source
from llama.model import KVCache, Transformer
from tokenizer.tokenizer import Tokenizer

# What stands for bytes that are no character, or not yet one.
REPLACEMENT = "\ufffd"


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


@torch.inference_mode()
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
    new, doc_ids = _padded(prompts, max_tokens, device)
    longest = new.shape[1]
    cache = [KVCache(longest + max_tokens) for _ in model.layers] if use_cache else None
    # one number per token, drawn on the CPU: the same on every device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    draws = torch.stack([torch.rand(max_tokens, generator=each) for each in generators]).to(device)
    ended = [False] * len(prompts)
    for step in range(max_tokens):
        seen = None if doc_ids is None else doc_ids[:, : longest + step]
        logits = model(new, doc_ids=seen, cache=cache)
        assert isinstance(logits, Tensor)
        drawn = sample(logits[:, -1], draws[:, step], temperature, top_k, top_p)
        ids = drawn.tolist()
        ended = [end or i == eos_id for end, i in zip(ended, ids, strict=True)]
        yield [None if end else i for end, i in zip(ended, ids, strict=True)]
        if all(ended):
            return
        new = drawn.unsqueeze(1) if use_cache else torch.cat((new, drawn.unsqueeze(1)), 1)


def _padded(
    prompts: Sequence[Sequence[int]], max_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Prompts as one (B, T) batch, padded at the left; document ids (B, T + max_tokens): 1, of
    padding 0."""
    assert prompts and all(prompts), "every prompt holds a token, at least BOS"
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + list(p) for p in prompts]
    tokens = torch.tensor(rows, device=device)
    padding = torch.tensor([longest - len(p) for p in prompts], device=device)
    if not padding.any():
        return tokens, None
    positions = torch.arange(longest + max_tokens, device=device)
    return tokens, (positions >= padding[:, None]).long()


def load(
    run: str | Path, tokenizer: str | Path | None = None
) -> tuple[Transformer, Tokenizer, int]:
    """Model, tokenizer and context length of a run's newest checkpoint, of a checkpoint, or of a
    folder of Hugging Face's or Meta's.

    Raises `UserError` for what is damaged or foreign, and for a tokenizer that is not the one
    trained with.
    """
    source = open_source(run)
    pieces = source.open_tokenizer(None if tokenizer is None else str(tokenizer))
    on_gpu = torch.cuda.is_available()
    with torch.device("meta"):
        model = Transformer(source.cfg).to(torch.bfloat16 if on_gpu else torch.float32)
    model.to_empty(device="cuda" if on_gpu else "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
    return model.eval(), pieces, source.context


class Text:
    """What follows a prompt, as it grows: the part of it that no later token can take back.

    Characters appear once all their bytes are there. Of several stop strings the one that is
    complete first ends the text, which then ends before it; until then its beginning is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.ids, self.stops = tokenizer, list(prompt), stops
        self.prompt = tokenizer.decode(self.ids)
        self.shown, self.ended = 0, False

    def add(self, token: int | None) -> str:
        """What can be shown since the last call, after one more token; None ends the text."""
        if self.ended:
            return ""
        if token is None:
            self.ended = True
        else:
            self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not self.ended:
            text = text.rstrip(REPLACEMENT)
        text = text[len(self.prompt) :]
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            text = text[: min(found)[1]]
        elif not self.ended:
            # what could be the beginning of a stop string
            begun = (n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n]))
            text = text[: len(text) - max(begun, default=0)]
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


def show(steps: Iterator[list[int | None]], texts: Sequence[Text]) -> bool:
    """Print prompts and what follows: a single one as it grows, several when all have ended.

    Whether all of them have ended by themselves, by EOS or a stop string.
    """
    outputs = [text.prompt for text in texts]
    if len(texts) == 1:
        print(outputs[0], end="", flush=True)

    def add(i: int, token: int | None) -> None:
        new = texts[i].add(token)
        outputs[i] += new
        if len(texts) == 1:
            print(new, end="", flush=True)

    for ids in steps:
        for i, token in enumerate(ids):
            add(i, token)
        if all(text.ended for text in texts):
            break
    finished = all(text.ended for text in texts)
    for i in range(len(texts)):
        add(i, None)
    for i, output in enumerate(outputs if len(texts) > 1 else ()):
        print(f"--- {i + 1} of {len(texts)}\n{output}")
    if len(texts) == 1:
        print()
    return finished


# -- the command -----------------------------------------------------------------------------------

Answer = Callable[[Sequence[str], int], None]  # prints what follows prompts, given their seed


def converse(answer: Answer, seed: int) -> None:
    """Prompts typed at a terminal, until Ctrl-D, or Ctrl-C at an empty prompt."""
    try:
        # input() then knows the arrow keys and earlier lines
        import readline
    except ImportError:
        readline = None  # type: ignore[assignment]
    print("a line is continued; Ctrl-C stops that, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if readline is None or not readline.get_line_buffer():
                raise
            continue
        if not line:
            continue
        try:
            answer([line], seed)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        seed += 1


def answer_lines(answer: Answer, seed: int) -> None:
    """Every line of standard input is a prompt; empty ones are passed over."""
    n = 0
    try:
        for line in sys.stdin:
            if prompt := line.rstrip("\n"):
                answer([prompt], seed + n)
                n += 1
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding}: {error.reason}") from error
    if not n:
        raise UserError("no prompt: give one with --prompt, or lines on standard input")


def arguments(argv: list[str]) -> Any:
    """The options, each in its range."""
    what = "Text from a checkpoint. Without --prompt, every line typed or piped in is a prompt."
    p = cli.parser("python -m llama.generate", what)
    p.add_argument("run", type=str, help="A run, a checkpoint, or a folder of HF's or Meta's.")
    p.add_argument("--prompt", type=str, nargs="+", default=None, help="One or more prompts.")
    p.add_argument("--stop", type=str, nargs="+", default=[], help="Strings that end the text.")
    p.add_argument("--max_tokens", type=int, default=200, help="Most tokens to draw per prompt.")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token.")
    p.add_argument("--top_p", type=float, default=0.95, help="Share of probability to draw from.")
    p.add_argument("--top_k", type=int, default=0, help="Likeliest tokens to draw from; 0: all.")
    p.add_argument("--seed", type=int, default=0, help="Of the first prompt; then counting up.")
    p.add_argument("--tokenizer", type=str, default=None, help="tokenizer.model, if not found.")
    a = p.parse_args(argv)
    for name, good, expected in [
        ("stop", all(a.stop), "no empty string"),
        ("max_tokens", a.max_tokens > 0, "more than 0"),
        ("temperature", a.temperature >= 0, "0 or more"),
        ("top_p", 0 < a.top_p <= 1, "a share above 0"),
        ("top_k", a.top_k >= 0, "0 or more"),
        ("seed", 0 <= a.seed < 2**32, "0 or more"),
    ]:
        expect(good, f"--{name} is {getattr(a, name)}", expected)
    return a


def main(argv: list[str]) -> None:
    """The command: one prompt is streamed, several are printed one after the other."""
    a = arguments(argv)
    model, tokenizer, context = load(a.run, a.tokenizer)

    def answer(texts: Sequence[str], seed: int) -> None:
        with cli.as_user_error("the prompt cannot be encoded", ValueError):
            prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        longest = max(map(len, prompts))
        if longest >= context:
            raise UserError(
                f"the prompt has {longest} tokens, the context of {a.run} holds {context}"
            )
        left = context - longest
        sampling = {"temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p, "seed": seed}
        steps = generate(
            model, prompts, min(a.max_tokens, left), eos_id=tokenizer.eos_id, **sampling
        )
        finished = show(steps, [Text(tokenizer, prompt[1:], a.stop) for prompt in prompts])
        if not finished and left < a.max_tokens:
            print(f"stopped: the context of {context} tokens is full", file=sys.stderr)

    if a.prompt is not None:
        answer(a.prompt, a.seed)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        size = show_count(sum(weight.numel() for weight in model.parameters()))
        print(f"{a.run}: {size} parameters, context {context}", file=sys.stderr)
        converse(answer, a.seed)
    else:
        answer_lines(answer, a.seed)


if __name__ == "__main__":
    cli.run(main)
