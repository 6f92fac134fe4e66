"""The command that continues prompts: stop strings, pipes, terminals, and what it refuses."""

import io
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from made_convert import SHAPES, convert, make_run, without_transformers
from made_generate import continued, small

from llama import config, files, generate
from llama.cli import UserError
from llama.config import Config
from llama.convert import check
from llama.model import Transformer
from llama.runtime import checkpoint, world
from tokenizer.tokenizer import Tokenizer

CONTEXT = 64


@pytest.fixture
def seed(rng: random.Random) -> int:
    torch.manual_seed(rng.randrange(2**31))
    return rng.randrange(2**31)


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
    grown = generate.Text(tokenizer, [], [])
    shown = [grown.add(i) for i in ids]
    assert "".join(shown) == text and "\ufffd" not in "".join(shown)
    assert shown.count("") >= 3
    # bytes that never become a character are shown in the end
    cut = generate.Text(tokenizer, ids[:-4], [])
    cut.add(ids[-4])
    assert set(cut.add(None)) == {"\ufffd"}


class Bytes:
    """Decodes ids that are byte strings."""

    def decode(self, ids: list[bytes]) -> str:
        return b"".join(ids).decode(errors="replace")


def spoken(tokens: list[bytes], stops: list[str], prompt: str = "ab") -> list[str]:
    """What is shown after each token, and in the end."""
    text = generate.Text(Bytes(), [prompt.encode()], stops)  # type: ignore[arg-type, list-item]
    shown, whole = [], ""
    for token in [*tokens, None]:
        whole += text.add(token)  # type: ignore[arg-type]
        shown.append(whole)
    return shown


def test_stop_strings_in_any_tokens(rng: random.Random) -> None:
    """Against the definition, on texts of few letters, so that stops nearly begin all the time."""
    ended = 0
    for _ in range(2000):
        text = "".join(rng.choices("abé", k=rng.randrange(20)))
        stops = [
            "".join(rng.choices("abé", k=rng.randrange(1, 5))) for _ in range(rng.choice((1, 3)))
        ]
        data, tokens = text.encode(), []
        while data:
            n = rng.randrange(1, 5)
            tokens.append(data[:n])
            data = data[n:]
        complete = [
            (at + len(stop), at)
            for stop in stops
            for at in range(len(text))
            if text.startswith(stop, at)
        ]
        ended += bool(complete)
        truth = text[: min(complete)[1]] if complete else text
        shown = spoken(tokens, stops)
        assert shown[-1] == truth, (text, stops)
        for i, part in enumerate(shown[:-1]):
            # nothing is taken back, and nothing held back without need
            assert truth.startswith(part), (text, stops)
            whole = b"".join(tokens[: i + 1]).decode(errors="ignore")
            rest = whole.removeprefix(part)
            assert part == truth or any(stop.startswith(rest) for stop in stops), (text, stops)
    assert 200 < ended < 1800


def test_stop_strings_are_looked_for_behind_the_prompt() -> None:
    assert spoken([b"c", b"d", b"xcd"], ["bc", "cdx"]) == ["", "", "", ""]
    assert spoken([b"bc", b"d"], ["ab", "bc"]) == ["", "", ""]
    assert spoken([b"x", b"abc"], ["abc", "b"]) == ["x", "xa", "xa"]


def fake(
    monkeypatch: pytest.MonkeyPatch, run: Path, texts: Sequence[str], last: object = None
) -> list[int]:
    """A model that says these texts, one to a prompt; the steps it is asked for, as they come.

    In the end its rows have ended, or `last` is raised.
    """
    _, tokenizer, _ = generate.load(run)
    rows = [tokenizer.encode(text) for text in texts]
    asked: list[int] = []

    def steps(_: Transformer, prompts: list[list[int]], *__: object, **___: object) -> Iterator:
        for step in range(max(map(len, rows)) + 1):
            asked.append(step)
            if isinstance(last, BaseException) and step == max(map(len, rows)):
                raise last
            yield [row[step] if step < len(row) else None for row in rows[: len(prompts)]]

    monkeypatch.setattr(generate, "generate", steps)
    return asked


