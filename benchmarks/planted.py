"""A planted crawl: which of its pages Wikipedia refers to is known (paper §2.1).

In: documents of two kinds, such as books and pages of C4. Out: a folder of articles and one of
crawled pages, as the recipes make them; every page is a piece of a document, and a document is a
site. Articles refer to pages of the first kind, under the addresses that people write: with www.,
a slash at the end, in an archive of the web. A few references are wrong. Sites that are kept back
are the test: pieces that no model has seen a neighbour of.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from llama.corpus.document import Document
from llama.files import LineWriter

# Characters of a page; pages of a site; of so many sites one is kept back, of so many references
# one is wrong.
CHARS, PAGES, KEPT_BACK, WRONG = (300, 3000), 60, 4, 20
_WRITTEN = (
    "{}",
    "http://www.{}/",
    "https://web.archive.org/web/20200101000000/https://{}",
    "https://{}#part",
)


@dataclass(frozen=True)
class Planted:
    """Folders to learn from, and (text, whether Wikipedia would refer to it) to be judged on."""

    wikipedia: Path
    crawl: Path
    test: list[tuple[str, bool]]


def plant(kinds: Sequence[Iterable[Document]], folder: Path, seed: int = 0) -> Planted:
    """The crawl of documents of two kinds; Wikipedia refers to those of the first one."""
    rng = random.Random(seed)
    pages: list[tuple[str, str, bool]] = []
    test: list[tuple[str, bool]] = []
    for is_reference, documents in zip((True, False), kinds, strict=True):
        for document in documents:
            site = f"{hashlib.sha1(document.id.encode()).hexdigest()}.example"
            texts = list(_pieces(document.text, rng))
            if not coin(f"kept back {document.id}", KEPT_BACK):
                test += [(text, is_reference) for text in texts]
            else:
                pages += [(f"{site}/{i}", text, is_reference) for i, text in enumerate(texts)]
    rng.shuffle(pages)
    cited = [url for url, _, is_reference in pages if is_reference == (rng.randrange(WRONG) > 0)]
    named = [rng.choice(_WRITTEN).format(url) for url in cited]
    articles = [
        {"id": f"a:{i}", "text": "An article.", "meta": {"references": named[i : i + 50]}}
        for i in range(0, len(named), 50)
    ]
    crawl = [
        {"id": f"c:{i}", "text": text, "meta": {"url": f"https://{url}"}}
        for i, (url, text, _) in enumerate(pages)
    ]
    for name, found in (("wikipedia", articles), ("crawl", crawl)):
        (folder / name).mkdir(parents=True)
        with LineWriter(folder / name / "00000.jsonl.zst") as out:
            for each in found:
                out.write(orjson.dumps(each))
    return Planted(folder / "wikipedia", folder / "crawl", test)


def coin(name: str, sides: int = 2) -> int:
    """The same of so many sides for a name, always."""
    return int.from_bytes(hashlib.sha1(name.encode()).digest()[:8]) % sides


def _pieces(text: str, rng: random.Random) -> Iterable[str]:
    """At most `PAGES` pages of a text, of any length between the bounds."""
    at = 0
    for _ in range(PAGES):
        length = rng.randint(*CHARS)
        if len(text) - at < CHARS[0]:
            return
        yield text[at : at + length]
        at += length
