"""Step `identify`: the language of a document, told from its beginning (paper §2.1, CCNet).

By py3langid, which brings its model, by language.npz, which `train_models` makes, or by a fastText
model of the user's, such as lid.176. Out: in `meta` the `language` and its `language_score`, 0 to
1.

Drop reasons: `language` (not one of those wanted), `language_unsure` (a low score), in this order.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from llama.cli import UserError, as_user_error, expect, needed
from llama.corpus import guard
from llama.corpus.document import Document, Item
from llama.corpus.models.linear import Linear

# More tells no more: whole documents of 2,500 characters are identified without a mistake.
HEAD_CHARS = 2000
OURS = ".npz"


def check(languages: Sequence[str], min_score: float, model: str) -> None:
    """Raise `UserError` for options, a tool or a model that cannot serve; loads the model."""
    expect(0 <= min_score <= 1, f"min_language_score is {min_score}", "0 to 1")
    ours = model.endswith(OURS)
    module, package = ("fasttext", "fasttext-predict") if model else ("py3langid", "py3langid")
    if not ours:
        needed(module, "identifying languages", package)
    if model and not Path(model).is_file():
        raise UserError(f"language_model {model} is no file")
    if model and not ours:
        guard.tried(identifier, model, model)
    with as_user_error(f"language_model {model} cannot be loaded", Exception):
        known = identifier(model)[1]
    if unknown := sorted(set(languages) - known):
        name = model if ours else module
        raise UserError(f"languages names {', '.join(unknown)}, which {name} does not know")


def identify(
    documents: Iterator[Document], languages: Sequence[str], min_score: float, model: str
) -> Iterator[Item]:
    """Mark documents with their language; only some languages stay, or all if none is given."""
    predict, _ = identifier(model)
    for document in documents:
        language, score = predict(document.text[:HEAD_CHARS])
        if languages and language not in languages:
            yield document.dropped("language")
        elif score < min_score:
            yield document.dropped("language_unsure")
        else:
            meta = {"language": language, "language_score": round(score, 3)}
            yield document._replace(meta={**document.meta, **meta})


@cache
def identifier(model: str) -> tuple[Callable[[str], tuple[str, float]], frozenset[str]]:
    """(text -> language and score, languages that it knows); an empty path stands for py3langid."""
    if not model:
        # imported here: an extra, and slow to load
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        langid = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        return langid.classify, frozenset(langid.labels)
    if model.endswith(OURS):
        ours = Linear.load(model)
        return ours.predict, frozenset(ours.labels)
    import fasttext

    loaded = fasttext.load_model(model)
    prefix = "__label__"

    def predict(text: str) -> tuple[str, float]:
        # a line end is an error to it, and in nothing it finds nothing
        labels, scores = loaded.predict(" ".join(text.split()))
        return (labels[0].removeprefix(prefix), min(1.0, scores[0])) if labels else ("", 0.0)

    every, _ = loaded.predict("all labels", k=-1)
    return predict, frozenset(label.removeprefix(prefix) for label in every)
