"""Text to ids and back, exactly as SentencePiece does it and several times as fast (paper §2.1).

In: a SentencePiece model file; then text, or ids. Out: ids, without BOS and EOS; or text. Control
pieces never arise from text: "</s>" is encoded as four characters.

BPE only ever joins neighbours whose union is a piece. Where no piece holds the two characters at a
border, no merge crosses that border, so what lies on either side can be encoded by itself, in any
order, once. Text is cut at such borders into chunks, mostly words, whose ids are kept. The borders
are checked against every piece when a model is opened; a model that breaks them is left whole.
"""

import hashlib
import re
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
import sentencepiece

SPACE_PIECE = "\u2581"  # what SentencePiece turns a space into

# Chunks kept in each of the two generations of the cache, and characters of a chunk that is kept:
# with ids and Python's overhead about 170 bytes a chunk, 45 MB when both are full.
CACHE_CHUNKS = 1 << 17
CACHE_CHARS = 32

# A border lies between a letter and an ASCII mark, around an ASCII digit and before the first space
# of a run. All other characters cling to letters and to marks, because accents and quotation marks
# share pieces with one or the other. Whether two neighbours have a border between them depends on
# these two alone, so that a piece without a border inside never lies across one.
_LETTER = "[A-Za-zÀ-ÖØ-öø-ɏΈ-ώЀ-ҁҊ-ԯḀ-ỿ]"  # Latin, Greek, Cyrillic
_MARK = r"[\x00-\x1f!-/:-@\[-`{-\x7f]"
_OTHER = f"[^\x00-\x7f{_LETTER[7:-1]}]"
_RUN = f"(?:{_LETTER}++|{_MARK}++|)"
_FINE = re.compile(
    f" *+(?:{_LETTER}++(?!{_OTHER})|{_MARK}++(?!{_OTHER})|[0-9]|{_RUN}(?:{_OTHER}{_RUN})++)| ++"
)
# Only before the first space of a run: holds for every model that splits at whitespace.
_COARSE = re.compile(" *+[^ ]++| ++")

# Field numbers of trainer_spec and normalizer_spec in sentencepiece_model.proto.
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5


