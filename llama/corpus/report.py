"""`python -m llama.corpus report`: what a run has made of its raw text, and of what it is made.

In: the --output of `run`, `dedup` or `all`. Out: one page with its PNGs beside it, and in the
folder bill_of_materials.json: inputs with hashes, licences, languages, versions and counts of every
source. The counts are those of the run; languages, licences and tokens are counted in the documents
that are left, or in so much of each source as --read says. Sources stand beside Table 1 (§2.1).
"""

import platform
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from llama import cli, files, html
from llama.cli import needed, show_bytes, show_count
from llama.corpus import lineage
from llama.corpus.lineage import READING, Stage
from llama.html import Picture, soft, tag
from tokenizer.tokenizer import Tokenizer

BILL = "bill_of_materials.json"
TABLE_1 = files.read_yaml(Path(files.__file__).with_name("table_1.yaml"))
BYTES_PER_TOKEN = 4
LIBRARIES = "llama-pretraining numpy orjson zstandard pyarrow py7zr resiliparse py3langid datatrove"
SAMPLES, SAMPLE_CHARS, LISTED, INPUTS = 2, 500, 12, 3
# What steps/perplexity.py says of a document that it drops: its perplexity, and its language.
_PERPLEXITY = re.compile(r"perplexity ([\d.]+) in (\S+)")
# Buckets of perplexity that end at a cut-off.
CUT_OFFS = {"head": "--", "middle": ":"}
Entry = dict[str, Any]


class Look(NamedTuple):
    """(language, perplexity, bucket) of what was read, and samples: (id, text) by what became of
    the document."""

    perplexities: list[tuple[str, float, str]]
    samples: dict[str, list[tuple[str, str]]]


def main(argv: Sequence[str]) -> None:
    """Read the run, then write the pictures, the bill and the page."""
    p = cli.parser("python -m llama.corpus report", "One page about clean documents.")
    p.add_argument("clean", type=str, help="Folder that run, dedup or all has written.")
    p.add_argument("-o", "--output", default="report.html", help="The page; PNGs go beside it.")
    p.add_argument("--tokenizer", default="", help="Model file, to count tokens with.")
    p.add_argument("--read", type=cli.count, default="256M", help="Bytes read of each source.")
    a = p.parse_args(list(argv))
    clean, output = Path(a.clean), Path(a.output)
    html.check_output(output)
    found = lineage.sources(clean)
    with cli.as_user_error("--tokenizer", ValueError):
        model = Path(a.tokenizer, "tokenizer.model")
        tokenizer = Tokenizer(model if model.is_file() else a.tokenizer) if a.tokenizer else None
    entries, looks = {}, {}
    for name, stages in found.items():
        entries[name], looks[name] = look(stages, tokenizer, a.read)
    versions = {d.name: d.version for d in metadata.distributions() if d.name in LIBRARIES.split()}
    versions = {"python": platform.python_version()} | dict(sorted(versions.items()))
    bill = {"tokenizer": tokenizer and tokenizer.sha256, "versions": versions, "sources": entries}
    pictures = _draw(entries, [each for look in looks.values() for each in look.perplexities])
    text = page(clean, bill, looks, pictures)
    with cli.as_user_error(f"{output} and what belongs to it cannot be written", OSError):
        for name, picture in pictures.items():
            files.write_atomic(output.with_name(f"{output.stem}-{name}.png"), picture.png)
        files.write_json(clean / BILL, bill)
        files.write_atomic(output, text)
    print(f"wrote {output}, its PNGs beside it, and {clean / BILL}")


