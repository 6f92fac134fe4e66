"""What flows through a recipe: documents, and what is said about those that end on the way.

A reader yields, and a step passes on or makes, three things: a `Document`; a `Dropped`, which says
why a document ends here; a `Noted`, a count worth reporting. A step is a generator function from
documents to these, and it is given the documents of one input in order, some at a time: what it
makes of a document must not depend on its neighbours, or errors could not be held to the document
they happen on.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

SAMPLE_CHARS = 1000


class Dropped(NamedTuple):
    """A document that ends here; one with an `error`, its own fault, goes to the quarantine.

    `detail` says more than the reason in the list of what was dropped.
    """

    id: str
    reason: str
    n_bytes: int = 0
    error: str = ""
    detail: str = ""


class Document(NamedTuple):
    """One text. `id` tells its place in the input and is the same in every run; `meta` is JSON."""

    id: str
    text: str
    source: str
    meta: dict[str, Any]

    @property
    def n_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        if self.text.isascii():
            return len(self.text)
        return len(self.text.encode("utf-8", "surrogatepass"))

    def dropped(self, reason: str, error: str = "", detail: str = "") -> Dropped:
        """What a step yields in place of this document to end it."""
        return Dropped(self.id, reason, self.n_bytes, error, detail)


class Noted(NamedTuple):
    """Something that happened and is counted under its name, such as lines that were removed."""

    name: str
    times: int = 1


Item = Document | Dropped | Noted
Step = Callable[[Iterator[Document]], Iterator[Item]]


class Passed(NamedTuple):
    """How much of a batch a step has passed on."""

    step: str
    documents: int
    n_bytes: int


class Ended(NamedTuple):
    """A document that a step has dropped, and the beginning of the text that was read."""

    dropped: Dropped
    step: str
    sample: str


def apply(steps: Sequence[Step], documents: Sequence[Document]) -> list[Item]:
    """Documents through every step; one that makes a step raise is dropped alone."""
    items = (item.dropped if isinstance(item, Ended) else item for item in trace(steps, documents))
    return [item for item in items if not isinstance(item, Passed)]


def trace(
    steps: Sequence[Step], documents: Sequence[Document]
) -> list[Document | Noted | Ended | Passed]:
    """`apply`, with what is known of each step; they are numbered from 1."""
    name, given = "", documents
    aside: list[Noted | Ended | Passed] = []
    samples = {document.id: document.text[:SAMPLE_CHARS] for document in documents}
    try:
        for number, step in enumerate(steps, 1):
            name, passed = f"{number} {step_name(step)}", []
            for item in step(iter(given)):
                if isinstance(item, Document):
                    passed.append(item)
                elif isinstance(item, Dropped):
                    aside.append(Ended(item, name, samples.get(item.id, "")))
                else:
                    aside.append(item)
            given = passed
            aside.append(Passed(name, len(passed), sum(d.n_bytes for d in passed)))
    except Exception as error:
        if len(documents) == 1:
            dropped = documents[0].dropped("exception", describe(error))
            before = [item for item in aside if isinstance(item, Passed)]
            return [*before, Ended(dropped, name, samples[dropped.id])]
        return [item for document in documents for item in trace(steps, [document])]
    return [*given, *aside]


def step_name(step: Any) -> str:
    """What a step is called in counts: its name, or that of its function or class."""
    step = getattr(step, "func", step)
    return str(getattr(step, "__name__", None) or getattr(step, "name", type(step).__name__))


def describe(error: BaseException) -> str:
    """One line for a quarantine list: kind, message and the line of code that raised."""
    message = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{place}"
