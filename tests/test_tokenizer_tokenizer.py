"""The tokenizer against sentencepiece itself: the same ids for every text, whatever the model."""

import hashlib
import io
import random
import re
import struct
import sysconfig
import threading
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from tokenizer import chunks
from tokenizer import tokenizer as module
from tokenizer.tokenizer import Tokenizer
from tokenizer.train import FIXED, training_lines

SPACE = "\u2581"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Accents that join letters, quotation marks that join marks, and scripts with either.
FOREIGN = (
    "Жизнь — это «песня», не так ли? Ёлка… "
    "L’été, c’est “l’amour” ; où ? ½ ² ª 日本語のテスト。中文，测试！ "
    "مُحَمَّدٌ، العربية؟ हिन्दी में लिखो। ไทย e\u0301 n\u0303o\u0308 👩‍👩‍👧‍👦🇨🇭 ≤∑→ £5 €10"
)


def corpus() -> list[str]:
    """Real text that every machine has, with some of everything else."""
    names = ["argparse.py", "decimal.py", "pydoc_data/topics.py", "html/entities.py", "this.py"]
    return [(STDLIB / name).read_text(encoding="utf-8") for name in names] + [FOREIGN * 40]


def train(path: Path, **options: Any) -> Path:
    """A small model with the project's options, or others."""
    lines = [line for text in corpus() for line in training_lines(text, 4192)[0]]
    model = io.BytesIO()
    options = {**FIXED, "vocab_size": 3000, "character_coverage": 1.0, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(autouse=True)
def short_texts_take_the_fast_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT_CHARS", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("model") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Tokenizer(model)


def reference(path: Path) -> Callable[[str], list[int]]:
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


def texts(rng: random.Random, path: Path) -> Callable[[], str]:
    """A generator of texts that are hard to get right."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    real = corpus()
    odd = [*" \t\n\r\0\f\v\x1c\x85\xa0\u2028\u3000\ufeff\ufffd\uffff", SPACE, "  ", "    ", "\r\n"]
    odd += [
        "</s>",
        "<s>",
        "<unk>",
        "<0x0A>",
        "<0xFF>",
        "👩‍👩‍👧‍👦",
        "e\u0301",
        "é",
        "’",
        "…",
        "٣",
        "१",
    ]
    ascii_ = [chr(i) for i in range(128)]

    def any_char() -> str:
        code = rng.choice((0x250, 0x600, 0x3000, 0x110000))
        char = chr(rng.randrange(code))
        return "a" if unicodedata.category(char) == "Cs" else char

    def real_slice() -> str:
        text = rng.choice(real)
        start = rng.randrange(len(text))
        return text[start : start + rng.randrange(1, 120)]

    makers = [
        real_slice,
        any_char,
        lambda: rng.choice(odd),
        lambda: rng.choice(ascii_),
        lambda: rng.choice(pieces),
        lambda: rng.choice(pieces).replace(SPACE, " "),
        lambda: " " * rng.randrange(1, 20),
        lambda: rng.choice(FOREIGN),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
    ]

    def text() -> str:
        chosen = rng.sample(makers, rng.randrange(1, 5))
        return "".join(rng.choice(chosen)() for _ in range(rng.randrange(0, 25)))

    return text


def check(tokenizer: Tokenizer, path: Path, rng: random.Random, number: int) -> None:
    expected, text = reference(path), texts(rng, path)
    for _ in range(number):
        value = text()
        ids = tokenizer.encode(value)
        assert ids == expected(value), repr(value)
        assert tokenizer.decode(ids) == value.replace(SPACE, " "), repr(value)
        assert not {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids), repr(value)


def test_ids_are_those_of_sentencepiece(
    tokenizer: Tokenizer, model: Path, rng: random.Random
) -> None:
    check(tokenizer, model, rng, 4_000)


@pytest.mark.slow
def test_ids_are_those_of_sentencepiece_on_100_000_texts(
    tokenizer: Tokenizer, model: Path, rng: random.Random
) -> None:
    check(tokenizer, model, rng, 100_000)


def test_whole_files_and_every_character(tokenizer: Tokenizer, model: Path) -> None:
    expected = reference(model)
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    for text in [*corpus(), everything, "".join(f"a{c}. {c}" for c in everything[:0x3000])]:
        array = tokenizer.encode_array(text)
        assert array.dtype == np.uint16
        assert array.tolist() == expected(text)
        assert tokenizer.decode(array) == text.replace(SPACE, " ")


SLOW = [pytest.param(unit, marks=pytest.mark.slow) for unit in "a=é’0\0"]


@pytest.mark.parametrize("unit", ["ab(", "x\n", *SLOW])
def test_lines_of_megabytes_without_a_space(
    tokenizer: Tokenizer, model: Path, unit: str, rng: random.Random
) -> None:
    text = unit * (4_000_000 // len(unit) // len(unit.encode()))
    assert tokenizer.encode(text) == reference(model)(text)


@pytest.mark.parametrize(
    "text", ["", " ", "  ", "\n", "\n\n", " \n ", "\0", SPACE, "a", " a", "a "]
)
def test_the_smallest_texts(tokenizer: Tokenizer, model: Path, text: str) -> None:
    assert tokenizer.encode(text) == reference(model)(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")


def test_control_pieces_never_arise_from_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s>a</s><unk><0x0A>")
    assert min(ids) > 2 and tokenizer.decode(ids) == "<s>a</s><unk><0x0A>"
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode([1, *ids, 2]) == "<s>a</s><unk><0x0A>"


def test_u2581_becomes_a_space_and_is_counted(model: Path) -> None:
    tokenizer = Tokenizer(model)
    assert tokenizer.encode(f"a{SPACE}b {SPACE}{SPACE}c") == tokenizer.encode("a b   c")
    assert tokenizer.replaced_chars == 3


def has_border(left: str, right: str) -> bool:
    """The borders as the module describes them."""

    def kind(char: str) -> str:
        if not char.isascii():
            return "beyond"
        if char == " ":
            return "space"
        return "digit" if char.isdigit() else "letter" if char.isalpha() else "mark"

    a, b = kind(left), kind(right)
    if "space" in (a, b):
        return b == "space" and a != "space"
    return "digit" in (a, b) or {a, b} == {"letter", "mark"}


def test_chunks_start_where_two_characters_say_so(
    tokenizer: Tokenizer, model: Path, rng: random.Random
) -> None:
    text, borders = texts(rng, model), chunks.Borders(chunks._FINE)
    assert tokenizer.packer
    assert vars(tokenizer.packer._borders) == vars(borders)
    for _ in range(2_000):
        value = text() or "a"
        right = [0]
        for i in range(1, len(value)):
            if has_border(value[i - 1], value[i]):
                right.append(len(value[:i].encode()))
        assert borders.starts(value.encode()).tolist() == right, repr(value)


def test_short_and_long_texts_take_different_ways_to_the_same_ids(
    model: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert module.SHORT_CHARS > 1
    tokenizer, expected, text = Tokenizer(model), reference(model), texts(rng, model)
    for _ in range(500):
        value = "".join(text() for _ in range(10))[: module.SHORT_CHARS + rng.randrange(-2, 3)]
        assert tokenizer.encode(value) == expected(value), repr(value)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_texts_of_many_blocks(
    model: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(chunks, "BLOCK_CHUNKS", block)
    tokenizer, expected, text = Tokenizer(model), reference(model), texts(rng, model)
    for _ in range(300):
        value = text()
        assert tokenizer.encode(value) == expected(value), repr(value)


def test_chunks_of_every_size_up_to_the_table_s_and_beyond(model: Path) -> None:
    # the same beginning, NULs as in an empty row, and sizes around that of a key
    tokenizer, expected = Tokenizer(model), reference(model)
    for char in ("\0", "a", "=", "\x7f", "é", "\U0010ffff"):
        for _ in range(2):
            for size in range(1, 60):
                for text in (char * size, f"{char * size} {char * size}7{char * size}"):
                    assert tokenizer.encode(text) == expected(text), (char, size)


def test_chunks_that_share_a_row_take_turns(
    model: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "TABLE_BITS", 3)
    tokenizer, expected, text = Tokenizer(model), reference(model), texts(rng, model)
    for _ in range(500):
        value = text()
        assert tokenizer.encode(value) == expected(value), repr(value)


def test_the_cache_is_bounded(
    model: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CACHE_CHUNKS", 50)
    tokenizer, expected, text = Tokenizer(model), reference(model), texts(rng, model)
    for _ in range(500):
        value = text() + "a" * rng.choice((0, 1000))
        assert tokenizer.encode(value) == expected(value)
        assert tokenizer.packer
        assert tokenizer.packer.cache.cache_info().currsize <= 50
    assert tokenizer.packer.cache.cache_info().misses > 50


def test_long_chunks_are_not_kept(model: Path) -> None:
    kept = []
    for size in (chunks.CACHE_CHUNK_BYTES, chunks.CACHE_CHUNK_BYTES + 1):
        tokenizer = Tokenizer(model)
        tokenizer.encode(f"\n{'q' * size}" * 9)
        assert tokenizer.packer
        kept.append(tokenizer.packer.cache.cache_info().currsize)
    assert kept[0] == kept[1] + 1


def test_a_lone_surrogate_is_named_and_leaves_nothing_behind(model: Path) -> None:
    tokenizer = Tokenizer(model)
    for text in ("ab \udc80 c", "ab \ud83d\ude00"):
        with pytest.raises(ValueError, match=r"lone surrogate, U\+D[8C]\w\w at character 3"):
            tokenizer.encode(text)
    assert tokenizer.encode("ab c") == reference(model)("ab c")


def test_threads_may_share_a_tokenizer(
    model: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CACHE_CHUNKS", 30)
    monkeypatch.setattr(chunks, "TABLE_BITS", 5)
    tokenizer, expected, text = Tokenizer(model), reference(model), texts(rng, model)
    values = [text() for _ in range(300)]
    right = [expected(value) for value in values]
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(v for v, ids in zip(values, right, strict=True) if tokenizer.encode(v) != ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What differs from our options, and where text may then be cut.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no prefix": ({"add_dummy_prefix": False}, "fine"),
    "user symbols": ({"user_defined_symbols": ["<|end|>", "  x"]}, "coarse"),
    "symbols that fit": ({"user_defined_symbols": ["((", " Zebra", "\t\t"]}, "fine"),
    "symbol across a space": ({"user_defined_symbols": ["ab cd", f"x{SPACE}y"]}, "whole"),
    "numbers": ({"split_digits": False}, "coarse"),
    "scripts mixed": ({"split_by_unicode_script": False}, "coarse"),
    "pieces across spaces": ({"split_by_whitespace": False}, "whole"),
    "unigram": ({"model_type": "unigram"}, "whole"),
    "normalised": ({"normalization_rule_name": "nmt_nfkc"}, "whole"),
    "spaces removed": ({"remove_extra_whitespaces": True}, "whole"),
    "spaces behind": ({"treat_whitespace_as_suffix": True}, "whole"),
    "no bytes": ({"byte_fallback": False, "character_coverage": 0.98}, "whole"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "unigram")) for n in MODELS]
)
def test_foreign_models_give_their_own_ids(name: str, tmp_path: Path, rng: random.Random) -> None:
    options, cuts = MODELS[name]
    path = train(tmp_path / "foreign.model", vocab_size=1500, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = Tokenizer(path)
    assert bool(said) == (cuts == "whole")
    assert all(str(path) in str(warning.message) for warning in said)
    if tokenizer.packer is None:
        assert cuts == "whole"
    else:
        borders = {"fine": chunks._FINE, "coarse": chunks._COARSE}[cuts]
        assert vars(tokenizer.packer._borders) == vars(chunks.Borders(borders))
    expected, text = reference(path), texts(rng, path)
    for _ in range(700):
        value = text() + rng.choice(("", "ab cd", "  x", "((a", "<|end|>", " Zebras"))
        assert tokenizer.encode(value) == expected(value), repr(value)


def without_options(model: bytes) -> int:
    """Where the pieces end: each is field 1, here shorter than 128 bytes."""
    at = 0
    while model[at] == 0x0A:
        assert model[at + 1] < 128
        at += 2 + model[at + 1]
    return at


def with_pieces(model: bytes, number: int) -> bytes:
    """The model with so many more pieces: protobuf messages {piece, score} in field 1."""
    extra = []
    for i in range(number):
        name = f"\u4e00{i}".encode()
        body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", -1e6 - i)
        extra.append(b"\x0a" + bytes([len(body)]) + body)
    return model + b"".join(extra)


def with_unused(model: bytes, rng: random.Random) -> bytes:
    """The model with a third of its longer pieces marked unused: type 5 in field 3."""
    at, end, pieces = 0, without_options(model), []
    while at < end:
        body = model[at + 2 : at + 2 + model[at + 1]]
        at += 2 + len(body)
        # BPE pieces carry no type; characters, at the end, must stay
        if len(pieces) > 259 and len(body) > 9 and b"\x18" not in body[-2:] and rng.random() < 0.3:
            body += b"\x18\x05"
        pieces.append(b"\x0a" + bytes([len(body)]) + body)
    return b"".join(pieces) + model[end:]


def test_crafted_models_give_their_own_ids(model: Path, tmp_path: Path, rng: random.Random) -> None:
    blob, path = model.read_bytes(), tmp_path / "crafted.model"
    crafted = {"has unused pieces": with_unused(blob, rng)}
    crafted["leaves spaces"] = blob + b"\x1a\x02\x28\x00"  # normalizer_spec.escape_whitespaces
    for reason, data in crafted.items():
        path.write_bytes(data)
        with pytest.warns(UserWarning, match=f"crafted.model {reason}"):
            tokenizer = Tokenizer(path)
        expected, text = reference(path), texts(rng, path)
        for _ in range(500):
            value = text()
            assert tokenizer.encode(value) == expected(value), repr(value)


@pytest.mark.parametrize("size", [65_536, 65_537])
def test_ids_need_16_bits_up_to_65_536_pieces(
    model: Path, tmp_path: Path, size: int, rng: random.Random
) -> None:
    path = tmp_path / "large.model"
    path.write_bytes(with_pieces(model.read_bytes(), size - 3000))
    tokenizer, expected, text = Tokenizer(path), reference(path), texts(rng, model)
    assert tokenizer.vocab_size == size
    for value in ["\u4e0012", *(text() for _ in range(300))]:
        array = tokenizer.encode_array(value)
        assert array.dtype == (np.uint16 if size <= 65_536 else np.int32)
        assert array.tolist() == expected(value)


def test_what_is_no_model_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    whole, path = model.read_bytes(), tmp_path / "bad.model"
    for data in (b"", b"text", b"\0" * 100, whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="bad.model") as error:
            Tokenizer(path)
        assert "\n" not in str(error.value)
    for missing in (tmp_path, tmp_path / "none.model"):
        with pytest.raises(ValueError, match=re.escape(str(missing))):
            Tokenizer(missing)


def test_a_model_cut_behind_its_pieces_is_refused(model: Path, tmp_path: Path) -> None:
    # without byte pieces sentencepiece itself would take it, as a model of another kind
    other = train(tmp_path / "other.model", byte_fallback=False)
    for whole in (model.read_bytes(), other.read_bytes()):
        path = tmp_path / "cut.model"
        path.write_bytes(whole[: without_options(whole)])
        with pytest.raises(ValueError, match="cut.model"):
            Tokenizer(path)


@pytest.mark.parametrize("wrong", [-1, 3000, 2**40])
def test_decoding_refuses_what_is_no_id(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"^{wrong} is no id of .*3000 pieces"):
        tokenizer.decode([5, wrong])


def test_the_hash_is_the_file_s(tokenizer: Tokenizer, model: Path) -> None:
    assert tokenizer.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
