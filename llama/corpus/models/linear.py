"""A linear classifier of text: hashed n-grams, multinomial logistic regression (paper §2.1).

In: texts with labels. Out: for a text, how probable each label is. With n-grams of characters it
tells languages, with words and pairs of words the pages that Wikipedia refers to. An n-gram is
known by the bucket of its hash; the score of a label is the sum of its weights over the n-grams,
divided by the square root of their number, so that a short text is less sure than a long one.
Weights are whole numbers: their sums are exact, whatever the order in which a machine adds them up.
"""

import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama.cli import as_user_error
from llama.files import atomic_file

Codes = NDArray[np.uint32]
Buckets = NDArray[np.uint32]
Floats = NDArray[np.float32]

BUCKET_BITS = 18
# Longest run of characters that is one n-gram.
ORDER = 4
# What is read of a text: more tells no more, and sums of whole weights stay exact in float32.
HEAD_CHARS = {"characters": 2000, "words": 10_000}
MAX_WEIGHT = 1000
# A letter is known when it makes up this share of the letters of some label.
KNOWN_SHARE = 1e-5
BATCH_TEXTS, RATE = 64, 0.3
_SPACE = 32
_LAST_LETTER = 0x2FFFF
_STEP, _SPREAD = np.uint32(0x01000193), np.uint32(0x9E3779B1)
_LONG_STEP = np.uint64(0xD1342543DE82EF95)
_POWERS = np.cumprod(np.full(HEAD_CHARS["words"] + 2, _LONG_STEP), dtype=np.uint64)


@dataclass(frozen=True)
class Linear:
    """A trained classifier.

    Args:
        kind: What its n-grams are of: characters or words.
        labels: In the order of the columns.
        weights: (buckets, labels), whole numbers.
        unit: What a weight of 1 stands for.
        alphabet: Code points of the letters that were seen in training.
    """

    kind: str
    labels: tuple[str, ...]
    weights: Floats
    unit: float
    alphabet: Codes

    def predict(self, text: str) -> tuple[str, float]:
        """The most probable label and how probable it is.

        Without words all are as probable. Of languages the probability is less by the share of
        letters that none of them has: what is written in those may be another, or no language.
        """
        found = codes(text, self.kind)
        probabilities = self._probabilities(FEATURES[self.kind](found))
        best = int(probabilities.argmax())
        known = 1.0
        if self.kind == "characters":
            letters = found[found != _SPACE]
            known = self._known[letters].mean() if len(letters) else 0.0
        return self.labels[best], float(probabilities[best] * known)

    def probability(self, text: str, label: str) -> float:
        """Of one label."""
        found = FEATURES[self.kind](codes(text, self.kind))
        return float(self._probabilities(found)[self.labels.index(label)])

    def _probabilities(self, buckets: Buckets) -> NDArray[np.float64]:
        logits = np.einsum("ij->j", self.weights.take(buckets, axis=0)).astype(np.float64)
        logits *= self.unit / np.sqrt(max(1, len(buckets)))
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()

    @cached_property
    def _known(self) -> NDArray[np.bool_]:
        known = np.zeros(0x110000, bool)
        known[self.alphabet] = True
        return known

    def save(self, path: str | Path) -> None:
        """Write it; the same classifier makes the same bytes."""
        found: dict[str, Any] = {f.name: np.array(getattr(self, f.name)) for f in fields(self)}
        found["weights"] = self.weights.astype(np.int16)
        with atomic_file(path) as file:
            np.savez(file, **found)

    @staticmethod
    def load(path: str | Path) -> "Linear":
        """Read what `save` wrote; raises `UserError` naming a file that is none of those."""
        kinds = OSError, LookupError, ValueError, EOFError, zipfile.BadZipFile
        what = f"{path} is no classifier of train_models"
        with as_user_error(what, *kinds), np.load(path, allow_pickle=False) as found:
            weights, labels = found["weights"].astype(np.float32), tuple(map(str, found["labels"]))
            kind, unit = str(found["kind"]), float(found["unit"])
            model = Linear(kind, labels, weights, unit, found["alphabet"])
            if kind not in FEATURES or weights.shape != (1 << BUCKET_BITS, len(labels)):
                raise ValueError(f"{kind} with weights of shape {weights.shape}")
            if not np.isfinite(unit) or model._known.any() != (kind == "characters"):
                raise ValueError(f"its unit is {unit}, its alphabet {len(model.alphabet)}")
        return model


