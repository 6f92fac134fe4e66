"""Step `personal`: e-mail and IP addresses and phone numbers become <EMAIL>, <IP> and <PHONE>.

The paper keeps them: this is an option, a step of `dedup`, or of `all` where its list names it.
They are known by their form. Private and reserved IP addresses stay, as does what looks like the
number of a version or section (1.2.3.4); phone numbers are those with a country code (+49 30 ...,
0049 30 ...) or an area code in brackets. Every pattern is bounded: time is linear in the text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llama.corpus.document import Document, Item, Noted

_LOCAL = r"[\w.!#$%&'*+/=?^`{|}~-]"
_HEX, _BYTE = "[0-9a-fA-F]{1,4}", "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
# Name of the count, mask and form. Lengths in e-mail addresses: RFC 5321; what a bracket follows is
# code, a@b.sum(). Ranges of IP addresses that are nobody's: RFC 6890.
KINDS = (
    (
        "e-mail addresses masked",
        "<EMAIL>",
        rf"(?<!{_LOCAL}){_LOCAL}{{1,64}}@(?:[^\W_](?:[\w-]{{0,61}}[^\W_])?\.){{1,8}}"
        r"[^\W\d_]{2,24}(?![\w(-])",
    ),
    (
        "IP addresses masked",
        "<IP>",
        r"(?<![\w.:])(?:(?!(?:0|10|127|169\.254|192\.168|172\.(?:1[6-9]|2[0-9]|3[01])"
        rf"|22[4-9]|2[345][0-9])\.|(?:[0-9]\.){{3}}[0-9]\b)(?:{_BYTE}\.){{3}}{_BYTE}(?!\.?\w)"
        rf"|(?!2001:0?db8:)[23][0-9a-fA-F]{{3}}(?:(?::{_HEX}){{7}}"
        rf"|(?::{_HEX}){{0,6}}::(?:{_HEX}(?::{_HEX}){{0,5}})?)(?![\w:]))",
    ),
    (
        "phone numbers masked",
        "<PHONE>",
        r"(?<![\w+/=.,-])(?:\+[1-9]|00[1-9][0-9]{0,2}(?=[ /(.-]))"
        r"(?:[ \u00a0./-]{0,2}(?:[0-9]|\([0-9]{1,4}\))){6,14}(?!\w)"
        r"|(?<![\w+)-])\([0-9]{2,5}\) ?[0-9]{3,4}[ .-]?[0-9]{4}(?![\w-])",
    ),
)


@dataclass(frozen=True)
class Personal:
    """Mask e-mail addresses, IP addresses and phone numbers."""

    name = "personal"

    def __call__(self, documents: Iterator[Document]) -> Iterator[Item]:
        for document in documents:
            text = document.text
            for what, mask, form in KINDS:
                text, times = re.subn(form, mask, text)
                if times:
                    yield Noted(what, times)
            yield document._replace(text=text)
