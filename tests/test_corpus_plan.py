"""Which files are read, how they become units, and what counts as the same plan."""

import os

import pytest

from llama.cli import UserError
from llama.corpus import plan, raw
from llama.corpus.plan import LeftOut, Piece


def txt_only(name: str) -> str | None:
    return "txt" if name.endswith(".txt") else None


def test_every_line_is_in_one_piece_with_its_number(tmp_path, monkeypatch, rng):
    path = tmp_path / "x.jsonl"
    for _ in range(150):
        lines = [b"x" * rng.choice([0, 1, 5, 300]) for _ in range(rng.randrange(1, 200))]
        data = b"\n".join(lines) + rng.choice([b"", b"\n"])
        path.write_bytes(data)
        unit_bytes = rng.choice([1, 7, 100, 1000])
        monkeypatch.setattr(raw, "CHUNK_BYTES", rng.choice([3, 64, 1 << 20]))
        whole = Piece("x.jsonl", str(path), "jsonl", len(data))
        units = plan.group([whole], unit_bytes, cut=("jsonl",))
        pieces = [piece for unit in units for piece in unit.pieces]
        found = {}
        for piece in pieces:
            chunks = raw.chunks(path, piece.begin, piece.size)
            for number, (line, _) in enumerate(raw.lines(chunks, 1000), piece.first_line):
                assert number not in found
                found[number] = line
        expected = data.split(b"\n")
        expected = expected if expected[-1] else expected[:-1]
        assert found == dict(enumerate(expected, 1))
        longest = max(map(len, lines)) + 1
        assert all(piece.size <= unit_bytes + longest for piece in pieces)


def test_groups_keep_order_and_stay_near_the_size(rng):
    for _ in range(200):
        pieces = [
            Piece(f"{i:04}", f"{i:04}{rng.choice(['.txt', '.gz'])}", "txt", rng.randrange(90_000))
            for i in range(rng.randrange(200))
        ]
        size = rng.choice([1, 50_000, 300_000])
        units = plan.group(pieces, size)
        assert [piece for unit in units for piece in unit.pieces] == pieces
        assert [unit.output for unit in units] == [f"{i:05}.jsonl.zst" for i in range(len(units))]
        for unit in units:
            cost = sum(p.size * (3 if p.path.endswith(".gz") else 1) + 4096 for p in unit.pieces)
            assert cost <= size or len(unit.pieces) == 1


def test_many_tiny_files_make_few_units():
    pieces = [Piece(str(i), f"{i}.txt", "txt", 100) for i in range(100_000)]
    assert len(plan.group(pieces, 32_000_000)) < 20


def test_find_names_what_it_leaves_out(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "picture.png").write_bytes(b"1234")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/c.txt").write_text("c")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "link.txt").symlink_to("a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    pieces, left_out = plan.find([tmp_path], txt_only)
    assert [(piece.name, piece.size) for piece in pieces] == [
        ("a.txt", 1),
        ("a/b.txt", 1),
        ("link.txt", 1),
    ]
    assert sorted(left_out) == [
        LeftOut(".git", "hidden"),
        LeftOut("gone.txt", "unreadable"),
        LeftOut("loop", "link to a folder"),
        LeftOut("picture.png", "suffix", 4),
        LeftOut("pipe.txt", "special file"),
        LeftOut("self.txt", "unreadable"),
    ]


def test_unreadable_files_and_folders_are_counted(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError
        return scandir(path)

    # root may read everything, so permissions are played
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("a.txt"))
    pieces, left_out = plan.find([tmp_path], txt_only)
    assert pieces == []
    assert sorted(left_out) == [LeftOut("a.txt", "unreadable", 1), LeftOut("closed/", "unreadable")]


def test_odd_names_give_valid_unicode_and_several_inputs_are_told_apart(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    (tmp_path / "two/with\nnewline.txt").write_text("x")
    open(os.fsencode(tmp_path) + b"/two/latin\xe9.txt", "w").close()
    pieces, _ = plan.find([tmp_path / "one", tmp_path / "two"], txt_only)
    names = [piece.name for piece in pieces]
    assert names == ["one/a.txt", "two/a.txt", "two/latin\\xe9.txt", "two/with\nnewline.txt"]
    assert all(name.encode() for name in names)
    with pytest.raises(UserError, match="two files called a.txt"):
        plan.find([tmp_path / "one/a.txt", tmp_path / "two/a.txt"], txt_only)
    with pytest.raises(UserError, match="nowhere does not exist"):
        plan.find([tmp_path / "nowhere"], txt_only)


def test_differences_name_every_change():
    old = {"version": 1, "recipe": "plain", "options": {"min_chars": 1, "text_key": "text"}}
    old["inputs"] = {"a": 1, "b": 2, "c": 3}
    new = {
        **old,
        "options": {"min_chars": 9, "text_key": "body"},
        "inputs": {"b": 5, "c": 3, "d": 4},
    }
    assert plan.differences(old, new) == [
        "options.min_chars: 1 -> 9",
        "options.text_key: text -> body",
        "inputs added: 1 (d)",
        "inputs gone: 1 (a)",
        "inputs changed: 1 (b 2 -> 5)",
    ]
    assert plan.differences(old, old) == []
