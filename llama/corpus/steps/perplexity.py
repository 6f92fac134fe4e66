"""Step `grade`: how much a document reads like its language's Wikipedia (paper §2.1, CCNet).

In: documents with a `language`, and a folder of models: those of train_models, or CCNet's. Out: in
`meta` the `perplexity`, 10^(-log10 p / (pieces + 1)), and the `bucket`: head, middle or tail of the
crawl whose percentiles the cut-offs are, or all, where the language has no model.

Drop reasons: the name of the bucket, when it is not one of those that stay.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llama import files
from llama.cli import UserError, as_user_error, needed
from llama.corpus import guard
from llama.corpus.document import Document, Item
from llama.corpus.models.kneser_ney import KneserNey
from llama.corpus.models.pieces import Pieces

BUCKETS = ("head", "middle", "tail", "all")
# Where the head ends and where the middle does, in hundredths of a crawl (CCNet).
PERCENTILES = {"head": 30, "middle": 60}
# Where a model's files are: pieces and n-grams of train_models, then CCNet's.
_FILES = (("lm", ".model"), ("lm", ".npy"), ("", ".sp.model"), ("", ".arpa.bin"))

Cutoffs = Mapping[str, float]


def check(models: str, keep: Sequence[str], languages: Sequence[str] = ()) -> None:
    """Raise `UserError` for options or models that cannot serve; loads those of the languages.

    No languages stand for all that there are models of. One without a model is no error.
    """
    if unknown := sorted(set(keep) - set(BUCKETS)):
        raise UserError(f"keep names {unknown[0]!r}, expected some of {', '.join(BUCKETS)}")
    if not (there := _languages(models)):
        raise UserError(f"models {models} holds no language model (lm/en.model or en.sp.model)")
    _limits(models)
    for language in there:
        if not languages or language in languages:
            if (arpa := Path(models, f"{language}.arpa.bin")).exists():
                guard.tried(partial(scorer, models), language, arpa)
            scorer(models, language)


def grade(documents: Iterator[Document], models: str, keep: Sequence[str]) -> Iterator[Item]:
    """Mark documents with perplexity and bucket; those of some buckets stay, or all if no name."""
    limits = _limits(models)
    for document in documents:
        language = str(document.meta.get("language", ""))
        score = scorer(models, language)
        meta: dict[str, Any] = {"bucket": "all"}
        if score:
            perplexity = score(document.text)
            meta = {"perplexity": perplexity, "bucket": bucket(perplexity, limits.get(language))}
        if keep and meta["bucket"] not in keep:
            detail = f"perplexity {meta.get('perplexity', 'unknown')} in {language}"
            yield document.dropped(meta["bucket"], detail=detail)
        else:
            yield document._replace(meta={**document.meta, **meta})


def bucket(perplexity: float, cutoff: Cutoffs | None) -> str:
    """The part of the crawl that a document falls into."""
    if cutoff is None:
        return "all"
    return next((name for name in PERCENTILES if perplexity < cutoff[name]), "tail")


def cutoffs(perplexities: Sequence[float]) -> dict[str, float]:
    """The cut-offs of a language, from the perplexities of a sample of its crawl."""
    values = np.percentile(np.array(perplexities), list(PERCENTILES.values()))
    return {name: round(float(value), 1) for name, value in zip(PERCENTILES, values, strict=True)}


@cache
def scorer(models: str, language: str) -> Callable[[str], float] | None:
    """What gives a text its perplexity, to a tenth; None without models of the language."""
    if language not in _languages(models):
        return None
    ours, ngrams, ccnets, arpa = (Path(models, d, f"{language}{suffix}") for d, suffix in _FILES)
    if not ours.exists() and not ngrams.exists():
        return _ccnet(ccnets, arpa)
    pieces, model = Pieces(ours), KneserNey.load(ngrams)
    if model.n_pieces != len(pieces):
        raise UserError(f"{ngrams} is of {model.n_pieces} pieces, {ours} has {len(pieces)}")
    return lambda text: round(model.perplexity(pieces.encode(text)), 1)


def _ccnet(path: Path, arpa: Path) -> Callable[[str], float]:
    """A language of CCNet's, through its own library."""
    # imported here: an extra that must be compiled
    kenlm = needed("kenlm", str(arpa), "kenlm")
    pieces = Pieces(path)
    with as_user_error(f"{arpa} cannot be loaded", OSError, RuntimeError, ValueError):
        model = kenlm.Model(str(arpa))

    def perplexity(text: str) -> float:
        words = pieces.encode(text, str)
        return round(10 ** min(-model.score(" ".join(words)) / (len(words) + 1), 300.0), 1)

    return perplexity


def _languages(models: str) -> list[str]:
    """The languages of which a folder has at least one of the two files."""
    found: set[str] = set()
    for folder, suffix in _FILES:
        paths = Path(models, folder).glob(f"[!.]*{suffix}")
        found |= {path.name.removesuffix(suffix) for path in paths}
    return sorted(found)


@cache
def _limits(models: str) -> dict[str, Cutoffs]:
    """The cut-offs of the languages."""
    path = Path(models, "cutoffs.json")
    what, kinds = f"{path} holds no cut-offs by language", (KeyError, TypeError, ValueError)
    with as_user_error(what, *kinds, AttributeError, show=repr):
        return {
            language: {name: float(cutoffs[name]) for name in PERCENTILES}
            for language, cutoffs in files.read_json(path).items()
        }
