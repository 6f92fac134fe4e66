"""Recipe `arxiv`: projects of every packing to the LaTeX of their text."""

import gzip
import io
import os
import random
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from llama.corpus.executors import Executor
from llama.corpus.shuffle import pipeline
from llama.corpus.sources import arxiv
from llama.corpus.steps import latex
from llama.files import read_documents


def paper(body: str, preamble: str = "") -> str:
    head = f"\\documentclass{{article}}\n{preamble}\n"
    return f"{head}\\begin{{document}}\n{body}\n\\end{{document}}\nafter"


def cleaned(body: str, preamble: str = "", **files: str) -> str:
    named = {name.replace("__", "/") + ".tex": text for name, text in files.items()}
    return latex.clean({"main.tex": paper(body, preamble), **named}, "main.tex").text


@pytest.mark.parametrize(
    "source, text",
    [
        ("a % comment\nb", "a \nb"),
        ("a\n  % whole line\nb", "a\nb"),
        ("50\\% of \\\\% x\ny", "50\\% of \\\\\ny"),
        ("\\verb|%| and \\verb+a%b+ % c", "\\verb|%| and \\verb+a%b+ "),
        (
            "\\begin{verbatim}\n% kept\n\\end{verbatim}% gone",
            "\\begin{verbatim}\n% kept\n\\end{verbatim}",
        ),
        ("\\url{http://a.b/%20c} % d", "\\url{http://a.b/%20c} "),
        ("\\href{http://a.b/%20c}{d} % e", "\\href{http://a.b/%20c}{d} "),
        ("% first\n% second\nx", "x"),
        ("", ""),
    ],
)
def test_comments(source: str, text: str) -> None:
    assert latex.without_comments(source) == text


def test_only_the_text_from_the_first_section_on_stays() -> None:
    text = cleaned(
        "\\title{T}\\author{A}\\begin{abstract}no\\end{abstract}\n\\section{One}\nText \\cite{a}.\n"
        "\\begin{comment}hidden\\end{comment}\\iffalse hidden \\fi\\bibliographystyle{x}\n"
        "\\bibliography{refs}\n\\appendix\n\\section{Two}\nMore."
    )
    assert text == "\\section{One}\nText \\cite{a}.\n\n\\appendix\n\\section{Two}\nMore."
    listed = "\\section{A}x\n\\begin{thebibliography}{9}\\bibitem{a} A\\end{thebibliography}\ny"
    assert cleaned(listed) == "\\section{A}x\n\ny"
    assert cleaned("\\section{A}x \\begin{thebibliography}{9} never ends") == "\\section{A}x"


@pytest.mark.parametrize("name", ["part", "chapter", "section*", "subsection", "paragraph"])
def test_every_kind_of_section_begins_the_text(name: str) -> None:
    assert cleaned(f"front \\{name}{{A}} b") == f"\\{name}{{A}} b"


def test_without_a_section_the_text_follows_abstract_or_title() -> None:
    assert cleaned("\\title{T}\\maketitle\\begin{abstract}a\\end{abstract} We show.") == "We show."
    assert cleaned("Only text.") == "Only text."


def test_inputs_come_in_their_place_and_order_and_from_the_project_only() -> None:
    text = cleaned(
        "\\section{A}\\input{b} \\include{sub/c}\\input sub/d\n\\import{sub}{e}\\input{../../etc/x}"
        "\\input{missing}",
        b="B\\input{sub/d}",
        sub__c="C\\input{d}",
        sub__d="D",
        sub__e="E",
    )
    assert text == "\\section{A}BD CDD\nE"
    circle = latex.clean(
        {"main.tex": paper("\\section{A}\\input{b}"), "b.tex": "B\\input{b}"}, "main.tex"
    )
    assert circle == ("\\section{A}B", ("input in a circle",))


def test_documents_of_their_own_that_are_input_end_nothing() -> None:
    figure = "\\documentclass{standalone}\\begin{document}F\\end{document}"
    chapter = "\\documentclass[../main]{subfiles}\n\\begin{document}\\section{C} c\\end{document}"
    body = "\\section{A}\\input{f} a \\subfile{c} b"
    assert cleaned(body, f=figure, c=chapter) == "\\section{A}F a \\section{C} c b"
    assert cleaned("\\section{A}\\input{b} c", b="B\\endinput no") == "\\section{A}B c"
    long = {"thesis.tex": paper("\\subfile{c}", "\\usepackage{subfiles}"), "c.tex": chapter * 9}
    assert latex.find_main(long) == "thesis.tex"


