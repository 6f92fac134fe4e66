"""Step `personal`: e-mail and IP addresses and phone numbers become <EMAIL>, <IP> and <PHONE>.

The paper keeps them: this is an option, a step of `dedup`, or of `all` where its list names it.
They are known by their form. Private and reserved IP addresses stay, as does what looks like the
number of a version or section (1.2.3.4); phone numbers are those with a country code (+49 30 ...,
0049 30 ...) or an area code in brackets. Every pattern is bounded: time is linear in the text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama import files
from llama.corpus.document import Document, Item, Noted

KINDS = [
    (kind["name"], kind["mask"], "".join(kind["form"]))
    for kind in files.read_yaml(Path(__file__).with_suffix(".yaml"))["kinds"]
]


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
