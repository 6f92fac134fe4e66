"""Step `main_content`: the text of a web page without menus, footers and forms (paper §2.1).

The text of a document is HTML before and plain text after, the page's title goes into its meta.
Done by resiliparse, which some pages hang or crash: every page has a deadline and a memory limit.

Drop reasons: `html_timeout`, `html_crash` (of the parser, or for want of memory), `html_error`.
"""

import signal
from collections.abc import Iterator

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from llama.corpus import guard
from llama.corpus.document import Document, Item
from llama.corpus.pool import Died, Failed


def main_content(
    documents: Iterator[Document], deadline_s: float, memory_bytes: int
) -> Iterator[Item]:
    """Extract text; a page may take `deadline_s` seconds of the processor."""
    pages = list(documents)
    texts = [page.text for page in pages]
    answers = guard.each(page_text, texts, deadline_s, signal.ITIMER_PROF, memory_bytes)
    for page, answer in zip(pages, answers, strict=True):
        if isinstance(answer, Died):
            late = answer.code == -signal.SIGPROF
            yield page.dropped("html_timeout" if late else "html_crash")
        elif isinstance(answer, Failed):
            yield page.dropped("html_error")
        else:
            title, text = answer
            yield page._replace(text=text, meta={**page.meta, "title": title})


def page_text(markup: str) -> tuple[str, str]:
    """(title, main content) of a page; may hang or crash."""
    tree = HTMLTree.parse(markup)
    text = extract_plain_text(
        tree, main_content=True, alt_texts=False, comments=False, post_meta=False
    )
    return tree.title or "", text