def look(stages: Sequence[Stage], tokenizer: Tokenizer | None, n_bytes: int) -> tuple[Entry, Look]:
    """A source in the bill, and what only the page shows."""
    first, last, found = stages[0], stages[-1], Look([], {"kept": []})
    steps: list[Entry] = []
    clusters: dict[str, Entry] = {}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for stage in stages:
        ended, copies = (defaultdict[str, Counter[str]](Counter) for _ in range(2))
        samples = defaultdict[str, list[tuple[str, str]]](list)
        for line in stage.ended():
            reason, detail = line["reason"], line.get("detail", "")
            ended[line["step"] or READING][reason] += 1
            if is_duplicate(reason) and detail:
                copies[reason][detail] += 1
            if graded := _PERPLEXITY.fullmatch(detail):
                found.perplexities.append((graded[2], float(graded[1]), reason))
            text = line.get("error") or line.get("sample")
            if text and len(samples[reason]) < SAMPLES:
                samples[reason].append((line["id"], text))
        found.samples.update(samples)
        for reason, each in copies.items():
            # with the one that stays
            clusters[reason] = {"clusters": len(each), "largest": 1 + max(each.values())}
        total = stage.total
        rows = [(READING, total["documents"]["in"], total["bytes"]["in"])] * (stage is first)
        rows += [(s, total["steps"][s], total["step_bytes"][s]) for s in stage.steps]
        for step, documents, size in rows:
            line = {"step": f"{stage.name}: {step}", "documents": documents, "bytes": size}
            steps.append(line | {"ended": dict(ended[step].most_common())})
        for group in ("dropped", "dropped_bytes", "quarantined", "noted"):
            counts[group].update(total[group])
    chosen: list[tuple[int, str, str]] = []
    for document in map(orjson.loads, lineage.spread(last.shards, n_bytes)):
        text, meta = document["text"], document["meta"]
        language = str(meta.get("language") or "not said")
        licence = str(meta.get("licence") or meta.get("license") or "not said")
        # with the two ids that begin and end it
        tokens = len(tokenizer.encode_array(text)) + 2 if tokenizer else 0
        counts["read"].update(documents=1, bytes=len(text.encode()), tokens=tokens)
        counts["languages"][language] += 1
        counts["licences"][licence] += 1
        if isinstance(meta.get("perplexity"), float):
            found.perplexities.append((language, meta["perplexity"], meta.get("bucket", "")))
        # the same ones every time, from anywhere
        order = zlib.crc32(document["id"].encode())
        chosen = sorted([*chosen, (order, document["id"], text)])[:SAMPLES]
    found.samples["kept"] += [(id, text) for _, id, text in chosen]
    read, out = counts["read"], last.total["bytes"].get("out", 0)
    rate = read["tokens"] / max(read["bytes"], 1) if tokenizer else 1 / BYTES_PER_TOKEN
    entry: Entry = {key: first.stats[key] for key in ("recipe", "plan", "options", "left_out")}
    entry["documents"] = first.total["documents"] | {"out": last.total["documents"].get("out", 0)}
    entry["bytes"] = first.total["bytes"] | {"out": out}
    entry |= {name: dict(counter.most_common()) for name, counter in counts.items()}
    entry |= {"tokens": round(out * rate), "steps": steps, "clusters": clusters}
    entry |= {"inputs": first.inputs(), "outputs": last.stats["outputs"]}
    return entry, found


def is_duplicate(reason: str) -> bool:
    return "duplicate" in reason or reason == "contained"


def _draw(entries: Mapping[str, Entry], perplexities: Sequence[Any]) -> dict[str, Picture]:
    """Shares of the tokens beside the paper's, and perplexities where they are known."""
    # imported here: an extra, and only for pictures
    Figure = needed("matplotlib.figure", "drawing", "'llama-pretraining[report]'").Figure
    shares = _shares(entries)[::-1]
    names, places = [name for name, *_ in shares], range(len(shares))
    figure = Figure((11, 1 + 0.4 * len(names)), layout="constrained")
    for share, height, label, color in ((1, 0.4, "here", "#33658a"), (2, -0.4, "paper", "#b9c6d2")):
        widths = [line[share] for line in shares]
        figure.gca().barh(places, widths, height, align="edge", color=color, label=label)
    figure.gca().set(yticks=places, yticklabels=names, xlabel="share of tokens (%)")
    caption = "Text here, and what the paper trains on."
    drawn = {"shares": (figure, "Tokens and Table 1", caption)}
    if perplexities:
        figure = Figure((11, 3.5), layout="constrained")
        low, high = (f(p for _, p, _ in perplexities) for f in (min, max))
        bins = [low * (high / low) ** (i / 60) for i in range(61)] if high > low else 1
        common = Counter(language for language, *_ in perplexities).most_common(5)
        for color, (language, _) in zip(("C0", "C1", "C2", "C3", "C4"), common, strict=False):
            own = [(p, bucket) for name, p, bucket in perplexities if name == language]
            values = [p for p, _ in own]
            figure.gca().hist(values, bins, histtype="step", color=color, label=language)
            for end, dashes in CUT_OFFS.items():
                if inside := [p for p, bucket in own if bucket == end]:
                    figure.gca().axvline(max(inside), color=color, linestyle=dashes)
        figure.gca().set(xscale="log", xlabel="perplexity", ylabel="documents")
        figure.gca().xaxis.set_major_formatter("{x:g}")
        figure.gca().xaxis.set_minor_formatter("{x:g}")
        caption = "Of all that were graded. Dashed: where head ends; dotted: where middle ends."
        drawn["perplexity"] = figure, "Perplexity by language", caption
    pictures = {}
    for name, (figure, title, caption) in drawn.items():
        figure.gca().spines[["top", "right"]].set_visible(False)
        figure.gca().legend(frameon=False)
        pictures[name] = Picture.drawn(figure, title, caption)
    return pictures


def _shares(entries: Mapping[str, Entry]) -> list[tuple[str, float, float]]:
    """Per cent of the tokens here and in the paper, of the sources of either."""
    tokens = dict.fromkeys(TABLE_1, 0) | {name: entry["tokens"] for name, entry in entries.items()}
    total = sum(tokens.values()) or 1
    return [(s, 100 * n / total, 100 * TABLE_1.get(s, (0,))[0]) for s, n in tokens.items()]


