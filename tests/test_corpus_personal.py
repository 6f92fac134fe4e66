"""Personal data: what has the form of an address or number is masked, its look-alikes are not."""

import time

import pytest

from llama.corpus.document import Document, Noted
from llama.corpus.steps.personal import Personal

MASKED = {
    "<EMAIL>": """jane.doe@example.com
        j_d+news@mail.example.co.uk o'brien@example.ie x@y.museum 1234@qq.com
        müller@bücher.example info@stadt-köln.de""",
    "<IP>": """93.184.216.34 8.8.4.40 2a00:1450:4001:81b::200e
        2606:2800:220:1:248:1893:25c8:1946""",
    "<PHONE>": "+49 30 1234567\n+1-212-555-0123\n+1 (212) 555-0123\n+442071838750\n"
    "0049 30 901820\n0033.1.42.68.53.00\n(212) 555-0123\n(030) 1234-5678\n+86 138 0013 8000",
}
KEPT = """@user  a@b  user@localhost  @media print  x@y.sum()  3@4.5  foo@
10.0.0.1  127.0.0.1  192.168.1.20  169.254.1.1  255.255.255.255  300.1.2.3  1.2.3.4  1.2.3.4.5
255.1.2.3  v12.34.56.78  12.34.56.789  std::vector  ::1  fe80::1  12:30:45  2a00:1450  2001:db8::1
2026-11-22 12:30:45  1,234,567,890  +12  x+4912345678  978-3-16-148410-0  3.14159265358979
0012345678901234  +1234567890123456789  1+1234567890  (1999) 2000  f(1234) 5678  00:1a:2b:3c:4d:5e
10^12345678  2+2=4  100 000 000 000  (123) 456-7890123"""


def through(text: str) -> tuple[str, list[Noted]]:
    *counts, document = Personal()(iter([Document("id", text, "x", {"k": 1})]))
    assert document.meta == {"k": 1}
    return document.text, counts


@pytest.mark.parametrize("mask", MASKED)
def test_each_form_is_masked_and_counted(mask, rng):
    kinds = {"<EMAIL>": "e-mail addresses", "<IP>": "IP addresses", "<PHONE>": "phone numbers"}
    given = MASKED[mask]
    forms = [x.strip() for x in (given.split("\n") if mask == "<PHONE>" else given.split())]
    for form in forms:
        for frame in ("{}", "Write to {}.", "({}), or", "«{}»", "tel: {}\nnext", "a\t{}; b"):
            if frame.startswith("(") and form.startswith("("):
                continue
            assert through(frame.format(form)) == (
                frame.format(mask),
                [Noted(f"{kinds[mask]} masked")],
            ), form
    rng.shuffle(forms)
    assert through("; ".join(forms)) == (
        "; ".join([mask] * len(forms)),
        [Noted(f"{kinds[mask]} masked", len(forms))],
    )


def test_what_only_looks_like_it_stays():
    for line in KEPT.splitlines():
        for text in [line, *line.split("  ")]:
            assert through(text) == (text, [])


@pytest.mark.slow
def test_hostile_texts_take_linear_time():
    parts = ["a", "a@", "a.", "@a.", "1", "1.", "1.1.1.", "2a00:", ":", "+1", "+1 ", "(1", "00 ("]
    parts += ["a@a.a", "a@" + "a." * 8, "+1" + "-1" * 14, "00123 " + "(1) " * 14, " ", "'"]
    for part in parts:
        seconds = []
        for size in (100_000, 400_000):
            text = part * (size // len(part))
            best = []
            for _ in range(3):
                began = time.process_time()
                through(text)
                best.append(time.process_time() - began)
            seconds.append(min(best))
        print(part, seconds)
        assert seconds[1] <= 8 * seconds[0] + 0.05, part
        assert seconds[1] < 8
