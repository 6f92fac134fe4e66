"""The mixture command: the paper's epochs, RedPajama's, and those of a run's own shards."""

import random
import re
from pathlib import Path

import pytest
from made_data import make_sources

from llama.cli import UserError
from llama.config import read_mixture
from llama.data.mixture import PAPER_EPOCHS, main, plan_table
from llama.data.shards import open_sources

TABLE_1 = Path(__file__).parent.parent / "configs/mixtures/llama1.yaml"
LLAMA = str(TABLE_1.parent.parent / "llama_65b.yaml")  # 1.4T tokens
# Tokens of RedPajama-1T as published.
REDPAJAMA = (
    "commoncrawl=878B,c4=175B,github=59B,wikipedia=24B,books=26B,arxiv=28B,stackexchange=20B"
)


def columns(table: str) -> dict[str, list[str]]:
    lines = table.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("---"))
    return {line.split()[0]: line.split()[1:] for line in lines[head + 1 :]}


def test_the_mixture_of_the_paper() -> None:
    weights = read_mixture(TABLE_1)
    assert [round(100 * w, 1) for w in weights.values()] == [67, 15, 4.5, 4.5, 4.5, 2.5, 2.0]
    assert list(weights) == list(PAPER_EPOCHS)
    assert list(PAPER_EPOCHS.values()) == [1.10, 1.06, 0.64, 2.45, 2.23, 1.06, 1.03]


def test_epochs_of_redpajama(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", LLAMA, "--source_tokens", REDPAJAMA])
    rows = columns(capsys.readouterr().out)
    assert {name: row[-2] for name, row in rows.items()} == {
        "commoncrawl": "1.07",
        "c4": "1.20",
        "github": "1.07",
        "wikipedia": "2.63",
        "books": "2.42",
        "arxiv": "1.25",
        "stackexchange": "1.40",
    }
    assert [row[-1] for row in rows.values()] == "1.10 1.06 0.64 2.45 2.23 1.06 1.03".split()
    assert rows["wikipedia"][:3] == ["4.500%", "24.00B", "63.00B"]


def test_epochs_of_a_run(
    rng: random.Random, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sources(rng, tmp_path / "tokens", {"web": 300, "code": 40})
    (tmp_path / "mixture.yaml").write_text("web: 0.9\ncode: 0.1\n")
    (tmp_path / "run.yaml").write_text(
        f"data: {{path: {tmp_path}/tokens, mixture: mixture.yaml, seq_len: 16}}\n"
        "train: {tokens: 200K, batch_tokens: 160}\n"
    )
    main(["--config", str(tmp_path / "run.yaml"), "--train.tokens", "100K"])
    out = capsys.readouterr().out
    rows = columns(out)
    sources = open_sources(tmp_path / "tokens", ["web", "code"])
    for name, weight in (("web", 0.9), ("code", 0.1)):
        n = sources[name].n_tokens
        assert rows[name][1:] == [
            f"{n:,}",
            f"{100_000 * weight:,.0f}",
            f"{100_000 * weight / n:.2f}",
            "-",
        ]
    often = re.search(r"read more than 4 times: (.*)", out)
    assert often and often[1] == "web, code"


def test_rounded_weights_are_told() -> None:
    third = {"a": 1 / 3, "b": 2 / 3}
    text = plan_table({"a": 0.333333, "b": 0.666667}, 10**9, {"a": 10**9, "b": 10**9})
    assert "weights rounded to n/65536, each off by at most" in text
    assert "rounded" not in plan_table({"a": 0.25, "b": 0.75}, 10**9)
    assert set(columns(plan_table(third, 100).split("weights")[0])) == {"a", "b"}


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--source_tokens", "c4=1B"], "arxiv, books"),
        (["--source_tokens", "c4"], "'c4' is not"),
        (["--source_tokens", "c4=0"], "c4 has 0"),
        (["--source_tokens", "c4=x"], "'x'"),
        (["--source_tokens", "c4=1B", "--data.mixture", "no.yaml"], "no.yaml"),
        (["--tokens", "1B"], "tokens"),
    ],
)
def test_mistakes_are_one_sentence(args: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        main(["--config", LLAMA, *args])


def test_weights_that_do_not_sum_to_1_are_refused_with_their_sum(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text("web: 0.9\ncode: 0.2\n")
    with pytest.raises(UserError, match=r"mixture.yaml.* 1\.1"):
        main(["--source_tokens", "web=1B,code=1B", "--data.mixture", str(path)])


def test_source_shorter_than_a_window_is_refused(rng: random.Random, tmp_path: Path) -> None:
    make_sources(rng, tmp_path, {"web": 30})
    args = ["--data.path", str(tmp_path), "--data.mixture", "{web: 1.0}"]
    with pytest.raises(UserError, match="'web'.*1048576"):
        main([*args, "--data.seq_len", "1048576", "--train.batch_tokens", "1048576"])