# -- the page --------------------------------------------------------------------------------------


def page(
    clean: Path, bill: Entry, looks: Mapping[str, Look], pictures: Mapping[str, Picture]
) -> str:
    """The whole file."""
    entries: dict[str, Entry] = bill["sources"]
    parts: list[object] = [soft("Documents in ", tag("code", clean))]
    if begun := lineage.unfinished(clean):
        parts.append(tag("p", f"Not finished, and not counted here: {', '.join(begun)}."))
    header = "source, input files, on disk, documents, text, kept, text kept, quarantined"
    parts += _section("Sources", header, (_source(*each) for each in entries.items()))
    how = "counted" if bill["tokenizer"] else f"an estimate, {BYTES_PER_TOKEN} bytes each"
    header = "source, tokens, share, share in the paper, its epochs, its text"
    rows = (_tokens(entries, *line) for line in _shares(entries))
    parts += [*_section(pictures["shares"].title, header, rows), html.figure(pictures["shares"])]
    parts += [soft(f"Tokens are {how}. The paper's epochs are those of 1.4T tokens.")]
    parts += [tag("h2", "Steps"), soft("What reading has found, then what each step passes on.")]
    for name, entry in entries.items():
        lines = ((s["step"], s["documents"], s["bytes"], s["ended"]) for s in entry["steps"])
        rows = ((step, n, show_bytes(size), _listed(why)) for step, n, size, why in lines)
        parts += _section(name, "step, documents, text, ended here", rows, "h3")
        left = {why: found["files"] for why, found in entry["left_out"].items()}
        for what, counted in (("Files left out", left), ("Noted", entry["noted"])):
            parts += [soft(f"{what}: {_listed(counted)}")] * bool(counted)
    ended = ((n, e, reason) for n, e in entries.items() for reason in e["dropped"])
    rows = (
        (
            *(name, reason, e["dropped"][reason], show_bytes(e["dropped_bytes"][reason])),
            *(e["clusters"].get(reason, {}).get(key, "–") for key in ("clusters", "largest")),
        )
        for name, e, reason in ended
        if is_duplicate(reason)
    )
    header = "source, found as, documents, text, clusters, largest"
    parts += _section("Duplicates", header, rows)
    header = "source, documents looked at, languages, licences"
    rows = (
        (name, e["read"].get("documents", 0), _listed(e["languages"]), _listed(e["licences"]))
        for name, e in entries.items()
    )
    parts += _section("Languages and licences", header, rows)
    if picture := pictures.get("perplexity"):
        parts += [tag("h2", picture.title), html.figure(picture)]
    parts += [tag("h2", "Samples")]
    for name, found in looks.items():
        for what, samples in found.samples.items():
            parts += [tag("h3", f"{name}: {what}")]
            parts += [tag("pre", tag("i", id), "\n", text[:SAMPLE_CHARS]) for id, text in samples]
    rows = (
        (name, file, known.get("bytes", "–"), known["sha256"] or "not hashed")
        for name, e in entries.items()
        for file, known in list(e["inputs"].items())[:INPUTS]
    )
    parts += _section("Bill of materials", "source, input, bytes, sha256", rows)
    note = f"The first {INPUTS} of each source, as the run has read them; all of them, "
    note += f"options and outputs are in {BILL}. "
    return html.page("Corpus", *parts, soft(note, f"Page by {_listed(bill['versions'])}."))


def _section(title: str, header: str, rows: Iterable[Sequence[object]], level: str = "h2") -> Any:
    lines = list(rows)
    return tag(level, title), html.table(header.split(", "), lines) if lines else tag("p", "None.")


def _listed(values: Mapping[str, object]) -> str:
    """The first of them, with their numbers."""
    told = [f"{name} {n:,}" if isinstance(n, int) else f"{name} {n}" for name, n in values.items()]
    return ", ".join(told[:LISTED] + [f"{len(told) - LISTED:,} more"] * (len(told) > LISTED))


def _source(name: str, e: Entry) -> Sequence[object]:
    size = sum(found.get("bytes", 0) for found in e["inputs"].values())
    read, left = ((e["documents"][way], show_bytes(e["bytes"][way])) for way in ("in", "out"))
    return name, len(e["inputs"]), show_bytes(size), *read, *left, sum(e["quarantined"].values())


def _tokens(entries: Mapping[str, Entry], name: str, *shares: float) -> Sequence[object]:
    tokens = show_count(entries[name]["tokens"]) if name in entries else "–"
    _, epochs, text = TABLE_1.get(name, (0, 0, ""))
    paper = (f"{epochs:.2f}", text) if text else ("–", "–")
    return name, tokens, *(f"{s:.1f} %" if s else "–" for s in shares), *paper