def codes(text: str, kind: str) -> Codes:
    """Code points of the beginning in lower case; a run of others than letters is one space."""
    length = HEAD_CHARS[kind]
    head = f" {text[:length].lower()[:length]} "
    found = np.frombuffer(head.encode("utf-32-le", "surrogatepass"), np.uint32)
    keep = _letters(kind)[np.minimum(found, _LAST_LETTER)]
    found = np.where(keep, found, np.uint32(_SPACE))
    # the space before each word, and one behind the last
    keep[:-1] |= keep[1:]
    keep[-1] = True
    return found[keep]


@cache
def _letters(kind: str) -> NDArray[np.bool_]:
    """Which code points are letters, to words also which are digits."""
    wanted = "LMN" if kind == "words" else "LM"
    return np.array([unicodedata.category(chr(i))[0] in wanted for i in range(_LAST_LETTER + 1)])


def _characters(found: Codes) -> Buckets:
    """Buckets of all runs of up to `ORDER` characters, within words and across their ends."""
    if len(found) < 2:
        return found[:0]
    hashes = [found * _STEP]
    for order in range(1, min(ORDER, len(found))):
        hashes.append((hashes[-1][:-1] ^ found[order:]) * _STEP)
    return (np.concatenate(hashes) * _SPREAD) >> np.uint32(32 - BUCKET_BITS)


def _words(found: Codes) -> Buckets:
    """Buckets of all words and pairs of words."""
    spaces = np.flatnonzero(found == _SPACE)
    place = np.arange(len(found)) - np.repeat(spaces, np.diff(spaces, append=len(found)))
    words = np.add.reduceat(found * _POWERS[place], spaces)[:-1]
    hashes = np.concatenate([words, (words[:-1] * _LONG_STEP) ^ words[1:]]) * _LONG_STEP
    return (hashes >> np.uint64(64 - BUCKET_BITS)).astype(np.uint32)


FEATURES: dict[str, Callable[[Codes], Buckets]] = {"characters": _characters, "words": _words}


def fit(texts: Sequence[str], labels: Sequence[str], kind: str, passes: int = 2) -> Linear:
    """Train on texts and their labels by AdaGrad, some texts at a time, in a random order."""
    names = tuple(sorted(set(labels)))
    column = {name: i for i, name in enumerate(names)}
    truth = np.array([column[label] for label in labels])
    weights = np.zeros((1 << BUCKET_BITS, len(names)), np.float32)
    squares = np.full_like(weights, 1e-8)
    rng = np.random.default_rng(0)
    for _ in range(passes):
        order = rng.permutation(len(texts))
        for begin in range(0, len(order), BATCH_TEXTS):
            batch = order[begin : begin + BATCH_TEXTS]
            found = [FEATURES[kind](codes(texts[i], kind)) for i in batch.tolist()]
            _learn(weights, squares, found, truth[batch], RATE)
    unit = float(np.abs(weights).max() or 1) / MAX_WEIGHT
    alphabet = _alphabet(texts, truth) if kind == "characters" else np.empty(0, np.uint32)
    return Linear(kind, names, np.rint(weights / unit).astype(np.float32), unit, alphabet)


def _learn(
    weights: Floats, squares: Floats, found: Sequence[Buckets], truth: NDArray[Any], rate: float
) -> None:
    """One step of AdaGrad; no matrix products, whose rounding depends on the number of threads."""
    sizes = np.array([len(each) for each in found])
    found, truth, sizes = [f for f in found if len(f)], truth[sizes > 0], sizes[sizes > 0]
    if not found:
        return
    buckets = np.concatenate(found)
    share = (1 / np.sqrt(sizes)).astype(np.float32)[:, None]
    logits = np.stack([np.einsum("ij->j", weights.take(each, axis=0)) for each in found]) * share
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(truth)), truth] -= 1
    error *= share
    order = np.argsort(buckets, kind="stable")
    buckets, text = buckets[order], np.repeat(np.arange(len(found)), sizes)[order]
    first = np.flatnonzero(np.diff(buckets, prepend=np.uint32(0xFFFFFFFF)))
    slope = np.add.reduceat(error.take(text, axis=0), first)
    rows = buckets[first]
    squares[rows] += slope * slope
    weights[rows] -= rate * slope / np.sqrt(squares[rows])


def _alphabet(texts: Sequence[str], truth: NDArray[Any]) -> Codes:
    """Letters that are not rare in every label."""
    known = np.zeros(_LAST_LETTER + 1, bool)
    for label in range(truth.max() + 1):
        count = np.zeros(_LAST_LETTER + 1, np.int64)
        for i in np.flatnonzero(truth == label).tolist():
            count += np.bincount(codes(texts[i], "characters"), minlength=len(count))
        count[_SPACE] = 0
        known |= count > KNOWN_SHARE * count.sum()
    return np.flatnonzero(known).astype(np.uint32)
