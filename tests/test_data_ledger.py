"""The ledger against every batch looked at by hand, over segments, epochs and shards."""

import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import orjson
import pytest
from made_data import Documents, make_source, random_documents

from llama import config, files
from llama.cli import UserError
from llama.data.ledger import (
    documents_of_step,
    locate,
    main,
    spent,
    spent_table,
    steps_of_document,
)
from llama.data.order import Order, integer_weights
from llama.data.shards import Source, open_sources
from llama.data.writer import id_hash

WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}
VALID_PER_10K = 1500
STEPS = 45


def make_set(rng: random.Random, folder: Path) -> dict[str, Documents]:
    """Sources of a few shards, with long, short and empty documents."""
    made = {}
    for name, n in (("web", 120), ("code", 60), ("books", 12)):
        documents = random_documents(rng, name, n, longest=rng.choice([5, 60]))
        documents += [(f"{name}/long", [1, *[9] * 200, 2])]
        made[name] = documents
        cut = rng.randrange(1, n)
        make_source(folder / name, [documents[:cut], documents[cut:]], valid_per_10k=VALID_PER_10K)
    return made


def make_order(rng: random.Random, sources: dict[str, Source]) -> Order:
    """Three segments, one with another window length, one with skipped samples."""

    def windows(length: int) -> dict[str, int]:
        return {name: source.n_windows(length) for name, source in sources.items()}

    weights = integer_weights(WEIGHTS)
    order = Order.start(
        rng.randrange(99), batch_windows=6, seq_len=16, weights=weights, windows=windows(16)
    )
    order, _ = order.append(15, skipped=[(order.position(15), order.position(17))])
    order, _ = order.append(30, batch_windows=5, seq_len=11, windows=windows(11))
    return order


def owners(sources: dict[str, Source], made: dict[str, Documents]) -> dict[str, list[str]]:
    """Id of the document of every token of the training text, from the documents themselves."""
    found = {}
    for name, source in sources.items():
        keys = {id_hash(key): (key, tokens) for key, tokens in made[name]}
        found[name] = list[str]()
        for k in range(len(source.shards)):
            for hashed in np.fromfile(source.path(k, ".hash"), "<u8").tolist():
                key, tokens = keys[hashed]
                found[name] += [key] * len(tokens)
        assert len(found[name]) == source.n_tokens
    return found


def test_both_directions_agree_with_the_batches(rng: random.Random, tmp_path: Path) -> None:
    made = make_set(rng, tmp_path)
    sources = open_sources(tmp_path, WEIGHTS)
    order, owner = make_order(rng, sources), owners(sources, made)
    seen: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for step in range(STEPS):
        length, drawn = order.segment(step).seq_len, order.batch(step)
        found = documents_of_step(order, sources, step)
        for row, (index, window) in enumerate(
            zip(drawn.sources.tolist(), drawn.windows.tolist(), strict=True)
        ):
            name = order.names[index]
            keys = owner[name][window * length : window * length + length + 1]
            mine = [passage for passage in found if passage.row == row]
            assert [p.document for p in mine for _ in range(p.first, p.end)] == keys
            for passage in mine:
                tokens = dict(made[name])[passage.document]
                assert passage.of == len(tokens) and passage.source == name
                assert passage.window == window and passage.epoch == drawn.epochs[row]
            for key in dict.fromkeys(keys):
                seen[key].append((step, row, window))
            whole = dict(made[name])
            text = [t for p in mine for t in whole[p.document][p.first : p.end]]
            assert text == sources[name].read(window * length, length + 1).tolist()
    assert len(seen) > 100
    for name, source in sources.items():
        for key, tokens in made[name]:
            place = locate(source, key)
            assert (place is None) == (id_hash(key) % 10_000 < VALID_PER_10K)
            if place is None:
                assert key not in seen
                continue
            assert source.read(place.first, place.end - place.first).tolist() == tokens
            for last in (STEPS - 1, rng.randrange(STEPS)):
                visits = steps_of_document(order, place, last)
                assert [tuple(v) for v in visits] == [v for v in seen[key] if v[0] <= last]


def test_no_held_out_document_is_in_any_training_window(rng: random.Random, tmp_path: Path) -> None:
    """Every window of every source, by the ledger and by the tokens themselves."""
    for name in WEIGHTS:
        # each document repeats a number of its own: its tokens say whose they are
        documents = [(f"{name}/{i}", [1, *[i + 3] * rng.randrange(1, 30), 2]) for i in range(300)]
        make_source(
            tmp_path / name, [documents[:200], documents[200:]], valid_per_10k=VALID_PER_10K
        )
    sources = open_sources(tmp_path, WEIGHTS)
    windows = {name: source.n_windows(8) for name, source in sources.items()}
    order = Order.start(
        1, batch_windows=64, seq_len=8, weights=integer_weights(WEIGHTS), windows=windows
    )
    held_out = {
        name: {i for i in range(300) if id_hash(f"{name}/{i}") % 10_000 < VALID_PER_10K}
        for name in WEIGHTS
    }
    assert all(20 < len(numbers) < 80 for numbers in held_out.values())
    drawn: dict[str, set[int]] = defaultdict(set)
    step = 0
    while any(len(drawn[name]) < n for name, n in windows.items()):
        passages = documents_of_step(order, sources, step)
        for passage in passages:
            drawn[passage.source].add(passage.window)
            assert int(passage.document.split("/")[1]) not in held_out[passage.source]
        batch = order.batch(step)
        for index, window in zip(batch.sources.tolist(), batch.windows.tolist(), strict=True):
            name = order.names[index]
            numbers = set((sources[name].read(window * 8, 9).astype(int) - 3).tolist())
            assert not numbers & held_out[name]
        step += 1
    valid = open_sources(tmp_path, WEIGHTS, "valid")
    for name, source in valid.items():
        numbers = set((source.read(0, source.n_tokens).astype(int) - 3).tolist())
        assert numbers - {-2, -1} == held_out[name]