@pytest.mark.parametrize(
    "source, text",
    [
        ("a \\iffalse \\ifx x\\else y\\fi z \\fi b", "a  b"),
        ("a \\iffalse b \\else c \\fi d", "a  c  d"),
        ("a \\if0 b\\fi \\iff c", "a  \\iff c"),
        ("\\ifx a\\else b\\fi c", "\\ifx a\\else b\\fi c"),
        ("\\iffalse never ends", "\\iffalse never ends"),
    ],
)
def test_what_is_never_typeset_is_a_comment(source: str, text: str) -> None:
    assert cleaned(f"\\section{{A}}{source}") == f"\\section{{A}}{text}"


def test_a_name_for_iffalse_hides_nothing() -> None:
    text = cleaned("\\section{A} a \\ifdraft b\\fi c", "\\let\\ifdraft\\iffalse\\newif\\ifx")
    assert text == "\\section{A} a \\ifdraft b\\fi c"


def test_the_first_section_may_be_a_macro_of_the_authors() -> None:
    text = cleaned("front \\sect{A} a \\subsection{B} b", "\\newcommand{\\sect}[1]{\\section{#1}}")
    assert text == "\\section{A} a \\subsection{B} b"


@pytest.mark.parametrize("name", ["references", "bibdiv", "biblist"])
def test_bibliographies_of_other_packages(name: str) -> None:
    listed = f"\\section{{A}}x\\begin{{{name}}} r \\end{{{name}}} y"
    assert cleaned(listed) == "\\section{A}x y"


def test_blanks_in_begin_document() -> None:
    source = "\\documentclass{article}\n\\begin {document}\\section{A} a\\end {document} b"
    assert (
        latex.clean({"m.tex": source}, latex.find_main({"m.tex": source})).text == "\\section{A} a"
    )


@pytest.mark.parametrize(
    "definition, source, text",
    [
        ("\\newcommand{\\x}{y}", "\\x, \\x{} and \\xy", "y, y and \\xy"),
        (
            "\\newcommand\\x[2]{(#2|#1)}",
            "\\x{a}{b} \\x a b \\x\\alpha{c}",
            "(b|a) (b|a) (c|\\alpha)",
        ),
        ("\\newcommand{\\x}[2][d]{#1#2}", "\\x{a} \\x[o]{a}", "da oa"),
        ("\\newcommand{\\x}[2][{[d]}]{#1#2}", "\\x{a} \\x[{]}]{b}", "{[d]}a {]}b"),
        ("\\newcommand{\\x}{CDM\\xspace}", "\\x is \\x.", "CDM is CDM."),
        ("\\let\\x=\\alpha \\let\\y\\relax", "\\x b \\y", "\\alpha b \\y"),
        ("\\def\\x #1{<#1>}", "\\x{a}", "<a>"),
        ("\\def\\x#1{<#1>}", "\\x{a{b}c}", "<a{b}c>"),
        ("\\renewcommand*{\\x}[1]{\\y{#1}}\\newcommand\\y[1]{#1#1}", "\\x{\\x{a}}", "aaaa"),
        (
            "\\DeclareMathOperator*{\\argmin}{arg\\,min}",
            "$\\argmin_x$",
            "$\\operatorname{arg\\,min}_x$",
        ),
        ("\\newcommand{\\be}{\\begin{equation}}", "\\be x", "\\begin{equation} x"),
        ("\\newcommand{\\a}{\\alpha}", "\\a x \\a+", "\\alpha x \\alpha+"),
        ("\\newcommand{\\é}{\\u00e9\\1}", "\\é", "\\u00e9\\1"),
        ("\\renewcommand{\\x}{\\x!}", "\\x", "\\x!"),
        ("\\newcommand{\\x}[1]{#1}", "\\x", "\\x"),
        ("\\newcommand{\\x}[1]{#1}", "{\\x}", "{\\x}"),
        ("\\def\\x[#1]{#1}", "\\x[a]", "\\x[a]"),
        ("\\newcommand{\\x}{unbalanced", "\\x", "\\x"),
        ("\\newcommand{\\section}{\\@startsection{a}}", "\\section{b}", "\\section{b}"),
    ],
)
def test_macros(definition: str, source: str, text: str) -> None:
    assert cleaned(f"\\section{{A}} {source}", definition) == f"\\section{{A}} {text}"


def test_ten_megabytes_of_tikz() -> None:
    picture = "\\draw[thick] (0,0) -- (1,\\r) node {\\x{a}};\n"
    body = "\\section{A}\\begin{tikzpicture}\n" + picture * 250_000 + "\\end{tikzpicture} B"
    assert len(body) > 10_000_000
    text = cleaned(body, "\\newcommand{\\r}{2}\\newcommand{\\x}[1]{#1}")
    assert text.count("(1,2) node {a};") == 250_000 and text.endswith(" B")


