"""Text to ids and back, exactly as SentencePiece does it and several times as fast (paper §2.1).

In: a SentencePiece model file; then text, or ids. Out: ids, without BOS and EOS; or text. Control
pieces never arise from text: "</s>" is encoded as four characters.

Text is cut where no merge of the model can cross, and the ids of each chunk are worked out once
(`tokenizer.chunks`). A model that allows no cuts is left to sentencepiece, which is said once.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tokenizer.chunks import Borders, Packer, borders_for

SPACE_PIECE = "\u2581"  # what SentencePiece turns a space into

# Shorter texts are faster at sentencepiece itself.
SHORT_CHARS = 200


class Tokenizer:
    """A SentencePiece model opened for encoding and decoding.

    Raises `ValueError` naming the file when it cannot be read as one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            blob = self.path.read_bytes()
            self._model = _processor(blob)
            self.spec = ModelProto.FromString(blob)
        except OSError as error:
            raise ValueError(f"tokenizer {path} cannot be read: {error.strerror}") from error
        except (RuntimeError, ValueError, DecodeError) as error:
            raise ValueError(f"tokenizer {path} is no SentencePiece model") from error
        self.sha256 = hashlib.sha256(blob).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.unk_id: int = self._model.unk_id()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        # Characters U+2581 met so far: they come back as spaces.
        self.replaced_chars = 0
        if not self.spec.HasField("trainer_spec") or not self.spec.HasField("normalizer_spec"):
            raise ValueError(f"tokenizer {path} is cut off: it lacks the options behind its pieces")
        borders, reason = _borders(self.spec)
        self.packer: Packer | None = None
        if borders:
            self._prefix = " " if self.adds_space else ""
            # a chunk carries its own leading space: the model for chunks adds none
            bare = ModelProto.FromString(blob)
            bare.normalizer_spec.add_dummy_prefix = False
            encode = _processor(bare.SerializeToString()).encode
            self.packer = Packer(borders, encode, self.dtype)
        else:
            warnings.warn(f"{path} {reason}: text is encoded whole, without a cache", stacklevel=2)

    @property
    def adds_space(self) -> bool:
        """Whether a space goes before every text."""
        return bool(self.spec.normalizer_spec.add_dummy_prefix)

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


def _borders(spec: ModelProto) -> tuple[Borders | None, str]:
    """Where text may be cut without changing any id; or None and the reason."""
    trainer, normalizer, kinds = spec.trainer_spec, spec.normalizer_spec, spec.SentencePiece
    obstacles = {
        "is no BPE model": trainer.model_type != trainer.BPE,
        # a run of unknown characters becomes one <unk>, across any border
        "has no byte fallback": not trainer.byte_fallback,
        "puts spaces behind words": trainer.treat_whitespace_as_suffix,
        "rewrites characters": normalizer.precompiled_charsmap,
        "removes spaces": normalizer.remove_extra_whitespaces,
        "leaves spaces as they are": not normalizer.escape_whitespaces,
        # how an unused piece is taken apart depends on the merges of the whole text
        "has unused pieces": any(piece.type == kinds.UNUSED for piece in spec.pieces),
    }
    for reason, holds in obstacles.items():
        if holds:
            return None, reason
    silent = (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
    spoken = [piece.piece for piece in spec.pieces if piece.type not in silent]
    pieces = [piece.replace(SPACE_PIECE, " ") for piece in spoken]
    return borders_for(pieces), "has pieces with a space behind a word"
