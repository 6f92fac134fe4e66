"""Recipe `quality`: pages of a clean crawl, graded and sieved by models (paper §2.1, CCNet).

In: documents that the recipe commoncrawl has made. Out: the same, in `meta` their `perplexity`, its
`bucket` (head, middle, tail; all where their language has no model) and `reference_score`, without
those of other buckets than wanted and those that are not like pages that Wikipedia refers to. The
recipe commoncrawl does the same at its end when it is given models.

Drop reasons: `tail`, `middle`, `head`, `all` (the bucket), `not_reference`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from llama import files
from llama.cli import expect
from llama.config import Count
from llama.corpus.document import Document, Item
from llama.corpus.plan import Piece, Plan, find, group
from llama.corpus.steps import perplexity, references


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        models: Folder that train_models has made, or one of CCNet's models.
        buckets: Those that stay; an empty list keeps all.
        min_reference_score: Pages with less are dropped; 0 does without the classifier.
        unit_bytes: Input that becomes one output shard.
    """

    source: str = ""
    models: str = ""
    buckets: list[str] = field(default_factory=lambda: ["head", "middle", "all"])
    min_reference_score: float = references.THRESHOLD
    unit_bytes: Count = Count(1_000_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """Lay out the files of documents."""
    check(options)
    pieces, left_out = find(inputs, _format_of)
    units, known = group(pieces, options.unit_bytes), identity(options)
    return Plan("quality", known, partial(read, options), units, tuple(left_out))


def _format_of(name: str) -> str | None:
    """A run keeps other files beside its documents."""
    is_document = name.endswith(files.DOCUMENT_SUFFIXES)
    return "documents" if is_document and Path(name).name not in files.NO_DOCUMENTS else None


def check(options: Any, languages: Sequence[str] = ()) -> None:
    """Raise `UserError` for models or thresholds that cannot serve."""
    expect(options.models, "models is empty", "the folder that train_models has made")
    models = Path(options.models)
    # what was trained may have been too little for any language
    if (models / "lm").exists() or not (models / "models.json").exists():
        perplexity.check(options.models, options.buckets, languages)
    references.check(options.models, options.min_reference_score)


def identity(options: Any) -> dict[str, Any]:
    """The options, with what the models are in place of where they are."""
    told = asdict(options)
    if options.models:
        made = Path(options.models) / "models.json"
        found = [made] if made.is_file() else sorted(Path(options.models).rglob("*.*"))
        sums = "".join(f"{path.name} {files.sha256(path)}\n" for path in found)
        told["models"] = sha256(sums.encode()).hexdigest()[:16]
    return told


def steps(options: Any) -> list[Any]:
    """Perplexity, then the classifier."""
    grade = partial(perplexity.grade, models=options.models, keep=options.buckets)
    if not options.min_reference_score:
        return [grade]
    least = options.min_reference_score
    return [grade, partial(references.judge, models=options.models, min_score=least)]


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Documents of one file."""
    for line in files.read_documents(piece.path):
        yield Document(line["id"], line["text"], options.source, line.get("meta") or {})