def test_what_is_odd_is_noted() -> None:
    found = latex.clean({"m.tex": paper("\\maketitle text \\input{gone}")}, "m.tex")
    assert found == ("text", ("input missing", "no section"))


def test_definitions_go_and_may_stand_in_a_style_file_of_the_project() -> None:
    assert cleaned("\\section{A}\\newcommand{\\x}{y}\\x") == "\\section{A}y"
    files = {"main.tex": paper("\\section{A}\\x"), "my.sty": "\\newcommand{\\x}{y} % \\x"}
    assert latex.clean(files, "main.tex").text == "\\section{A}y"


def test_macros_that_call_themselves_or_each_other_end() -> None:
    both = "\\newcommand{\\x}{\\y\\y}\\newcommand{\\y}{\\x\\x}"
    assert cleaned("\\section{A}\\x", both) == "\\section{A}\\x\\x\\x\\x"
    doubling = "".join(
        f"\\newcommand{{\\{chr(97 + i)}}}{{\\{chr(98 + i)}\\{chr(98 + i)}}}" for i in range(25)
    )
    start = time.process_time()
    result = latex.clean({"m.tex": paper("\\section{A}\\a", doubling)}, "m.tex")
    assert result.notes == ("macro limit",) and len(result.text) < 4 * latex.FREE_GROWTH
    assert time.process_time() - start < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    ["{", "}", "\\x{", "\\x", "\\x[", "%", "\\verb|", "\\begin{verbatim}", "\\newcommand{\\y}{",
     "\\input{a}", "\\begin{comment}", "\\iffalse ", "\\begin{thebibliography}", "\\%",
     "\\def\\x#1#2", "\n\n"],
)  # fmt: skip
def test_hostile_latex_takes_linear_time(unit: str) -> None:
    def seconds(n: int) -> float:
        source = paper("\\section{A}" + unit * n, "\\newcommand{\\x}[2][d]{#1#2}")
        start = time.process_time()
        latex.clean({"m.tex": source}, "m.tex")
        return time.process_time() - start

    small = min(seconds(3_000) for _ in range(3))
    assert min(seconds(12_000) for _ in range(3)) < 8 * small + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [
        lambda n: "".join(f"\\verb{chr(0x4E00 + i)}" for i in range(n)),
        lambda n: "\\def\\q{" * n + "\\csname x" + "}" * n,
        lambda n: "\\x[" * n,
        lambda n: "\\z{}" * n,
        lambda n: "".join(f"\\def\\q{chr(0x4E00 + i)}" + "{\\part}" for i in range(n)) + "\\b" * n,
    ],
    ids=["delimiters", "inner definitions", "brackets", "many parameters", "own sections"],
)  # fmt: skip
def test_every_unit_hostile_in_another_way_takes_linear_time(made: Callable[[int], str]) -> None:
    def seconds(n: int) -> float:
        preamble = "\\newcommand{\\x}[2][d]{#1#2}\\def\\z#1{" + "#1" * n + "}"
        source = paper("\\section{A}" + made(n), preamble)
        start = time.process_time()
        latex.clean({"m.tex": source}, "m.tex")
        return time.process_time() - start

    small = min(seconds(3_000) for _ in range(3))
    large = min(seconds(12_000) for _ in range(3))
    assert large < 8 * small + 0.1


def test_few_bytes_that_stand_for_many_stay_few() -> None:
    """A body that says its argument, and a file that is input, again and again."""
    n = 50_000
    bomb = paper("\\section{A}\\x{" + "y" * n + "}", "\\def\\x#1{" + "#1" * n + "}")
    part = {"a.tex": "words " * 100_000}
    tracemalloc.start()
    result = latex.clean({"m.tex": bomb}, "m.tex")
    inputs = latex.clean({"m.tex": paper("\\section{A}" + "\\input{a}" * 900)} | part, "m.tex")
    braces = latex.clean({"m.tex": paper("\\section{A}" + "{}" * 200_000)}, "m.tex")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.notes == ("macro limit",) and len(result.text) < 4 * n
    assert "input in a circle" in inputs.notes and 6 * 10**5 <= len(inputs.text) < 3 * 10**6
    assert len(braces.text) > 400_000 and peak < 64_000_000


# -- packings --------------------------------------------------------------------------------------


