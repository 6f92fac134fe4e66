"""How the time of the corpus's cleaners grows with input that is hard for them.

In: a cleaner. Out: of each input, repeated to 200 kB and to 800 kB, how many times as long the
second takes; 4 is linear.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any

from llama.corpus.document import Document
from llama.corpus.sources import books, stackexchange
from llama.corpus.steps import c4_rules, code, containment, latex, lines, personal, wikitext

Work = Callable[[Any], object]


def document(text: str) -> Document:
    return Document("id", text, "source", {"language": "Python"})


def cleaned(text: str) -> None:
    list(code.clean(iter([document(text)]), ["MIT"]))


def masked(text: str) -> None:
    list(personal.Personal()(iter([document(text)])))


# What a step does, and what it finds hard, between spaces: repeated to 200 kB and to 800 kB.
HOSTILE: dict[str, tuple[Work, str]] = {
    "wikitext": (wikitext.plain_text, "{{ <ref> [[ -{ {|\n '''a <!-- [http://a"),
    "LaTeX": (lambda text: latex.clean({"a.tex": text}, "a.tex"), "{ \\begin{a} $ %\n \\def\\a{"),
    "posts": (stackexchange.strip_tags, "< <a &amp; <!-- <pre> &"),
    "lines": (lines.line_keys, "a ١ a\n \n"),
    "C4 rules": (
        lambda text: c4_rules.clean(text, c4_rules.PRESETS["reference"], None),
        ". [1 Mr.",
    ),
    "code": (cleaned, "#copyright\n /* # \n <!--"),
    "books": (books.unframed, "***START\n END\n * \n"),
    "shingles": (containment.shingles, "a 字 a,"),
    "personal data": (masked, "1. a@ +1 (030) a. ::"),
}


def growth(name: str) -> tuple[float, str, float]:
    """The hardest input of a step: times as long for four times as much, itself, and seconds."""
    work, units = HOSTILE[name]
    found = []
    for unit in re.split(" +", units):
        inputs = [unit * (n * 200_000 // len(unit)) for n in (1, 4)]
        turns = [[timed(work, [text]) for text in inputs] for _ in range(3)]
        small, large = (min(times) for times in zip(*turns, strict=True))
        found.append((large / small, unit, large))
    return max(found)


def timed(work: Work, records: list[Any]) -> float:
    """Seconds of the processor, also those of child processes that have ended."""
    begin = time.process_time() + sum(os.times()[2:4])
    for record in records:
        work(record)
    return time.process_time() + sum(os.times()[2:4]) - begin
