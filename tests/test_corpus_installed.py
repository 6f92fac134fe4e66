"""Recipe `installed`: the quickstart's text, whole, in order, with nothing in two parts."""

from pathlib import Path

import pytest

from llama.cli import UserError
from llama.config import Count
from llama.corpus import engine
from llama.corpus.sources import installed
from llama.files import read_documents, read_json


def made(folder: Path, part: str, workers: int = 2, **options):
    chosen = installed.Options(part=part, source=part, **options)
    engine.run(installed.plan(chosen, []), installed.steps(chosen), folder, workers)
    shards = sorted(folder.glob("0*.jsonl.zst"))
    return {d["id"]: d["text"] for path in shards for d in read_documents(path)}


def test_the_four_parts_hold_what_they_say_and_share_nothing(tmp_path):
    parts = {p: made(tmp_path / p, p) for p in ("github", "docs", "manual", "packages")}
    assert not parts["github"].keys() & parts["docs"].keys()
    assert all(id.endswith(".py") for id in parts["github"] | parts["docs"])
    library = Path(installed.sysconfig.get_path("stdlib"))
    id = next(iter(parts["github"]))
    assert parts["github"][id] == (library / id).read_text("utf-8").replace("\r\n", "\n")
    assert len(parts["manual"]) > 100
    assert "while_stmt" in parts["manual"]["pydoc_data/topics.py:while:1"]
    assert any("numpy" in id for id in parts["packages"])
    assert not any("Metadata-Version" in text[:200] for text in parts["packages"].values())
    texts = [text for part in parts.values() for text in part.values()]
    assert min(len(text.strip()) for text in texts) >= 200
    # enough for a million tokens: a byte pair token of a small vocabulary is about three bytes
    assert sum(map(len, texts)) > 4_000_000
    for part in parts:
        assert read_json(tmp_path / part / "stats.json")["total"]["bytes"]["out"] > 200_000


def test_less_text_is_a_part_of_more_and_the_same_in_every_run(tmp_path):
    little = made(tmp_path / "a", "github", max_bytes=Count(500_000))
    again = made(tmp_path / "b", "github", workers=1, max_bytes=Count(500_000))
    more = made(tmp_path / "c", "github", max_bytes=Count(1_000_000))
    assert little == again and list(little) == list(again)
    assert little.items() <= more.items() and len(little) < len(more)
    assert 0 < sum(len(text.encode()) for text in little.values()) <= 500_000
    left_out = read_json(tmp_path / "a/stats.json")["left_out"]
    assert left_out["max_bytes"]["files"] > 0


def test_docstrings_stand_under_their_signatures():
    code = '''"""About the module."""
import os
if os.name:
    def outer(a, *, b: int = 3) -> str:
        """Say it.

            Indented.
        And not.
        """
        def inner(): "Inside."
class C(dict):
    """A class."""
    async def method(self): "Wait."
    def silent(self): return 1
'''
    assert installed.docstrings(code, "m") == (
        "m\n\nAbout the module.\n\n\n"
        "m.outer(a, *, b: int=3)\n\nSay it.\n\n    Indented.\nAnd not.\n\n\n"
        "m.outer.inner()\n\nInside.\n\n\n"
        "m.C\n\nA class.\n\n\n"
        "m.C.method(self)\n\nWait."
    )
    assert installed.docstrings("x = 1", "m") == ""


def test_an_input_is_refused():
    with pytest.raises(UserError, match="--input has no effect"):
        installed.plan(installed.Options(), [Path(".")])
