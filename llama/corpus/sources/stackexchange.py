"""Recipe `stackexchange`: the data dump's questions with their answers, best first (paper §2.1).

In: SITE/Posts.xml [.gz | .zst], SITE.7z or SITE-Posts.7z as archive.org has them; of these the
`sites` with most text, 28 as in the paper. Out: a document per question, "Q: " before its title
and body, "A: " before every answer, HTML tags removed, code as it was; answers by score, equal ones
in the order of their ids. A site is joined out of core: posts are spooled to files by question, and
one such file is in memory at a time.

Drop reasons: `post_type` (tag wikis and the like), `answer_without_question`, `no_body`,
`duplicate`. Quarantined: `xml` (a row that is not closed or has no id), `too_large`.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from llama.cli import CORPUS_EXTRA, expect, needed
from llama.config import Count
from llama.corpus import raw
from llama.corpus.document import Document, Dropped, Item, Step
from llama.corpus.plan import LeftOut, Piece, Plan, Unit, find
from llama.corpus.steps import text

# Bytes of XML whose posts are joined in memory at once, and most files for the others.
SPOOL_BYTES, MAX_SPOOLS = 1 << 28, 512
_QUESTION, _ANSWER = 1, 2
# Quotes cannot be within a value; possessive, so that nothing is ever tried twice.
_ROW = re.compile(r"""<row\b((?:[^<>"']++|"[^"]*+"|'[^']*+')*+)>""")
_ATTRIBUTE = re.compile(r"""\b(\w++)\s*+=\s*+(?:"([^"]*)"|'([^']*)')""")
# What may follow "<" in a tag; anything else is a character of the text.
_TAG = re.compile(r"[a-zA-Z/!?]")
_VALUE = re.compile(r'[^"]*"(?:[^>"]|"[^"]*")*>')
_BREAKS = set("br p li ul ol tr table h1 h2 h3 h4 h5 h6 div blockquote pre hr dd dt".split())


@dataclass
class Options:
    """What a run of the recipe may choose.

    Args:
        source: Name of the source in every document; empty for the name of the output folder.
        sites: How many sites to take, those with most bytes of posts; 0 takes all.
        min_chars: Shorter threads are dropped.
        max_post_bytes: Longer rows are dropped, and never held in memory.
    """

    source: str = ""
    sites: int = 28
    min_chars: int = 1
    max_post_bytes: Count = Count(16_000_000)


def plan(options: Options, inputs: Sequence[Path]) -> Plan:
    """A unit per site, the largest sites."""
    expect(options.sites >= 0, f"sites is {options.sites}", "0 for all or a number of sites")
    pieces, left_out = find(inputs, _format_of)
    if any(piece.format == "7z" for piece in pieces):
        needed("py7zr", "reading .7z", CORPUS_EXTRA)
    largest = sorted(pieces, key=lambda piece: (-_xml_bytes(piece), piece.name))
    kept = set(largest[: options.sites or None])
    left_out += [LeftOut(p.name, "smaller site", p.size) for p in largest if p not in kept]
    units = tuple(Unit(f"{i:05}.jsonl.zst", (p,)) for i, p in enumerate(sorted(kept)))
    return Plan("stackexchange", asdict(options), partial(read, options), units, tuple(left_out))


def steps(options: Options) -> list[Step]:
    """Line ends, then the least length."""
    return [text.unix_line_ends, partial(text.at_least, min_chars=options.min_chars)]


def _format_of(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.suffix == ".7z":
        # large sites come as an archive per table
        table = re.search(r"-([A-Z]\w+)$", path.stem)
        return "7z" if table is None or table[1] == "Posts" else None
    packing = path.suffix if path.suffix in raw.COMPRESSED else ""
    return f"posts{packing}" if path.name.removesuffix(packing) == "Posts.xml" else None


def site_of(piece: Piece) -> str:
    """As in coffee.stackexchange.com: the archive's name, or the folder's that holds Posts.xml."""
    path = Path(piece.path).resolve()
    return (path.stem if piece.format == "7z" else path.parent.name).removesuffix("-Posts")


def _xml_bytes(piece: Piece) -> int:
    """Bytes of Posts.xml, unpacked; 0 where an archive cannot say."""
    if piece.format != "7z":
        return piece.size * (1 if piece.format == "posts" else 4)
    # imported here: an extra, and only for archives
    import py7zr

    try:
        with py7zr.SevenZipFile(piece.path) as archive:
            return sum(m.uncompressed for m in archive.list() if _is_posts(m.filename))
    except Exception:
        # what is wrong with it is told when it is read
        return 0


def _is_posts(member: str) -> bool:
    return PurePosixPath(member).name == "Posts.xml"


def read(options: Options, piece: Piece) -> Iterator[Item]:
    """Threads of one site."""
    n = min(MAX_SPOOLS, 1 + _xml_bytes(piece) // SPOOL_BYTES)
    with tempfile.TemporaryDirectory(prefix="stackexchange-") as folder:
        spools = [open(Path(folder) / str(i), "w+b") for i in range(n)]
        aside: list[Dropped] = []
        rows = Rows(piece.name, options.max_post_bytes)

        def take(found: Iterable[dict[str, str] | Dropped]) -> None:
            for row in found:
                post = row if isinstance(row, Dropped) else _post(row, site_of(piece))
                if isinstance(post, Dropped):
                    aside.append(post)
                else:
                    spools[post["question"] % n].write(orjson.dumps(post) + b"\n")

        try:
            _stream(piece, lambda chunk: take(rows.feed(chunk)))
        except Exception as error:
            # what came before the damage is kept
            aside.append(Dropped(piece.name, "damaged", 0, str(error) or type(error).__name__))
        take(rows.end())
        yield from aside
        for spool in spools:
            spool.seek(0)
            yield from threads(map(orjson.loads, spool), site_of(piece), options.source)
            spool.close()


def _stream(piece: Piece, take: Callable[[bytes], Any]) -> None:
    """Bytes of a site's Posts.xml, chunk by chunk, to `take`."""
    if piece.format != "7z":
        for chunk in raw.chunks(piece.path):
            take(chunk)
        return
    import py7zr
    from py7zr.io import NullIO, WriterFactory

    class Sink(NullIO):
        """What py7zr writes a member to."""

        budget = raw.budget_of(piece.size)

        def write(self, s: bytes | bytearray) -> int:
            self.budget.spend(len(s))
            take(bytes(s))
            return len(s)

    class Sinks(WriterFactory):
        def create(self, filename: str) -> NullIO:
            return Sink()

    with py7zr.SevenZipFile(piece.path) as archive:
        listed = archive.list()
        # what lies before it in a solid archive is unpacked too
        raw.budget_of(piece.size).spend(sum(m.uncompressed for m in listed))
        members = [m.filename for m in listed if _is_posts(m.filename) and m.is_file]
        if not members:
            raise ValueError("the archive holds no Posts.xml")
        archive.extract(targets=members, factory=Sinks())


class Rows:
    """Attributes of the <row .../> elements of a growing text, whatever their layout.

    No XML parser: a damaged or unclosed row costs itself alone, and no entity is ever expanded.
    """

    def __init__(self, name: str, max_bytes: int) -> None:
        self.name, self.max_bytes = name, max_bytes
        self.tail, self.number = b"", 0

    def feed(self, chunk: bytes) -> Iterator[dict[str, str] | Dropped]:
        """Rows that are complete with this chunk."""
        data = self.tail + chunk
        # all but the last row, which may go on in the next chunk
        cut = data.rfind(b"<row")
        if cut < 0:
            cut = max(len(data) - len(b"<row"), 0)
        self.tail = data[cut:]
        yield from self._rows(data[:cut])
        if len(self.tail) > self.max_bytes:
            self.number += 1
            yield self._lost("too_large", f"a row of more than {self.max_bytes} bytes")
            self.tail = b""

    def end(self) -> Iterator[dict[str, str] | Dropped]:
        """The last row, when the input has ended."""
        yield from self._rows(self.tail)

    def _rows(self, data: bytes) -> Iterator[dict[str, str] | Dropped]:
        for part in data.split(b"<row")[1:]:
            if not part[:1].isspace():
                continue
            self.number += 1
            if len(part) > self.max_bytes:
                yield self._lost("too_large", f"a row of more than {self.max_bytes} bytes")
            elif match := _ROW.match("<row" + part.decode("utf-8", "replace")):
                yield {key: _unescape(a or b) for key, a, b in _ATTRIBUTE.findall(match[1])}
            else:
                yield self._lost("xml", "a row without an end")

    def _lost(self, reason: str, error: str) -> Dropped:
        return Dropped(f"{self.name}:row {self.number}", reason, 0, error)


def _unescape(value: str) -> str:
    """XML's entities; html.unescape calls a function for each of them, half of all the time."""
    if "&" not in value:
        return value
    value = value.replace("&#xA;", "\n").replace("&#xD;", "\r")
    if "&#" in value:
        return text.unescape(value)
    value = value.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    return value.replace("&apos;", "'").replace("&amp;", "&")


def _post(row: dict[str, str], site: str) -> dict[str, Any] | Dropped:
    """What of a row is needed to join it, its text without HTML."""
    body = row.get("Body", "")
    size = len(body.encode("utf-8", "replace"))
    try:
        id, kind = int(row["Id"]), int(row.get("PostTypeId", 0))
        if kind not in (_QUESTION, _ANSWER):
            return Dropped(f"{site}:{id}", "post_type", size)
        question = id if kind == _QUESTION else int(row.get("ParentId", 0))
        score = int(row.get("Score") or 0)
        if not all(-(2**63) <= number < 2**63 for number in (id, question, score)):
            raise ValueError("one of more than 64 bits")
    except (KeyError, ValueError) as error:
        return Dropped(f"{site}:{row.get('Id', '')[:40]}", "xml", size, f"no number: {error}")
    content = strip_tags(body).strip()
    if not content:
        return Dropped(f"{site}:{id}", "no_body", size)
    more = {k: row[k] for k in ("Title", "Tags", "CreationDate", "ContentLicense") if k in row}
    post = {"question": question, "kind": kind, "id": id, "score": score, "text": content}
    return post | more


def threads(posts: Iterable[dict[str, Any]], site: str, source: str) -> Iterator[Item]:
    """Documents of the questions among `posts`, by id, each with its answers."""
    questions: dict[int, dict[str, Any]] = {}
    answers: dict[int, dict[int, dict[str, Any]]] = {}
    for post in posts:
        question = post["question"]
        place = questions if post["kind"] == _QUESTION else answers.setdefault(question, {})
        if place.setdefault(post["id"], post) is not post:
            yield Dropped(f"{site}:{post['id']}", "duplicate", len(post["text"].encode()))
    for id in sorted(answers.keys() - questions.keys()):
        for post in answers[id].values():
            size = len(post["text"].encode())
            yield Dropped(f"{site}:{post['id']}", "answer_without_question", size)
    for id, question in sorted(questions.items()):
        best_first = sorted(answers.get(id, {}).values(), key=lambda a: (-a["score"], a["id"]))
        title = text.unescape(question.get("Title", "")).strip()
        parts = [f"Q: {title}\n\n{question['text']}" if title else f"Q: {question['text']}"]
        parts += [f"A: {answer['text']}" for answer in best_first]
        meta = {
            "url": f"https://{site}/questions/{id}",
            "score": question["score"],
            "answers": len(best_first),
            "tags": re.findall(r"[^<>|]+", question.get("Tags", "")),
            "date": question.get("CreationDate", ""),
            "license": question.get("ContentLicense", ""),
        }
        yield Document(f"{site}:{id}", "\n\n".join(parts), source, meta)


def strip_tags(markup: str) -> str:
    """Text of an HTML fragment in one pass: tags and comments go, entities become characters.

    Blocks begin on a line of their own, list items behind a star; in <pre> all white space stays.
    """
    first, *pieces = markup.split("<")
    parts, at_line_start, in_comment, in_code = [first], not first.strip(), False, False
    for piece in pieces:
        lead = ""
        if in_comment or piece.startswith("!--"):
            _, end, rest = piece.partition("-->")
            in_comment = not end
        elif _TAG.match(piece) and ">" in piece:
            tag, _, rest = piece.partition(">")
            if tag.count('"') % 2 and (value := _VALUE.match(rest)):
                # in quotes ">" is a character
                rest = rest[value.end() :]
            name = tag.strip("/").partition(" ")[0].lower()
            if name in _BREAKS:
                lead = "" if at_line_start else "\n"
                lead += "* " if name == "li" and tag[0] != "/" else ""
                in_code = tag[0] != "/" if name == "pre" else in_code
            elif name in ("td", "th") and tag[0] != "/":
                lead = "" if at_line_start else "\t"
        else:
            rest = "<" + piece
        if not in_code and rest.isspace() and "\n" in rest:
            # between two blocks: one blank line says enough
            rest = "" if at_line_start else "\n"
        if lead or rest:
            parts.append(lead + rest)
            at_line_start = rest[-1] == "\n" if rest else True
    return text.unescape("".join(parts))
