"""Main content of pages, and the guard: what hangs, crashes or eats the memory costs one page."""

import os
import resource
import signal
import time

import pytest

pytest.importorskip("resiliparse", reason="the extra corpus is not installed")

from llama.corpus import guard
from llama.corpus.document import Document, Dropped
from llama.corpus.pool import Died, Failed
from llama.corpus.steps import html

PAGE = """<html><head><title>A &amp; B</title><style>p {{}}</style></head><body>
<nav><a href=/>Home</a> <a href=/x>Menu</a></nav>
<article><h1>A heading</h1><p>{}</p><ul><li>one</li><li>two</li></ul></article>
<footer>Copyright</footer><script>alert(1)</script></body></html>"""


def run(*pages: str, deadline_s: float = 2.0, memory_bytes: int = 1 << 30) -> list:
    given = [Document(str(i), page, "crawl", {"url": "u"}) for i, page in enumerate(pages)]
    return list(html.main_content(iter(given), deadline_s, memory_bytes))


def test_menus_and_scripts_go_and_the_title_is_kept() -> None:
    [found] = run(PAGE.format("Text of the page, with words enough to be one. " * 5))
    assert found.meta == {"url": "u", "title": "A & B"} and found.source == "crawl"
    assert "words enough" in found.text and "one" in found.text and "A heading" in found.text
    assert not any(word in found.text for word in ("Menu", "Copyright", "alert", "<"))


@pytest.mark.parametrize(
    "page",
    [
        "",
        "no markup at all",
        "<html><frameset><frame src=a></frameset></html>",
        "<table><tr><td>unclosed <table><tr><td>",
        "\x00\x01\x02 binary \ufffd" * 99,
        "a lone \ud800 surrogate",
        "<!-- never closed " * 999,
        "&#xD800; &#0; &nbsp" * 99,
    ],
)
def test_odd_pages_cost_at_most_themselves(page) -> None:
    before, found, behind = run(PAGE.format("first"), page, PAGE.format("last"))
    assert "first" in before.text and "last" in behind.text
    assert isinstance(found, Dropped) or found.text.encode() is not None


@pytest.mark.slow
def test_one_text_of_50_mb_is_a_page_or_a_reason() -> None:
    found, behind = run(PAGE.format("some words here " * 3_300_000), PAGE.format("last"))
    assert isinstance(found, Dropped) or len(found.text) > 50_000_000
    assert "last" in behind.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    ["<div>" * 500_000, "<p " + " ".join(f"a{i}=1" for i in range(200_000)) + ">"],
    ids=["nested", "attributes"],
)
def test_a_page_that_hangs_the_parser_costs_its_deadline(page) -> None:
    start = time.monotonic()
    found = run(PAGE.format("first"), page, PAGE.format("between"), page, deadline_s=0.5)
    assert [getattr(x, "reason", "kept") for x in found] == [
        "kept",
        "html_timeout",
        "kept",
        "html_timeout",
    ]
    assert time.monotonic() - start < 60


def misbehave(how: str) -> str:
    if how == "raise":
        raise RuntimeError("no idea")
    if how == "kill":
        signal.raise_signal(signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "memory":
        bytes([1]) * (1 << 31)
    while how == "hang":
        pass
    return "x" * (1 << 20 if how == "much" else 9)


def test_every_item_has_an_answer(rng) -> None:
    kinds = ["raise", "kill", "exit", "memory", "hang", "much"] + ["fine"] * 12
    items = rng.sample(kinds, len(kinds))
    answers = guard.each(misbehave, items, 0.2, signal.ITIMER_PROF, 1 << 28)
    expected = {"kill": Died(-signal.SIGKILL, None), "exit": Died(3, None)}
    expected |= {"hang": Died(-signal.SIGPROF, None), "fine": "x" * 9, "much": "x" * (1 << 20)}
    for item, answer in zip(items, answers, strict=True):
        if item in expected:
            assert answer == expected[item]
        else:
            assert isinstance(answer, Failed)
            assert ("no idea" if item == "raise" else "MemoryError") in answer.error
    assert guard.each(misbehave, [], 1.0) == []


def test_a_sleeper_has_the_clock_against_it() -> None:
    slept, behind = guard.each(time.sleep, [60, 0], 0.2)
    assert slept == Died(-signal.SIGALRM, None) and behind is None


def test_a_crash_and_an_error_have_their_reasons(monkeypatch) -> None:
    monkeypatch.setattr(html, "page_text", misbehave_on_page)
    found = run("kill", "raise", "memory", "fine", memory_bytes=1 << 28)
    assert [getattr(x, "reason", "kept") for x in found] == [
        "html_crash",
        "html_error",
        "html_error",
        "kept",
    ]
    assert all(resource.getrlimit(limit)[0] == -1 for limit in [resource.RLIMIT_AS])


def misbehave_on_page(page: str) -> tuple[str, str]:
    return "", misbehave(page)
