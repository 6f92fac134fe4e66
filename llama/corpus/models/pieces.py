"""Pieces of a language: text as CCNet normalises it, cut by a SentencePiece model (paper §2.1).

In: texts of one language. Out: a unigram model of its pieces, and with it the piece ids of any text
of any length. The rules are CCNet's, in which a document becomes one line; of its faults two are
mended: a line's end separates words, and a fullwidth 1 is a digit.
"""

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llama import files
from llama.cli import as_user_error

# CCNet's vocabulary.
MAX_PIECES = 65_536
# A piece for so many characters at most: in 1 MB of text 65,536 would hardly occur twice each.
CHARS_PER_PIECE = 100
MAX_CHARS = 50_000_000
# Longest text that is cut into pieces at once: time is linear then, and memory bounded.
RUN_CHARS = 1 << 16
# What the trainer takes as one sentence; a longer one would be left out.
SENTENCE_CHARS = 1000
_TABLES = files.read_yaml(Path(__file__).with_suffix(".yaml"))
_FIXED, _PUNCTUATION = _TABLES["trainer"], _TABLES["punctuation"]


class _Rules(dict[int, str | None]):
    """What becomes of a character; filled as they occur."""

    def __missing__(self, code: int) -> str | None:
        char = chr(code)
        kind = unicodedata.category(char)
        self[code] = _PUNCTUATION.get(char, char)
        if kind == "Nd":
            self[code] = "0"
        elif kind == "Cs" or char.isspace():
            self[code] = " "
        elif kind in ("Mn", "Cc"):
            self[code] = None
        return self[code]


_rules = _Rules()


def normalise(text: str) -> str:
    """One line in lower case without accents and control characters, every digit 0."""
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFD", text)
    return text.translate(_rules).strip()


def train(
    texts: Iterable[str], path: str | Path, max_pieces: int = MAX_PIECES, max_chars: int = MAX_CHARS
) -> dict[str, int]:
    """Write a model of the pieces of the texts, read until there are `max_chars` of them.

    How many pieces it has depends on how long the texts are, and how many they can give. Returns
    the numbers of pieces, documents and characters.
    """
    sentences: list[str] = []
    counts, read = Counter[str](), Counter[str]()
    for text in texts:
        line = normalise(text)
        sentences += _runs(line, SENTENCE_CHARS)
        counts.update(line)
        read.update(documents=1, characters=len(line))
        if read["characters"] >= max_chars:
            break
    covered = np.cumsum(sorted(counts.values(), reverse=True))
    # <unk>, <s>, </s>, the space, one to spare, and every character that is covered
    least = 6 + int(np.searchsorted(covered, read["characters"] * _FIXED["character_coverage"]))
    wanted = min(max_pieces, max(least, read["characters"] // CHARS_PER_PIECE))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=wanted,
        max_sentence_length=8 * SENTENCE_CHARS,
        **_FIXED,
    )
    files.write_atomic(path, model.getvalue())
    return {"pieces": len(Pieces(path)), **read}


class Pieces:
    """A model of pieces; `UserError` names a file that is missing or none."""

    def __init__(self, path: str | Path) -> None:
        what = f"{path} cannot be read as a SentencePiece model"
        with as_user_error(what, OSError, RuntimeError):
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def __len__(self) -> int:
        return len(self._processor)

    def encode(self, text: str, kind: type = int) -> list[Any]:
        """Ids of the pieces of a text; as `str` themselves, an unknown one as it stands."""
        runs = _runs(normalise(text), RUN_CHARS)
        return [piece for run in runs for piece in self._processor.encode(run, out_type=kind)]


def _runs(line: str, most: int) -> Iterator[str]:
    """Parts of a line of at most so many characters, cut at a space where there is one."""
    begin = 0
    while begin < len(line):
        end = begin + most
        if end < len(line):
            end = max(line.rfind(" ", begin + 1, end), 0) or end
        yield line[begin:end]
        begin = end
