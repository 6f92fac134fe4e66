"""An opened set of weights, whatever its format: configuration, and one parameter at a time.

In: what a reader found in a folder. Out: a `Source`, or a `UserError` in one sentence: foreign,
missing or misshapen weights are refused before anything is written. The shapes are those of the
decoder of paper §2.2.
"""

import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from llama import cli, config
from llama.cli import UserError, expect
from llama.config import Config, ModelConfig
from llama.convert import names
from llama.data import writer
from tokenizer.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER = writer.TOKENIZER
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Weights under our names and in our layout; `read` brings one into memory.

    `context` is the window it was trained on; `state` is what a checkpoint of ours records.
    `tokenizers` are folders where tokenizer.model may lie, `tokenizer_sha256` what it must be.
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

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """The same weights, each passed through `change` with its name when it is read."""
        return replace(self, read=lambda name: change(name, self.read(name)))

    def cast(self, dtype: torch.dtype, gains: torch.dtype | None = None) -> Self:
        """The same weights in another type; `gains`, if given, is that of the norms' vectors.

        Reading raises `UserError` for values that are not finite in that type.
        """
        cast = replace(self, dtype=dtype)

        def to(name: str, weight: Tensor) -> Tensor:
            weight = weight.to(gains if gains and weight.dim() == 1 else dtype)
            if not weight.isfinite().all():
                values = f"values that are not finite in {cast.dtype_name}"
                raise UserError(f"{self.path}: {name} holds {values}")
            return weight

        return cast.changed(to)

    @contextmanager
    def staged(self, folder: Path) -> Iterator[dict[str, Tensor]]:
        """All weights by name, though memory holds one: they are mapped from a nameless file.

        So the library of each format can write them, while the disk of `folder` holds them twice.
        """
        places, bar = [], cli.Progress("reading", len(self.shapes), "weights")
        with tempfile.TemporaryFile(dir=folder) as file, bar:
            for name, shape in self.shapes.items():
                weight = self.read(name).contiguous()
                places.append((name, shape, weight.dtype, file.tell(), weight.nbytes))
                file.write(weight.view(-1).view(torch.uint8).numpy().data)
                bar.update(1, name)
            file.flush()
            values = np.memmap(file, np.uint8, "c")
            yield {
                name: torch.from_numpy(values[begin : begin + size]).view(dtype).view(shape)
                for name, shape, dtype, begin, size in places
            }

    def open_tokenizer(self, given: str | Path | None = None) -> Tokenizer:
        """The tokenizer these weights were trained with: `given`, or where it usually lies."""
        places = [folder / TOKENIZER for folder in self.tokenizers]
        if given:
            places = [Path(given) / TOKENIZER if Path(given).is_dir() else Path(given)]
        place = next((path for path in places if path.is_file()), None)
        if place is None:
            looked = " or ".join(map(str, places))
            hint = "" if given else "; name it with --tokenizer"
            raise UserError(f"{self.path} has no tokenizer: {looked} does not exist{hint}")
        _, tokenizer, _ = writer.open_tokenizer(place)
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


def numbers(
    where: Path, facts: Mapping[str, Any], keys: Mapping[str, str], **defaults: float | None
) -> dict[str, Any]:
    """Numbers of a JSON file under our names: `keys` gives theirs, `defaults` what may be absent.

    They are more than 0, and whole unless the default is a fraction.
    """
    found: dict[str, Any] = {}
    for ours, theirs in keys.items():
        value, fraction = facts.get(theirs), isinstance(defaults.get(ours), float)
        if value is None and ours not in defaults:
            raise UserError(f"{where} has no {theirs}")
        if value is not None and type(value) not in ((int, float) if fraction else (int,)):
            expected = "a number" if fraction else "a whole number"
            raise UserError(f"{where}: {theirs} is {value!r}, expected {expected}")
        expect(value is None or value > 0, f"{where}: {theirs} is {value!r}", "more than 0")
        found[ours] = defaults[ours] if value is None else value
    return found


def model_config(where: Path, **values: Any) -> ModelConfig:
    """A configuration read from a file, K and F written out; refused if no model can have it."""
    with cli.as_user_error(f"{where}", TypeError, ValueError):
        cfg = ModelConfig(**values)
        config.check(Config(model=cfg))
    return replace(cfg, n_kv_heads=cfg.kv_heads, ffn_dim=cfg.hidden_dim)


def fitting(where: Path, found: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> torch.dtype:
    """The type that holds all weights found, which may be on the meta device; float32 at most.

    Refuses them if some are missing, unknown, of another shape or quantised.
    """
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{where} lacks {_some(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise UserError(f"{where} holds {_some(unknown)}, which this model does not have")
    for name, shape in expected.items():
        if found[name].shape != shape:
            ours, theirs = (" x ".join(map(str, each)) for each in (shape, found[name].shape))
            raise UserError(f"{where}: {name} is {theirs}, expected {ours}")
        if (dtype := found[name].dtype) not in (*DTYPES.values(), torch.float64):
            raise UserError(f"{where}: {name} is of type {dtype}, expected {', '.join(DTYPES)}")
    kinds = {weight.dtype for weight in found.values()}
    return kinds.pop() if len(kinds) == 1 and torch.float64 not in kinds else torch.float32


def _some(listed: list[str]) -> str:
    return listed[0] + (f" and {len(listed) - 1} more weights" if listed[1:] else "")