def test_tokens_spent_follow_the_plan(rng: random.Random, tmp_path: Path) -> None:
    make_set(rng, tmp_path)
    sources = open_sources(tmp_path, WEIGHTS)
    order = make_order(rng, sources)
    counted = dict.fromkeys(order.names, 0)
    for step in range(STEPS):
        lines = spent(order, step)
        assert {line.source: line.tokens for line in lines} == counted
        total = order.tokens(step)
        assert sum(line.tokens for line in lines) == total
        assert sum(line.planned for line in lines) == pytest.approx(total)
        # per segment, one window over and one passed over may be missing
        assert all(abs(line.tokens - line.planned) < 3 * 2 * 16 for line in lines)
        drawn = order.batch(step)
        for index in drawn.sources.tolist():
            counted[order.names[index]] += order.segment(step).seq_len
    table = spent_table(order, 40, STEPS)
    row = next(line.split() for line in table.splitlines() if line.startswith("web"))
    assert row[1] == f"{order.source_tokens(40)['web']:,}"
    assert row[-1] == f"{order.source_tokens(STEPS)['web']:,}"
    assert "windows passed over: books" in table


def test_replaced_shards_are_refused(rng: random.Random, tmp_path: Path) -> None:
    make_set(rng, tmp_path)
    order = make_order(rng, open_sources(tmp_path, WEIGHTS))
    make_source(tmp_path / "web", [random_documents(rng, "web", 50)])
    sources = open_sources(tmp_path, WEIGHTS)
    place = locate(sources["web"], "web/3")
    assert place is not None
    with pytest.raises(UserError, match="web/train.*were replaced"):
        steps_of_document(order, place, 5)


@pytest.fixture
def run(rng: random.Random, tmp_path: Path) -> Path:
    """A run folder with two checkpoints, of which only state.json is there."""
    make_set(rng, tmp_path / "tokens")
    sources = open_sources(tmp_path / "tokens", WEIGHTS)
    cfg = config.Config(seed=7)
    cfg.data = config.DataConfig(path=str(tmp_path / "tokens"), mixture=WEIGHTS, seq_len=16)
    cfg.train = config.TrainConfig(tokens=config.Count(30 * 96), batch_tokens=config.Count(96))
    order = Order.start(
        7,
        batch_windows=6,
        seq_len=16,
        weights=integer_weights(WEIGHTS),
        windows={name: source.n_windows(16) for name, source in sources.items()},
    )
    folder = tmp_path / "runs/small"
    files.write_atomic(folder / "config.yaml", config.to_yaml(cfg))
    for step in (9, 20):
        state = {"step": step, "segments": order.segments}
        files.write_json(folder / f"ckpt/step-{step:08d}/state.json", state)
    return folder


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = run.parent.parent / "tokens"
    sources = open_sources(tokens, WEIGHTS)
    order = Order.start(
        7,
        batch_windows=6,
        seq_len=16,
        weights=integer_weights(WEIGHTS),
        windows={name: source.n_windows(16) for name, source in sources.items()},
    )
    main([str(run), "--step", "12"])
    out = capsys.readouterr().out
    passages = documents_of_step(order, sources, 11)
    assert "step 12, trained" in out and len(out.splitlines()) == 3 + len(passages)
    for line, passage in zip(out.splitlines()[3:], passages, strict=True):
        assert line.split()[:2] == [str(passage.row), passage.source]
        assert line.split()[-1] == passage.document
    main([str(run / "ckpt/step-00000009"), "--step", "12"])
    assert "step 12, not trained yet" in capsys.readouterr().out

    key = passages[0].document
    main([str(run), "--document", key])
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.split()[0] == "12")
    assert row == ["12", "0", str(passages[0].window), "trained"]
    assert {line.split()[-1] for line in lines[3:]} <= {"trained", "planned"}
    assert all((int(line.split()[0]) <= 20) == line.endswith("trained") for line in lines[3:])

    held_out = next(
        orjson.loads(line) for line in files.read_lines(next(tokens.glob("web/valid/*.ids.zst")))
    )
    main([str(run), "--document", held_out])
    assert "held out for validation: no step" in capsys.readouterr().out

    main([str(run), "--spent"])
    out = capsys.readouterr().out
    assert out.startswith("1,920 tokens in 20 of 30 steps")
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["books", "code", "web"]


def test_run_without_a_checkpoint_is_all_plan(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in run.glob("ckpt/*/state.json"):
        path.unlink()
    main([str(run), "--spent"])
    assert capsys.readouterr().out.startswith("0 tokens in 0 of 30 steps")
    main([str(run), "--step", "1"])
    assert "not trained yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--step", "0"], "1 to 30"),
        (["--step", "31"], "1 to 30"),
        (["--document", "none"], "no document 'none' in books, code, web"),
        ([], "one of"),
        (["--step", "1", "--spent"], "one of"),
    ],
)
def test_mistakes_are_one_sentence(run: Path, args: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        main([str(run), *args])
    with pytest.raises(UserError, match="is no run folder"):
        main([str(run.parent), "--spent"])
