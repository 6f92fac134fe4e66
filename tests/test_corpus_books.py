"""Recipe `books`: Gutenberg's frames in their variants, and copies of a book in other books."""

import os
import random
import zipfile
from pathlib import Path

import pytest

from llama.cli import UserError
from llama.corpus import executors, shuffle
from llama.corpus.sources import books
from llama.corpus.sources.books import unframed
from llama.files import read_documents

STORY = "CHAPTER I\n\nIt began in the usual way.\n\n" + "And so it went on.\n" * 50 + "\nTHE END"


@pytest.mark.parametrize(
    "header, footer",
    [
        (
            "The Project Gutenberg eBook of A Story\n\nTitle: A Story\n\nAuthor: A. B.\n\n"
            "Language: English\n\n*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***",
            "*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\nUpdated editions will replace",
        ),
        (
            "Project Gutenberg's A Story, by A. B.\n\nTitle: A Story\nAuthor: A. B.\n"
            "Language: English\n\n*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\n\n"
            "Produced by C. D. and the Online\nDistributed Proofreading Team",
            "End of the Project Gutenberg EBook of A Story, by A. B.\n\n"
            "*** END OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\n*** START: FULL LICENSE ***\nx",
        ),
        (
            "Project Gutenberg Etext of A Story, by A. B.\n\nTitle: A Story\nAuthor: A. B.\n"
            "Language: English\n***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\n"
            "Why is this here?\n"
            "*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
            "This etext was produced from the 1908 edition\nby D. P.",
            "End of Project Gutenberg Etext of A Story",
        ),
        (
            "Title: A Story\nAuthor: A. B.\nLanguage: English\n\n"
            "***START OF THE PROJECT GUTENBERG EBOOK A VERY LONG TITLE OF\nA STORY***",
            "***END OF THE PROJECT GUTENBERG EBOOK A STORY***\n\n"
            "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN EBOOKS**START***\nx\n"
            "*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*",
        ),
        (
            "Title: A Story\nAuthor: A. B.\nLanguage: English\n\n"
            "*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK A STORY ***\n\n"
            "C. D., E. F.\nand the PG Online Distributed Proofreading Team.",
            "*** END OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK A STORY ***",
        ),
        (
            "Titre: A Story\nAuteur: A. B.\nLangue: English\n\n"
            "*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\nProduced by G. H.",
            "Fin de Project Gutenberg's A Story, par A. B.",
        ),
        (
            "Title: A Story\nAuthor: A. B.\nLanguage: English\n\n"
            "*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\nProduit par G. H.",
            "Fin du Projet Gutenberg A Story",
        ),
        (
            "Project Gutenberg Australia\nTitle: A Story\nAuthor: A. B.\nLanguage: English\n\n"
            "To contact Project Gutenberg of Australia go to http://gutenberg.net.au",
            "This site is full of FREE ebooks - Project Gutenberg Australia",
        ),
        (
            "Titel: A Story\nAutor: A. B.\nSprache: English\n"
            "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
            "Ende dieses Etextes A Story",
        ),
        (
            "Titel: A Story\nAutor: A. B.\nSprache: English\n\n"
            "*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\nE-text prepared by E. F.",
            "Ende dieses Projekt Gutenberg Etextes A Story",
        ),
    ],
)
def test_the_frame_goes_in_every_variant(header: str, footer: str) -> None:
    book, meta, problem = unframed(f"{header}\n\n\n\n{STORY}\n\n\n{footer}\n")
    assert (book, problem) == (STORY, "")
    assert meta == {"title": "A Story", "author": "A. B.", "language": "English"}


def test_long_books_and_doubled_line_ends() -> None:
    frame = "*** {} OF THE PROJECT GUTENBERG EBOOK A ***"
    footer = "Licence\n" * 370
    long = "A line of a book that goes on for 50 MB and more.\n" * 1_100_000
    assert len(long) > 50_000_000
    book, _, problem = unframed(f"{frame.format('START')}\n{long}{frame.format('END')}\n{footer}")
    assert (book, problem) == (long.strip(), "")
    given = f"{frame.format('START')}\n{STORY}\n{frame.format('END')}\n{footer}"
    assert unframed(given.replace("\n", "\n\n"))[0] == STORY.replace("\n", "\n\n")


