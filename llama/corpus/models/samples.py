"""Samples of documents to learn from: clean articles and crawled pages in, a few files out.

Documents are of kinds: `articles-<language>`, `pages-<language>`, `references` (pages at an address
that an article refers to) and `others`. Of each kind those with the lowest hashes are chosen, of an
article's id or a page's address: neither the order of the documents nor their length decides, and
of two copies of a page one is chosen. All documents are read three times, and none is kept.
"""

import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from llama.files import LineWriter, read_documents, read_lines

# The most that is learnt from: text of a language, pages of a class (as RedPajama's), pages of a
# language of which perplexities are measured.
MAX_ARTICLE_BYTES, MAX_REFERENCES, MAX_PAGES = 400_000_000, 300_000, 10_000
# Of so many articles, or sites of the web, one is held out.
HELD_OUT = 10
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*")
_ADDRESS = re.compile(
    r"(?:https?://web\.archive\.org/web/[^/]+/)?(?:https?:)?/*(?:www\.)?([^/?#]*)([^?#]*)([^#]*)",
    re.I,
)


class Text(NamedTuple):
    """A document that was chosen; a page is held out with all of its site."""

    key: int
    text: str
    is_held_out: bool


@dataclass
class Kind:
    """Documents of one kind: for each the hash that may choose it, and its bytes."""

    keys: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("Q"))

    def counts(self) -> dict[str, int]:
        """Documents and bytes, each hash once."""
        _, first = np.unique(self.keys, return_index=True)
        return {"documents": len(first), "bytes": int(np.array(self.sizes)[first].sum())}

    def last(self, documents: int, n_bytes: int) -> int:
        """The highest hash that is chosen when at most so many documents and bytes are."""
        keys, first = np.unique(self.keys, return_index=True)
        sums = np.cumsum(np.array(self.sizes)[first])
        n = min(documents, int(np.searchsorted(sums, n_bytes, "right")))
        return int(keys[n - 1]) if n else -1


def write(
    wikipedia: Sequence[Path], crawl: Sequence[Path], folder: Path
) -> dict[str, dict[str, int]]:
    """Write the samples of every kind into a folder; documents and bytes there are of each."""
    links = [_links(document) for document in chain.from_iterable(map(read_documents, wikipedia))]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *links]))
    kinds: dict[str, Kind] = defaultdict(Kind)
    for kind, key, _, text in _kinds(wikipedia, crawl, known):
        kinds[kind].keys.append(key)
        kinds[kind].sizes.append(len(text.encode()))
    counts = {kind: kinds[kind].counts() for kind in sorted(kinds)}
    # as many references as others
    both = [kinds[kind].counts()["documents"] for kind in ("references", "others")]
    most = {"articles": 1 << 40, "pages": MAX_PAGES}
    last = {
        kind: kinds[kind].last(
            most.get(kind.partition("-")[0], min(MAX_REFERENCES, *both)), MAX_ARTICLE_BYTES
        )
        for kind in counts
        # of other languages' pages nothing is asked
        if kind.replace("pages-", "articles-") in counts
    }
    seen: dict[str, set[int]] = defaultdict(set)
    with ExitStack() as stack:
        out = {k: stack.enter_context(LineWriter(folder / f"{k}.zst")) for k in last}
        for kind, key, group, text in _kinds(wikipedia, crawl, known):
            if key <= last.get(kind, -1) and key not in seen[kind]:
                seen[kind].add(key)
                out[kind].write(orjson.dumps([key, text, _hash(group) % HELD_OUT == 0]))
    return counts


def read(folder: Path, kind: str) -> Iterator[Text]:
    """The documents of a kind that were chosen."""
    return (Text(*orjson.loads(line)) for line in read_lines(folder / f"{kind}.zst"))


def address(url: str) -> str:
    """What is left of an address when two that mean one page are made the same."""
    found = _ADDRESS.match(url.strip())
    assert found, "the pattern has no part that must be there"
    host, path, query = found.groups()
    return f"{host.lower()}{path.rstrip('/')}{query}"


def _kinds(
    wikipedia: Sequence[Path], crawl: Sequence[Path], known: NDArray[np.uint64]
) -> Iterator[tuple[str, int, str, str]]:
    """(kind, hash, what it is held out with, text); a page is of two kinds."""
    for document in chain.from_iterable(map(read_documents, wikipedia)):
        if _LANGUAGE.fullmatch(language := _meta(document, "language")):
            id, text = document["id"], document["text"]
            yield f"articles-{language}", _hash(id), id, text
    for document in chain.from_iterable(map(read_documents, crawl)):
        url = address(_meta(document, "url")) or document["id"]
        key, site, text = _hash(url), url.partition("/")[0], document["text"]
        place = int(np.searchsorted(known, np.uint64(key)))
        is_known = place < len(known) and int(known[place]) == key
        yield ("references" if is_known else "others"), key, site, text
        if _LANGUAGE.fullmatch(language := _meta(document, "language")):
            yield f"pages-{language}", key, site, text


def _links(document: Mapping[str, Any]) -> NDArray[np.uint64]:
    links = (document.get("meta") or {}).get("references") or []
    return np.array([_hash(address(link)) for link in links], np.uint64)


def _meta(document: Mapping[str, Any], name: str) -> str:
    value = (document.get("meta") or {}).get(name)
    return value if isinstance(value, str) else ""


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
