"""What flows through a recipe: documents, and what is said about those that end on the way.

A reader yields, and a step passes on or makes, three things: a `Document`; a `Dropped`, which says
why a document ends here; a `Noted`, a count worth reporting. A step is a generator function from
documents to these, and it is given the documents of one input in order, some at a time: what it
makes of a document must not depend on its neighbours, or errors could not be held to the document
they happen on.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple


class Dropped(NamedTuple):
    """A document that ends here; one with an `error`, its own fault, goes to the quarantine."""

    id: str
    reason: str
    n_bytes: int = 0
    error: str = ""


class Document(NamedTuple):
    """One text. `id` tells its place in the input and is the same in every run; `meta` is JSON."""

    id: str
    text: str
    source: str
    meta: dict[str, Any]

    @property
    def n_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode("utf-8", "surrogatepass"))

    def dropped(self, reason: str, error: str = "") -> Dropped:
        """What a step yields in place of this document to end it."""
        return Dropped(self.id, reason, self.n_bytes, error)


class Noted(NamedTuple):
    """Something that happened and is counted under its name, such as a guessed encoding."""

    name: str


Item = Document | Dropped | Noted
Step = Callable[[Iterator[Document]], Iterator[Item]]


def apply(steps: Sequence[Step], documents: Sequence[Document]) -> list[Item]:
    """Documents through every step; one that makes a step raise is dropped alone."""
    try:
        return list(_chain(steps, documents))
    except Exception as error:
        if len(documents) == 1:
            return [documents[0].dropped("exception", describe(error))]
        return [item for document in documents for item in apply(steps, [document])]


def _chain(steps: Sequence[Step], documents: Iterable[Document]) -> Iterator[Item]:
    """Steps in turn; what one drops or notes goes around those that follow."""
    aside: list[Item] = []

    def only_documents(items: Iterable[Item]) -> Iterator[Document]:
        for item in items:
            if isinstance(item, Document):
                yield item
            else:
                aside.append(item)

    items: Iterable[Item] = documents
    for step in steps:
        items = step(only_documents(items))
    yield from items
    yield from aside


def describe(error: BaseException) -> str:
    """One line for a quarantine list: kind, message and the line of code that raised."""
    message = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{place}"