def tar(files: dict[str, bytes], name: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def made(tmp_path: Path, raw: Path, **options) -> tuple[dict[str, str], dict]:
    chosen = arxiv.Options(source="arxiv", **{"min_chars": 1} | options)
    plan = arxiv.plan(chosen, [raw])
    summary = pipeline(plan, arxiv.steps(chosen), tmp_path / "out", Executor(1), 1.0)
    shards = sorted((tmp_path / "out").glob("0*.zst"))
    found = {d["id"]: d["text"] for path in shards for d in read_documents(path)}
    return found, {name: value for name, value in summary.total.items() if value}


def test_packings(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    text = paper("\\section{A} caf\u00e9")
    project = {"ms.tex": text.encode(), "fig.png": b"\x89PNG", "../../evil.tex": b"evil"}
    declared = paper("\\section{A} \u010dlov\u011bk", "\\usepackage[latin2]{inputenc}")
    members = {
        "2301/2301.00001.gz": gzip.compress(tar(project)),
        "2301/2301.00002.gz": gzip.compress(text.encode("latin-1")),
        "2301/2301.00003.pdf": b"%PDF-1.4 x",
        "2301/2301.00004.gz": gzip.compress(tar({"paper.pdf": b"%PDF-1.5"})),
        "2301/2301.00005.gz": gzip.compress(tar({"readme.txt": b"x"})),
        "2301/2301.00006.gz": gzip.compress(b"\\section{no beginning}"),
        "2301/2301.00007.gz": gzip.compress(text.encode())[:60],
        "2301/2301.00008.gz": gzip.compress(tar({"inner.tar": tar({"p.tex": text.encode()})})),
        "2301/2301.00009.gz": gzip.compress(b"\0" * 3_000_000),
        "hep-th/hep-th9901001.gz": gzip.compress(declared.encode("iso8859-2")),
    }
    (raw / "arXiv_src_2301_001.tar").write_bytes(tar(members))
    (raw / "2301.00010.gz").write_bytes(gzip.compress(paper("\\section{B}").encode()))
    # the same paper in the archive and on its own is one document
    (raw / "2301.00002.gz").write_bytes(gzip.compress(paper("\\section{C}").encode()))
    documents, total = made(tmp_path, raw, max_paper_bytes=2_000_000)
    assert documents == {
        "arxiv:2301.00001": "\\section{A} caf\u00e9",
        "arxiv:2301.00002": "\\section{C}",
        "arxiv:2301.00008": "\\section{A} caf\u00e9",
        "arxiv:hep-th/9901001": "\\section{A} \u010dlov\u011bk",
        "arxiv:2301.00010": "\\section{B}",
    }
    dropped = {"pdf_only": 2, "no_tex": 1, "no_main_file": 1, "too_large": 1, "id_duplicate": 1}
    assert total["dropped"] == dropped and total["documents"] == {"in": 12, "out": 5}
    assert total["quarantined"] == {"damaged": 1}
    assert total["noted"] == {"decoded as windows-1252": 1, "decoded as iso8859-2": 1}


def test_the_main_file_is_not_a_figure_or_a_part() -> None:
    whole = paper("\\section{A}")
    files = {
        "figure.tex": whole.replace("{article}", "{standalone}") + "x" * 999,
        "part.tex": "\\section{B}",
        "old.tex": whole,
        "ms.tex": whole,
    }
    assert latex.find_main(files) == "ms.tex"
    assert latex.find_main({"a.tex": "%\\documentclass{x}\ntext"}) is None


def test_random_latex_never_raises(rng: random.Random) -> None:
    units = [
        "\\",
        "{",
        "}",
        "[",
        "]",
        "#1",
        "\\x",
        "\\newcommand",
        "\\def\\x",
        "%",
        "\n",
        "a",
        "\\input{m}",
    ]
    for _ in range(300):
        source = paper("".join(rng.choices(units, k=rng.randrange(60))))
        latex.clean({"m.tex": source}, "m.tex")


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_REAL_DATA" not in os.environ, reason="LLAMA_REAL_DATA is not set")
def test_real_papers(tmp_path: Path) -> None:
    documents, total = made(tmp_path, Path(os.environ["LLAMA_REAL_DATA"]) / "raw" / "arxiv")
    # 36 papers, and 8 of them once more in the bulk archive
    assert total["documents"] == {"in": 44, "out": 36} and len(documents) == 36
    assert total["dropped"] == {"id_duplicate": 8}
    for text in documents.values():
        assert "\\documentclass" not in text and "\\begin{thebibliography}" not in text


@pytest.mark.parametrize(
    "name, id",
    [
        ("2301.00001.gz", "2301.00001"),
        ("x/arXiv-2301.00001v12.tar.gz", "2301.00001"),
        ("hep-th9901001.gz", "hep-th/9901001"),
        ("arXiv-math-0101001v1.tar.gz", "math/0101001"),
        ("my_paper-2.tex", "my_paper-2"),
    ],
)
def test_the_id_is_that_of_arxiv(name: str, id: str) -> None:
    assert arxiv.paper_id(name) == id
