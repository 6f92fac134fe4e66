"""Which licence a folder of source code is under (paper §2.1: Apache, BSD and MIT projects).

In: the files of a folder that say so: licence texts, package metadata, debian/copyright. Out: a
verdict. A permissive licence must be there sentence by sentence, any other need only be mentioned.
"""

import posixpath
import re
import tomllib
from collections.abc import Collection
from email.parser import HeaderParser
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from llama import files

_FILE = re.compile(
    r"(?!.*(?:third|3rd|bundle|depend|vendor|extern|header|\.(?:py|js|ts|go|java|rb|c|h|json)$|s\.rst$))"
    r"(?:(?:mit|apache|bsd)[-_.])?(?:(?:un)?licen[sc]es?|copying|copyright)(?:[-_.][\w.+-]+)?",
    re.IGNORECASE,
)
_REUSE = re.compile(r"(?:^|/)LICENSES/[^/]+\.txt$")
# Of these it matters when nobody knows their text.
_MAIN_FILE = re.compile(r"(?i:licen[sc]e|copying)(?i:\.txt)?|L(?:ICEN[SC]E|icense)\.(?:md|rst)")
_TABLES = files.read_yaml(Path(__file__).with_suffix(".yaml"))
_NAMES, _PATTERNS, _OTHERS, HARMLESS = (
    {name: "|".join(said) for name, said in _TABLES[table].items()}
    for table in ("names", "patterns", "others", "harmless")
)
_GPL = {"affero": "AGPL", "lesser": "LGPL", "library": "LGPL", "": "GPL"}
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() -]{1,300})")
_ATOM = r"\(*[\w.+-]+\)*"
_EXPRESSION = re.compile(rf"{_ATOM}(?: (?:and|or|with) {_ATOM})*", re.IGNORECASE)
_UNSAID = ("", "unknown", "noassertion", "license", "dual", "dual license")


class Evidence(NamedTuple):
    """What one file says: an SPDX expression, licences found in its text, or neither."""

    declared: str = ""
    texts: frozenset[str] = frozenset()


def words(text: str) -> str:
    """Lower-case ASCII words and numbers with single spaces: what is left of any layout."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("©", " c ")))


@lru_cache(16)
def read_text(text: str) -> Evidence:
    """SPDX-License-Identifiers, and the licences that a text contains or mentions."""
    plain = words(text)
    found = {name for name, each in (_OTHERS | HARMLESS).items() if re.search(each, plain)}
    gpl = re.search(r"\bgnu (?:(affero|lesser|library) )?(?:general public licen|gpl)", plain)
    if "MPL" in found:
        found = {"MPL"}
    elif gpl:
        # the first that is named; what these texts say of commerce and of each other is no limit
        found = (found - {"restricted"}) | {_GPL[gpl[1] or ""]}
    if all(part in plain for part in _TABLES["texts"]["MIT"]) or "under the mit licen" in plain:
        found.add("MIT")
    if all(part in plain for part in _TABLES["texts"]["BSD"]):
        clauses = 3 if "endorse or promote products" in plain else 2
        clauses = 4 if re.search(_PATTERNS["adverts"], plain) else clauses
        found.add(f"BSD-{clauses}-Clause")
    if re.search(_PATTERNS["apache"], plain):
        found.add("Apache-2.0")
    declared = " AND ".join(f"({spdx.strip(' -')})" for spdx in _SPDX.findall(text))
    return Evidence(declared, frozenset(found))


def satisfied(expression: str, allowed: Collection[str]) -> bool:
    """True when the work may be used under allowed licences: either side of OR, both of AND."""
    signs = {"AND": "&", "OR": "|"}
    value = re.sub(
        r"\sWITH\s+[\w.-]+", "", expression if len(expression) < 500 else "", flags=re.IGNORECASE
    )
    value = re.sub(
        r"[^\s()]+", lambda m: signs.get(m[0].upper()) or str(int(_id(m[0]) in allowed)), value
    )
    value, before = re.sub(r"\s", "", value), ""
    while value != before:
        before, value = value, re.sub(r"\(([01&|]*)\)", lambda m: _flat(m[1]), value)
    return _flat(value) == "1"


def _flat(value: str) -> str:
    return str(int(any(set(term.split("&")) == {"1"} for term in value.split("|"))))


def _id(name: str) -> str:
    """SPDX's name of a licence where it is one of the usual ones, whatever it is called."""
    plain = words(name).removeprefix("the ")
    return next((id for id, known in _NAMES.items() if re.fullmatch(known, plain)), name)


