"""Text to ids and back, exactly as SentencePiece does it and several times as fast (paper §2.1).

In: a SentencePiece model file; then text, or ids. Out: ids, without BOS and EOS; or text. Control
pieces never arise from text: "</s>" is encoded as four characters.

Text is cut where no merge of the model can cross, and the ids of each chunk are worked out once
(`tokenizer.chunks`). A model that allows no cuts is left to sentencepiece, which is said once.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from tokenizer.chunks import Borders, Packer, borders_for

SPACE_PIECE = "\u2581"  # what SentencePiece turns a space into

# Shorter texts are faster at sentencepiece itself.
SHORT_CHARS = 200

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
        borders, reason = _borders(self._model, trainer, normalizer)
        self.packer: Packer | None = None
        if borders:
            # A chunk carries its own leading space, so the model for chunks adds none: a field
            # appended to a protobuf message overrides, here normalizer_spec.add_dummy_prefix = 0.
            bare = _processor(blob + b"\x1a\x02\x18\x00")
            self.packer = Packer(borders, bare.encode, self.dtype)
            self._prefix = " " if normalizer.get(_ADD_DUMMY_PREFIX, 1) else ""
        else:
            warnings.warn(f"{path} {reason}: text is encoded whole, without a cache", stacklevel=2)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, those of `sentencepiece`; `ValueError` for a lone surrogate."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, not to be written to: uint16 up to 65,536 pieces, else int32."""
        self.replaced_chars += text.count(SPACE_PIECE)
        try:
            if self.packer is None or len(text) < SHORT_CHARS:
                return np.array(self._model.encode(text), self.dtype)
            data = (self._prefix + text.replace(SPACE_PIECE, " ")).encode()
        except (UnicodeEncodeError, RuntimeError) as error:
            # which of the two sentencepiece raises depends on how it was bound to Python
            if found := re.search("[\ud800-\udfff]", text):
                where = f"U+{ord(found[0]):04X} at character {found.start()}"
                raise ValueError(f"the text holds a lone surrogate, {where}") from error
            raise
        return np.frombuffer(self.packer.pack(data), self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; control ids are silent. `ValueError` for an id that is none."""
        values = np.asarray(ids, dtype=np.int64)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            wrong = values[(values < 0) | (values >= self.vocab_size)][0]
            raise ValueError(f"{wrong} is no id of {self.path}, which has {self.vocab_size} pieces")
        return self._model.decode(values.tolist())


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


def _borders(
    model: sentencepiece.SentencePieceProcessor,
    trainer: dict[int, int | bytes],
    normalizer: dict[int, int | bytes],
) -> tuple[Borders | None, str]:
    """Where text may be cut without changing any id; or None and the reason."""
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
    return borders_for(pieces), "has pieces with a space behind a word"


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
