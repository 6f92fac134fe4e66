"""Step `judge`: whether a page is like those that Wikipedia refers to (paper §2.1).

By the classifier that `train_models` makes. Out: in `meta` the `reference_score`, 0 to 1; a page
without words has one half, since nothing is known of it. Drop reason: `not_reference`.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llama.cli import UserError, expect
from llama.corpus.document import Document, Item
from llama.corpus.models.linear import Linear

FILE, LABEL = "references.npz", "references"
# RedPajama's; the paper gives none.
THRESHOLD = 0.25


def check(models: str, min_score: float) -> None:
    """Raise `UserError` for a threshold or a classifier that cannot serve; loads the classifier."""
    expect(0 <= min_score <= 1, f"min_reference_score is {min_score}", "0 to 1")
    if min_score:
        classifier(models)


def judge(documents: Iterator[Document], models: str, min_score: float) -> Iterator[Item]:
    """Mark pages with their score; those with less than `min_score` end here."""
    model = classifier(models)
    for document in documents:
        score = round(model.probability(document.text, LABEL), 3)
        if score < min_score:
            yield document.dropped("not_reference")
        else:
            yield document._replace(meta={**document.meta, "reference_score": score})


@cache
def classifier(models: str) -> Linear:
    """The one in a folder of models."""
    path = Path(models) / FILE
    if not path.is_file():
        raise UserError(f"{path} is no file: min_reference_score 0 does without")
    model = Linear.load(path)
    if LABEL not in model.labels:
        raise UserError(f"{path} tells {', '.join(model.labels)}, not {LABEL}")
    return model