def test_other_books_stay_whole_and_half_frames_are_told() -> None:
    own = "My book.\n\nEnd of the tale.\nThe end of the Gutenberg press.\n" * 300
    assert unframed(own) == (own.strip(), {}, "")
    assert unframed("")[0] == ""
    start = "*** START OF THE PROJECT GUTENBERG EBOOK A ***\n"
    assert unframed(start + STORY)[2] == "header without a footer"
    assert unframed("This is a Project Gutenberg eBook\n\n" + STORY)[2] == "header without an end"


def made(tmp_path: Path, raw: Path, **options) -> tuple[dict[str, dict], dict]:
    chosen = books.Options(source="books", **options)
    plan = books.plan(chosen, [raw])
    local = executors.Executor(1)
    output = tmp_path / "out"
    summary = shuffle.pipeline(plan, books.steps(chosen), output, local, 1.0)
    found = {d["id"]: d for path in sorted(output.glob("0*.zst")) for d in read_documents(path)}
    return found, {name: value for name, value in summary.total.items() if value}


def prose(rng: random.Random, n: int) -> list[str]:
    vocabulary = [f"w{i}" for i in range(5000)]
    return rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(5000)], k=n)


def test_what_stands_in_a_longer_book_goes(tmp_path: Path, rng: random.Random) -> None:
    one, two, three, four = (prose(rng, 20_000) for _ in range(4))
    edition = ["a", "new", "preface", *one]
    for i in rng.sample(range(len(edition)), len(edition) // 150):
        edition[i] = "changed"
    shelf = {
        "one": one,
        "one-edition": edition,
        "one-abridged": one[:9_000] + one[11_000:],
        "two": two,
        "anthology": [*three, *two, *prose(rng, 5_000)],
        "three": three,
        "sixty": [*four[:12_000], *prose(rng, 8_000)],
        "four": four,
        "translation": [f"u{word}" for word in four],
    }
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, words in shelf.items():
        lines = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
        with zipfile.ZipFile(raw / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.txt", "\r\n".join(lines).upper())
    documents, total = made(tmp_path, raw)
    kept = {id.split(".")[0] for id in documents}
    # which of two editions is the longer one is told by their sketches
    assert len(kept & {"one", "one-edition"}) == 1
    assert kept - {"one", "one-edition"} == {"anthology", "sixty", "four", "translation"}
    assert total["dropped"] == {"contained": 4}
    documents, _ = made(tmp_path / "all", raw, overlap=0.0)
    assert len(documents) == len(shelf)


def test_one_of_equal_books_stays_whichever_way_they_are_cut(
    tmp_path: Path, rng: random.Random
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    text = " ".join(prose(rng, 9_000))
    for i in range(5):
        (raw / f"{i}.txt").write_text(text)
    for unit_bytes in (10, 10**8):
        documents, total = made(tmp_path / str(unit_bytes), raw, unit_bytes=unit_bytes)
        assert list(documents) == ["0.txt"] and total["dropped"] == {"contained": 4}


def test_bad_options_and_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="overlap is 1.5"):
        books.plan(books.Options(overlap=1.5), [tmp_path])
    with pytest.raises(UserError, match="--input"):
        books.plan(books.Options(), [])


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_REAL_DATA" not in os.environ, reason="LLAMA_REAL_DATA is not set")
def test_real_books(tmp_path: Path) -> None:
    raw = Path(os.environ["LLAMA_REAL_DATA"]) / "raw" / "books"
    documents, total = made(tmp_path, raw)
    numbers = [id.split(".")[0].split("-")[0] for id in documents]
    # editions have their number and -ed2, -ed3, ...: one of each work is left
    works = {path.name.split(".")[0].split("-")[0] for path in raw.iterdir()}
    assert len(numbers) == len(set(numbers))
    # The Little Women of 514 is that of 37106, Frankenstein 84 is in 42324
    assert works - set(numbers) == {"pg514", "pg84"}
    for document in documents.values():
        assert "START OF TH" not in document["text"][:9999]
        assert "Project Gutenberg Literary Archive" not in document["text"]