class Tokenizer:
    """A SentencePiece model opened for encoding and decoding.

    Raises `ValueError` naming the file when it cannot be read as one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            blob = self.path.read_bytes()
            self._model = _processor(blob)
        except OSError as error:
            raise ValueError(f"tokenizer {path} cannot be read: {error.strerror}") from error
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"tokenizer {path} is no SentencePiece model") from error
        self.sha256 = hashlib.sha256(blob).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.unk_id: int = self._model.unk_id()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        # Characters U+2581 met so far: they come back as spaces.
        self.replaced_chars = 0
        trainer, normalizer = _specs(blob)
        if not trainer or not normalizer:
            raise ValueError(f"tokenizer {path} is cut off: it lacks the options behind its pieces")
        self._split, reason = _splitter(self._model, trainer, normalizer)
        if not self._split:
            warnings.warn(f"{path} {reason}: text is encoded whole, without a cache", stacklevel=2)
        # A chunk carries its own leading space, so the model that encodes chunks adds none: a field
        # appended to a protobuf message overrides, here normalizer_spec.add_dummy_prefix = false.
        self._prefix = " " if normalizer.get(_ADD_DUMMY_PREFIX, 1) else ""
        bare = _processor(blob + b"\x1a\x02\x18\x00")
        self._cache = _Cache(bare.encode, self.dtype.char)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, those of `sentencepiece`; `ValueError` for a lone surrogate."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text as a read-only array: uint16 up to 65,536 pieces, else int32."""
        try:
            if not self._split or not text:
                return np.array(self._model.encode(text), self.dtype)
            self.replaced_chars += text.count(SPACE_PIECE)
            chunks = self._split(self._prefix + text.replace(SPACE_PIECE, " "))
            # itemgetter looks up faster than map; the empty chunk makes it always return a tuple
            parts = itemgetter("", *chunks)(self._cache)
        except (UnicodeEncodeError, RuntimeError) as error:
            # which of the two is raised depends on how sentencepiece was bound to Python
            if found := re.search("[\ud800-\udfff]", text):
                where = f"U+{ord(found[0]):04X} at character {found.start()}"
                raise ValueError(f"the text holds a lone surrogate, {where}") from error
            raise
        return np.frombuffer(b"".join(parts), self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; control ids are silent. `ValueError` for an id that is none."""
        values = np.asarray(ids, dtype=np.int64)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            wrong = values[(values < 0) | (values >= self.vocab_size)][0]
            raise ValueError(f"{wrong} is no id of {self.path}, which has {self.vocab_size} pieces")
        return self._model.decode(values.tolist())


class _Cache(dict[str, bytes]):
    """Chunk -> its ids packed, encoded on first sight.

    Two generations keep it bounded at the price of a plain dict: when the young one is full it
    becomes the old one, and what is used again comes back from there.
    """

    def __init__(self, encode: Callable[[str], list[int]], typecode: str) -> None:
        self.encode, self.typecode = encode, typecode
        self.old: dict[str, bytes] = {}

    def __missing__(self, chunk: str) -> bytes:
        packed = self.old.pop(chunk, None)
        if packed is None:
            packed = array(self.typecode, self.encode(chunk)).tobytes()
        if len(chunk) <= CACHE_CHARS:
            if len(self) >= CACHE_CHUNKS:
                self.old = dict(self)
                self.clear()
            self[chunk] = packed
        return packed


def _processor(blob: bytes) -> sentencepiece.SentencePieceProcessor:
    if not blob:
        raise ValueError("the file is empty")
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(blob)
    return processor


def _specs(blob: bytes) -> tuple[dict[int, int | bytes], dict[int, int | bytes]]:
    """Fields of a model's trainer_spec and normalizer_spec by number, as far as they are set."""
    specs: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}}
    for number, value in _fields(blob):
        if number in specs and isinstance(value, bytes):
            specs[number].update(_fields(value))
    return specs[2], specs[3]


def _splitter(
    model: sentencepiece.SentencePieceProcessor,
    trainer: dict[int, int | bytes],
    normalizer: dict[int, int | bytes],
) -> tuple[Callable[[str], list[str]] | None, str]:
    """What cuts normalised text into chunks without changing any id; or None and the reason."""
    ids = range(model.get_piece_size())
    obstacles = {
        "is no BPE model": trainer.get(_MODEL_TYPE, 1) != 2,
        # a run of unknown characters becomes one <unk>, across any border
        "has no byte fallback": not trainer.get(_BYTE_FALLBACK, 0),
        "puts spaces behind words": trainer.get(_SPACE_AS_SUFFIX, 0),
        "rewrites characters": normalizer.get(_CHARSMAP, b""),
        "removes spaces": normalizer.get(_REMOVE_SPACES, 1),
        "leaves spaces as they are": not normalizer.get(_ESCAPE_SPACES, 1),
        # how an unused piece is taken apart depends on the merges of the whole text
        "has unused pieces": any(model.is_unused(i) for i in ids),
    }
    for reason, holds in obstacles.items():
        if holds:
            return None, reason
    silent = (model.is_control, model.is_unknown, model.is_byte)
    pieces = [
        model.id_to_piece(i).replace(SPACE_PIECE, " ")
        for i in ids
        if not any(kind(i) for kind in silent)
    ]
    for pattern in (_FINE, _COARSE):
        if all(len(pattern.findall(piece)) == 1 for piece in pieces):
            return pattern.findall, ""
    return None, "has pieces with a space behind a word"


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the top-level fields of a protobuf message, fixed-width ones left out."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            size = varint()
            yield number, message[at : at + size]
            at += size
        else:
            at += 8 if kind == 1 else 4
