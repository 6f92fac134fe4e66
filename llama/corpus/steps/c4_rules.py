"""The rules of C4 for a page of one's own crawl (Raffel et al. 2020, §2.2; paper §2.1).

Lines that do not read like sentences go, and pages of which too little is left. The constants are
those of the code that made C4; the article states two others, which are the preset `article`.

Drop reasons: `lorem_ipsum`, `curly_bracket`, `bad_words`, `too_few_sentences`. Lines removed are
noted as `line long_word`, `line no_end_mark`, `line few_words`, `line javascript`, `line policy`.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llama.cli import UserError, as_user_error
from llama.corpus.document import Document, Item, Noted

# How many words make a line and how many sentences a page.
PRESETS = {"reference": (5, 3), "article": (3, 5)}

MAX_WORD_CHARS = 1000
_END_MARKS, _ELLIPSIS = (".", "?", "!", '"'), "..."
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_POLICY = "terms of use, privacy policy, cookie policy, uses cookies, use of cookies, use cookies"
# A mark, closing quotes or brackets, white space, and what may begin a sentence. Titles and
# initials end in a full stop within one.
_BOUNDARY = re.compile(
    r"[.?!](?<!\b[A-Z]\.)(?<!\b(?:[MD]r|[JS]r|St|vs|No)\.)(?<!\bMrs\.)(?<!\be\.g\.|\bi\.e\.)"
    r"[\"')\]”’]*\s+(?=[\"'(\[“‘]*[^\W_a-z])"
)


def c4_rules(documents: Iterator[Document], preset: str, bad_words: str) -> Iterator[Item]:
    """Pages by the rules of C4; `bad_words` is a file with one word or phrase a line, or empty."""
    rules, bad = PRESETS[preset], bad_word_pattern(bad_words) if bad_words else None
    for document in documents:
        kept, reason, removed = clean(document.text, rules, bad)
        yield from (Noted(f"line {name}", times) for name, times in removed.items())
        yield document.dropped(reason) if reason else document._replace(text=kept)


def clean(
    text: str, rules: tuple[int, int], bad: re.Pattern[str] | None
) -> tuple[str, str, Counter[str]]:
    """(the lines kept, why the page is dropped or nothing, lines removed by reason)."""
    min_words, min_sentences = rules
    kept: list[str] = []
    removed: Counter[str] = Counter()
    sentences = 0
    # most pages hold none of these: one look at the page saves one at each of its lines
    whole = text.lower()
    suspects = [w for w in ("lorem ipsum", "javascript", *_POLICY.split(", ")) if w in whole]
    for line in text.splitlines():
        line = line.strip()
        if len(line) > MAX_WORD_CHARS and max(map(len, line.split())) > MAX_WORD_CHARS:
            removed["long_word"] += 1
            continue
        if "[" in line:
            line = _CITATION.sub("", line)
        if not line.endswith(_END_MARKS) or line.endswith(_ELLIPSIS):
            removed["no_end_mark"] += bool(line)
            continue
        # no more pieces than needed to know
        if len(line.split(None, min_words - 1)) < min_words:
            removed["few_words"] += 1
            continue
        lower = line.lower() if suspects else ""
        found = [word for word in suspects if word in lower]
        if "lorem ipsum" in found:
            return "", "lorem_ipsum", removed
        if "javascript" in found:
            removed["javascript"] += 1
            continue
        if "{" in line:
            return "", "curly_bracket", removed
        if found:
            removed["policy"] += 1
            continue
        kept.append(line)
        if sentences < min_sentences:
            sentences += 1 + len(_BOUNDARY.findall(line))
    page = "\n".join(kept)
    if sentences < min_sentences:
        return "", "too_few_sentences", removed
    if bad and bad.search(page.lower()):
        return "", "bad_words", removed
    return page, "", removed


@cache
def bad_word_pattern(path: str) -> re.Pattern[str]:
    """One pattern for a file of words; no letter a to z may stand beside a word.

    So a word of a script without spaces is found inside a line. Raises `UserError` for a file that
    cannot be read or holds no word.
    """
    with as_user_error(f"bad_words {path} cannot be read", OSError, UnicodeDecodeError):
        words = sorted({line.strip().lower() for line in Path(path).read_text("utf-8").split("\n")})
    if not any(words):
        raise UserError(f"bad_words {path} holds no word")
    return re.compile(f"(?<![a-z])(?:{'|'.join(map(re.escape, filter(None, words)))})(?![a-z])")
