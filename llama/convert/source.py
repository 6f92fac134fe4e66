"""An opened set of weights, whatever its format: configuration, and one parameter at a time.

In: what a reader found in a folder. Out: a `Source`, or a `UserError` in one sentence: foreign,
missing or misshapen weights are refused before anything is written. The shapes are those of the
decoder of paper §2.2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import config, files, limits
from llama.cli import UserError
from llama.config import Config, DataConfig, ModelConfig
from llama.convert import names
from tokenizer.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER = "tokenizer.model"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Weights under our names and in our layout; `read` brings one into memory.

    `context` is the window it was trained on; `state` is what a checkpoint of ours records.
    `tokenizers` are places where tokenizer.model may lie, `tokenizer_sha256` what it must be.
    """

    path: Path
    format: str
    cfg: ModelConfig
    context: int
    dtype: torch.dtype
    read: Callable[[str], Tensor]
    tokenizers: tuple[Path, ...] = ()
    tokenizer_sha256: str | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        return names.shapes(self.cfg)

    @property
    def n_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def cast(self, dtype: torch.dtype, vectors: torch.dtype | None = None) -> Source:
        """The same weights in another type; `vectors`, if given, is that of the norms' gains.

        Reading raises `UserError` for values that are not finite, or not in that type.
        """

        def read(name: str) -> Tensor:
            weight = self.read(name)
            weight = weight.to(vectors if vectors and weight.dim() == 1 else dtype)
            if not weight.isfinite().all():
                kind = str(weight.dtype).removeprefix("torch.")
                raise UserError(f"{self.path}: {name} holds values that are not finite in {kind}")
            return weight

        return replace(self, dtype=dtype, read=read)

    def open_tokenizer(self, given: str | None) -> Tokenizer:
        """The tokenizer these weights were trained with, from `given` or where it usually lies."""
        places = [Path(given)] if given else list(self.tokenizers)
        if given and places[0].is_dir():
            places = [places[0] / TOKENIZER]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            looked = " or ".join(map(str, places))
            hint = "" if given else "; name it with --tokenizer"
            raise UserError(f"{self.path} has no tokenizer: {looked} does not exist{hint}")
        try:
            tokenizer = Tokenizer(place)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise UserError(
                f"{place} (sha256 {tokenizer.sha256[:12]}) is not the tokenizer that {self.path} "
                f"was trained with ({str(self.tokenizer_sha256)[:12]}): name that with --tokenizer"
            )
        if tokenizer.vocab_size != self.cfg.vocab_size:
            raise UserError(
                f"{place} has {tokenizer.vocab_size} pieces, {self.path} has embeddings for "
                f"{self.cfg.vocab_size}"
            )
        return tokenizer


def model_config(where: Path, **values: Any) -> ModelConfig:
    """A configuration read from a file, refused where it is none that this model can have."""
    try:
        cfg = ModelConfig(**values)
        # the mixture stands for those that a run would have
        limits.check(config.to_dict(Config(model=cfg, data=DataConfig(mixture={"any": 1.0}))))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    return cfg


def read_object(path: Path) -> dict[str, Any]:
    """The keys of a JSON file."""
    return as_object(path, files.read_json(path))


def as_object(where: object, value: Any) -> dict[str, Any]:
    """A JSON value that must be an object."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


_REQUIRED = object()


def fact(
    where: Path,
    facts: Mapping[str, Any],
    key: str,
    default: Any = _REQUIRED,
    kind: type[int] | type[float] = int,
) -> Any:
    """A number among the keys of a JSON file, or the default; a `UserError` without either."""
    value = facts.get(key)
    if value is None and default is _REQUIRED:
        raise UserError(f"{where} has no {key}")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"{where}: {key} is {value!r}, expected {expected}")
    return value


def refuse_foreign(where: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Refuse weights of which some are missing, unknown or of another shape."""
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{where} lacks {_some(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise UserError(f"{where} holds {_some(unknown)}, which this model does not have")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{where}: {name} is {show_shape(found[name])}, expected {show_shape(shape)}"
            )


def widest(where: Path, dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating-point type that holds all of them; quantised weights are refused."""
    found = set(dtypes)
    for dtype in found - {*DTYPES.values(), torch.float64}:
        raise UserError(f"{where} holds weights of type {dtype}, expected {', '.join(DTYPES)}")
    result = functools.reduce(torch.promote_types, found)
    return torch.float32 if result == torch.float64 else result


def show_shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _some(listed: list[str]) -> str:
    return listed[0] + (f" and {len(listed) - 1} more weights" if listed[1:] else "")