def expression(value: Any) -> str:
    """What a package says of itself as an SPDX expression; nothing where it is not understood."""
    if isinstance(value, dict):
        value = value.get("type") or value.get("text")
    if isinstance(value, list):
        return " OR ".join(filter(None, map(expression, value)))
    text = value if isinstance(value, str) else ""
    line = re.sub(r" ?(?:/|\band/or\b) ?", " OR ", " ".join(text[:500].split()))
    if words(line) in _UNSAID:
        return ""
    if _id(line) in _NAMES or _EXPRESSION.fullmatch(line):
        return _id(line)
    return " AND ".join(sorted(read_text(text).texts))


def is_text(path: str) -> bool:
    """True for a file that holds the licence of its folder, or one of those in LICENSES."""
    return bool(_FILE.fullmatch(posixpath.basename(path)) or _REUSE.search(path))


def evidence(path: str, text: str) -> tuple[str, Evidence]:
    """(the folder that is spoken of, what is said) by a licence text or a file in METADATA."""
    folder, name = posixpath.split(path)
    if path.endswith("debian/copyright"):
        stanza = text.partition("\nFiles: *\n")[2].partition("\n\n")[0]
        said = re.search(r"^License:(.*)", stanza, re.MULTILINE)
        return posixpath.dirname(folder), Evidence(expression(said and said[1].replace(",", "")))
    if reader := METADATA.get(name):
        try:
            return folder, Evidence(expression(reader(text)))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return folder, Evidence()
    folder = posixpath.dirname(folder) if _REUSE.search(path) else folder
    found = read_text(text)
    unknown = found == Evidence() and _MAIN_FILE.fullmatch(name)
    return folder, Evidence(texts=frozenset({"unknown"})) if unknown else found


def _python(text: str) -> str:
    fields = HeaderParser().parsestr(text)
    said = expression(fields["License-Expression"]) or expression(fields["License"])
    classes = [name for name in fields.get_all("Classifier", []) if name.startswith("License")]
    return said or " AND ".join(filter(None, (expression(c.split(":: ")[-1]) for c in classes)))


def _json(text: str) -> Any:
    found = orjson.loads(text)
    return found.get("license") or found.get("licenses")


def _toml(text: str, *path: str) -> str:
    """The licence in a table of the file; nothing where it only says where to look."""
    table = reduce(lambda found, name: found.get(name, {}), path, tomllib.loads(text))
    return expression(table.get("license"))


METADATA = {
    "package.json": _json,
    "composer.json": _json,
    "PKG-INFO": _python,
    "DESCRIPTION": lambda text: HeaderParser().parsestr(text)["License"].partition(" + file")[0],
    "pyproject.toml": lambda text: _toml(text, "project") or _toml(text, "tool", "poetry"),
    "Cargo.toml": lambda text: _toml(text, "package") or _toml(text, "workspace", "package"),
}


def judge(found: Collection[Evidence], allowed: Collection[str]) -> tuple[str, str] | None:
    """(licence, why it is refused or nothing); None where nothing is said.

    A licence that is mentioned must be allowed too, but for those between which one may choose.
    """
    declared = sorted({each.declared for each in found if each.declared})
    texts = {text for each in found for text in each.texts}
    if not declared and not texts:
        return None
    ids = {_id(id) for each in declared for id in re.findall(r"[^\s()]+", each)}
    refused = texts - set(allowed)
    if declared or texts & set(allowed):
        refused -= {*HARMLESS, "unknown"} if declared else set(HARMLESS)
    others = {id for id in ids - set(allowed) if id.upper() not in ("AND", "OR", "WITH")}
    refused = {name for name in refused if _label(name) not in map(_label, others)}
    if not all(satisfied(each, allowed) for each in declared):
        refused |= others or {"other"}
    licence = " AND ".join(declared or sorted(texts))
    return licence, f"licence {_label(min(refused))}" if refused else ""


def _label(name: str) -> str:
    """One of a bounded number of names, to be counted under."""
    known = (*_GPL.values(), *_OTHERS, *HARMLESS, "BSD", "unknown")
    return next((label for label in known if name.upper().startswith(label.upper())), "other")