def test_stop_strings_of_a_batch(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt ends by its own, streamed or not, and nothing is drawn for nobody."""
    texts = ["sat on the mat and the dog\n", "return 0\nthe cat and def main"]
    prompts, stops = ["the cat", "the dog"], ["mat", "0\nthe c"]
    steps = fake(monkeypatch, run, texts)
    generate.main([str(run), "--prompt", *prompts])
    whole, n = capsys.readouterr().out, len(steps)
    assert whole == f"--- 1 of 2\nthe cat {texts[0]}\n--- 2 of 2\nthe dog {texts[1]}\n"
    steps.clear()
    generate.main([str(run), "--prompt", *prompts, "--stop", *stops])
    truth = "--- 1 of 2\nthe cat sat on the \n--- 2 of 2\nthe dog return \n"
    assert capsys.readouterr().out == truth
    assert len(steps) < n - 3
    generate.main([str(run), "--prompt", prompts[0], "--stop", *stops])
    printed = capsys.readouterr()
    assert printed.out == "the cat sat on the \n" and not printed.err


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_lines_of_a_pipe_are_prompts(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, b"the cat\n\r\nthe dog  \n")
    generate.main([str(run), "--max_tokens=5", "--seed=3"])
    both = capsys.readouterr().out
    generate.main([str(run), "--max_tokens=5", "--seed=3", "--prompt", "the cat"])
    generate.main([str(run), "--max_tokens=5", "--seed=4", "--prompt", "the dog  "])
    assert capsys.readouterr().out == both
    for data, words in ((b"\n", "no prompt"), (b"a\xff", "utf-8"), (b"cat " * 99, "holds 64")):
        piped(monkeypatch, data)
        with pytest.raises(UserError, match=words):
            generate.main([str(run)])


def typed(monkeypatch: pytest.MonkeyPatch, lines: list[str | type[BaseException]]) -> None:
    """What happens at one prompt after the other."""

    def answer(prompt: str) -> str:
        assert prompt == "> "
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)


def test_a_conversation(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is continued, an error or Ctrl-C comes back to the prompt, Ctrl-D ends."""
    fake(monkeypatch, run, ["sat on the"], KeyboardInterrupt())
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    typed(monkeypatch, ["the cat", "", "cat " * 99, "the dog", EOFError])
    generate.main([str(run)])
    printed = capsys.readouterr()
    assert printed.out == "the cat sat on the\nthe dog sat on the\n\n"
    assert printed.err.count("error: the prompt has") == 1
    typed(monkeypatch, [KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        generate.main([str(run)])


TERMINAL = """
import time
from llama import cli, generate

def steps(model, prompts, max_tokens, **options):
    while True:
        time.sleep(0.01)
        yield [prompts[0][-1]]

generate.generate = steps
cli.run(generate.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("last", "code"), [(b"\x04", 0), (b"\x03", 130)])
def test_on_a_terminal(run: Path, last: bytes, code: int) -> None:
    """Ctrl-C stops the text and comes back; then Ctrl-D, or Ctrl-C again, leaves."""
    ours, its = os.openpty()

    def at_a_terminal() -> None:
        os.login_tty(its)
        # a suite that a script runs in the background ignores it, and so would this
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(run)],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=check.ROOT,
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        preexec_fn=at_a_terminal,
    )
    os.close(its)
    seen = b""

    def wait(pattern: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert select.select([ours], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(ours, 4096)
        seen = seen[re.search(pattern, seen).end() :]  # type: ignore[union-attr]

    def wait_until_it_reads() -> None:
        """A signal that comes between the prompt and the reading is seen with the next line."""
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)

    try:
        wait(rb"> $")
        os.write(ours, b"the cat\n")
        wait(rb"(at){5}")
        os.write(ours, b"\x03")
        wait(rb"\n> $")
        # what is typed at the prompt goes first
        os.write(ours, b"half")
        wait(rb"half$")
        wait_until_it_reads()
        os.write(ours, b"\x03")
        wait(rb"\n> $")
        wait_until_it_reads()
        os.write(ours, last)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()
        os.close(ours)


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
        ([], "no prompt"),
        (["--prompt", "a", "--stop", "x", ""], "stop is .*no empty string"),
        (["--prompt", "a", "--max_tokens", "0"], "max_tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--temperature", "inf"], "temperature.*inf"),
        (["--prompt", "a", "--top_p", "0"], "top_p is 0"),
        (["--prompt", "a", "--top_p", "nan"], "top_p.*nan"),
        (["--prompt", "a", "--top_k", "-1"], "top_k is -1"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "\ud800"], "surrogate"),
        (["--prompt", "a", "--tokenizer", "nowhere"], "no tokenizer: nowhere does not exist"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Path, options: Sequence[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, b"")
    with pytest.raises(UserError, match=words) as caught:
        generate.main([str(run), *options])
    assert "\n" not in str(caught.value)


def flip(run: Path) -> None:
    path = next((run / "ckpt").glob("step-*/__0_*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_state(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As if the run had been saved like this."""
    path = next((run / "ckpt").glob("step-*"))
    state = checkpoint.read_state(path)
    change(state)
    files.write_json(path / "state.json", state)
    manifest = files.read_json(path / "manifest.json")
    manifest["files"]["state.json"] = checkpoint._entry(path / "state.json")
    files.write_json(path / "manifest.json", manifest | {"sha256": checkpoint._own_hash(manifest)})


def change_tokenizer(run: Path) -> None:
    change_state(run, lambda state: state["fingerprints"].update(tokenizer="0" * 64))


def lose_tokenizer(run: Path) -> None:
    change_state(run, lambda state: state["config"]["data"].update(path="elsewhere/tokens"))


def empty(run: Path) -> None:
    for path in (run / "ckpt").iterdir():
        path.rename(run / path.name)


def make_foreign(run: Path) -> None:
    (run / "ckpt").rename(run / "weights")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, "is damaged: the content of __0_0.distcp"),
        (change_tokenizer, "is not the tokenizer that"),
        (empty, "holds no complete checkpoint"),
        (make_foreign, "is of no known format"),
        (lose_tokenizer, "has no tokenizer: elsewhere/tokens/.*name it with --tokenizer"),
    ],
)
def test_bad_runs_are_refused(run: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(run)
    with pytest.raises(UserError, match=words):
        generate.main([str(run), "--prompt", "a"])


def test_weights_of_other_formats(tmp_path: Path, rng: random.Random, capsys: Capture) -> None:
    """What llama.convert reads is continued too, with the tokenizer found where it lies."""
    run, options = make_run(tmp_path, rng, **SHAPES["grouped"]), ["--prompt", "the", "--seed=1"]
    generate.main([str(run), *options])
    truth = capsys.readouterr().out
    for kind in ("hf", "meta", "native"):
        with without_transformers():
            convert(run, tmp_path / kind, kind)
        capsys.readouterr()
        shown = ["--max_tokens=20"] if kind == "meta" else []
        generate.main([str(tmp_path / kind), *options, *shown])
        printed = capsys.readouterr().out
        # Meta's folders do not say how long the context was
        assert truth.startswith(printed[:-1].rstrip("\ufffd")) if shown else printed == truth
