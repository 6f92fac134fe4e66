"""Responses as text: codings that lie, character sets that are wrong or unsaid."""

import gzip
import random
import zlib

import pytest

pytest.importorskip("resiliparse", reason="the extra corpus is not installed")

import brotli

from llama.corpus import raw, web

RUSSIAN = "Привет, сегодня хорошая погода и мы пойдём гулять в парк. " * 9
HTML = b"<html><body>Some text</body></html>"


def response(body: bytes, *headers: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    typed = any("-Type" in header for header in headers)
    fields = headers if typed else ("Content-Type: text/html", *headers)
    return "\r\n".join([status, *fields]).encode() + b"\r\n\r\n" + body


def chunked(body: bytes, rng: random.Random) -> bytes:
    parts = []
    while body:
        n = rng.randrange(1, 2000)
        parts.append(f"{len(body[:n]):x}{rng.choice(['', ';ext=1', ' '])}\r\n".encode())
        parts.append(body[:n] + b"\r\n")
        body = body[n:]
    return b"".join(parts) + b"0\r\n\r\n"


def test_codings_are_undone(rng) -> None:
    html = b"<html>" + rng.randbytes(20_000).hex().encode() + b"</html>"
    plain = zlib.compressobj(wbits=-15)
    raw_deflate = plain.compress(html) + plain.flush()
    packed = {
        "": html,
        "gzip": gzip.compress(html),
        "x-gzip": gzip.compress(html),
        "deflate": zlib.compress(html),
        "Deflate": raw_deflate,
        "br": brotli.compress(html),
        "identity": html,
    }
    for coding, body in packed.items():
        given = [f"Content-Encoding: {coding}"] if coding else []
        assert web.payload(response(body, *given), 1 << 20)[0] == html
        given.append("Transfer-Encoding: chunked")
        found = web.payload(response(chunked(body, rng), *given), 1 << 20)
        assert found == (html, "", [])
        # the headers lie: it was undone before it was stored
        content, _, odd = web.payload(response(html, *given), 1 << 20)
        assert content == html and "transfer" in odd[0]


def test_what_is_cut_off_is_kept_as_far_as_it_goes(rng) -> None:
    html = b"<html>" + rng.randbytes(50_000).hex().encode() + b"</html>"
    for body, header in (
        (gzip.compress(html), "Content-Encoding: gzip"),
        (brotli.compress(html), "Content-Encoding: br"),
        (chunked(html, rng), "Transfer-Encoding: chunked"),
    ):
        content, _, odd = web.payload(response(body[: len(body) // 2], header), 1 << 20)
        assert html.startswith(content) and len(content) > len(html) // 4 and len(odd) == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"<html></html>", "http"),
        (b"", "http"),
        (response(HTML, status="HTTP/1.0 404 Not Found"), "http_status"),
        (response(HTML, "Content-Type: application/pdf"), "not_html"),
        (response(b"plain", "X-Type: "), "not_html"),
        (response(b"x", "Content-Encoding: zstd"), "content_encoding"),
        (response(gzip.compress(bytes(1 << 24)), "Content-Encoding: gzip"), "too_large"),
        (response(brotli.compress(bytes(1 << 24)), "Content-Encoding: br"), "too_large"),
        (response(HTML * 40_000), "too_large"),
    ],
)
def test_each_reason(given, reason) -> None:
    with pytest.raises(web.Refused, match=f"^{reason}$"):
        web.payload(given, 1 << 20)


@pytest.mark.parametrize(
    "body, header",
    [
        (HTML, "Content-Encoding: ISO-8859-1"),
        (HTML, "Content-Encoding: aws-chunked"),
        (gzip.compress(HTML), "X-Nothing: said"),
        (HTML, "Content-Type: text/html, text/html; charset=utf-8"),
    ],
)
def test_bytes_are_believed_before_headers(body, header) -> None:
    assert web.payload(response(body, header), 1 << 20)[0] == HTML


def test_html_without_a_type_and_the_type_that_the_crawler_found() -> None:
    assert web.payload(response(HTML, "X-Type: "), 1 << 20)[0] == HTML
    for kind in ("text/html", "application/xhtml+xml"):
        assert web.payload(response(HTML, "Content-Type: text/xml"), 1 << 20, kind)[0] == HTML
    with pytest.raises(web.Refused):
        web.payload(response(HTML), 1 << 20, "image/png")


@pytest.mark.parametrize(
    ("data", "header", "text", "how"),
    [
        (RUSSIAN.encode(), "", RUSSIAN, "utf-8"),
        (RUSSIAN.encode(), "windows-1251", RUSSIAN, "utf-8"),
        (b"\xef\xbb\xbf" + RUSSIAN.encode(), "koi8-r", RUSSIAN, "mark"),
        (RUSSIAN.encode("utf-16"), "", RUSSIAN, "mark"),
        (RUSSIAN.encode("utf-16-le"), "UTF-16LE", RUSSIAN, "declared"),
        (b"ASCII", "utf-16", "ASCII", "utf-8"),
        (RUSSIAN.encode("cp1251"), "Windows-1251", RUSSIAN, "declared"),
        (RUSSIAN.encode("koi8-r"), "", RUSSIAN, "detected"),
        (RUSSIAN.encode("cp1251"), "utf-8", RUSSIAN, "detected"),
        ("naïve “”".encode("cp1252"), "iso-8859-1", "naïve “”", "declared"),
        ("日本語のテキスト".encode("iso-2022-jp"), "ISO-2022-JP", "日本語のテキスト", "declared"),
        (RUSSIAN.encode() + b"\xff", "cp1252", RUSSIAN + "\ufffd", "replaced"),
    ],
)
def test_character_sets(data, header, text, how) -> None:
    found = web.decode(data, header)
    assert found == (text, how)


def test_a_name_in_the_page_is_believed_after_the_header() -> None:
    for tag in (
        "<meta charset='{}'>",
        '<META http-equiv="Content-Type" content="text/html; charset={}">',
        '<?xml version="1.0" encoding="{}"?>',
    ):
        page = tag.format("koi8-r") + RUSSIAN
        assert web.decode(page.encode("koi8-r")) == (page, "declared")
        assert web.decode(page.encode("cp1251"), "cp1251") == (page, "declared")


@pytest.mark.parametrize("name", ["zip", "rot13", "unicode_escape", "utf-7", "idna", "x" * 99])
def test_what_is_no_character_set_is_not_tried(name) -> None:
    page = f"<meta charset={name}>\\ud800 +2AA- {RUSSIAN}"
    assert web.decode(page.encode("cp1251"), name)[0] == page


def test_whatever_comes_is_text_or_binary(rng) -> None:
    for _ in range(300):
        data = rng.randbytes(rng.randrange(1, 400))
        names = ["", "utf-8", "utf-16", "gbk", "shift_jis", "iso-2022-jp", "big5", "euc-kr"]
        try:
            web.decode(data, rng.choice(names))[0].encode()
        except raw.Binary:
            assert raw.is_binary(data)
    with pytest.raises(raw.Binary):
        web.decode(b"\x89PNG\r\n" + bytes(range(256)) * 40)
