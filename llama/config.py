"""The configuration of a run: dataclasses, YAML files and dotted overrides.

`torchrun train.py --config configs/llama_7b.yaml --optim.lr 1e-4`: several `--config` are applied
in order, then the options. Unknown keys fail with a suggestion. What a run used is saved as
`runs/<name>/config.yaml`, with the mixture's weights written in, and reruns it exactly.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse.typing import register_type

from llama import cli, files, limits
from llama.cli import UserError

Recompute = Literal["none", "manual", "selective", "full", "budget"]
CONFIGS = Path(__file__).parent.parent / "configs"


class Count(int):
    """A whole number that may be written 4M, 1.4T or 1.4e12."""


class Bytes(int):
    """A number of bytes that may be written 20e9, 20GB or 512 MB, in powers of ten."""


register_type(Count, serializer=int, deserializer=lambda value: Count(cli.count(value)))
register_type(Bytes, serializer=int, deserializer=lambda value: Bytes(cli.byte_count(value)))


@dataclass
class ModelConfig:
    """The decoder (paper §2.2, Table 2).

    Args:
        dim: Width of the residual stream, C.
        n_layers: Number of blocks.
        n_heads: Number of query heads, H; the head size D is dim / n_heads.
        n_kv_heads: Number of key/value heads, K; null for as many as query heads.
        vocab_size: Size of the vocabulary, V; null for what the token shards say.
        ffn_dim: Feed-forward width, F; null for 2/3 of 4 dim, rounded up to 256.
        norm_eps: Added to the mean square inside RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: {type: linear, factor: f} or Llama 3's {type: llama3, factor: f,
            low_freq_factor: a, high_freq_factor: b, original_max_position_embeddings: n}.
    """

    dim: int = 192
    n_layers: int = 4
    n_heads: int = 6
    n_kv_heads: int | None = None
    vocab_size: int | None = None
    ffn_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, str | float] | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        """F: 2/3 of 4 dim as in the paper (§2.2), up to the next multiple of 256."""
        return self.ffn_dim or 256 * math.ceil(int(8 * self.dim / 3) / 256)


@dataclass
class DataConfig:
    """What is trained on.

    Args:
        path: Folder of token shards, <source>/{train,valid}/.
        mixture: YAML file of source: weight (by tokens, summing to 1), or those weights.
        seq_len: Tokens per window, T.
        attend_across_documents: Whether attention crosses document borders, as in the paper.
        boundary_loss: Whether the first token of a document is predicted from the one before it.
    """

    path: str = "data/quickstart/tokens"
    mixture: dict[str, float] | str = "mixtures/quickstart.yaml"
    seq_len: int = 256
    attend_across_documents: bool = True
    boundary_loss: bool = True


@dataclass
class TrainConfig:
    """How much is trained, in which pieces.

    Args:
        tokens: Tokens of the whole run; steps follow from it, rounded up.
        batch_tokens: Tokens per step over all processes.
        batch_ramp: Smaller batches to begin with, as [[tokens per step, steps], ...].
        micro_batch: Windows per forward pass and process; auto takes what is known to fit.
        dtype: Of the forward and backward pass; master weights and reductions are float32.
        compile: torch.compile per block; auto compiles on GPUs, and on a CPU where a run is so
            long that it gains (20 minutes).
        init_from: Weights to start from, with a fresh optimizer: a run, a checkpoint, or a
            folder of Hugging Face's or Meta's.
        time_limit: Seconds from the start after which something ends the run: it saves and stops
            before that, as it does before a Slurm job's end.
        step_timeout: Seconds without progress after which a rank is taken to hang.
        save_timeout: The same while saving and loading, and in the first step and validation.
    """

    tokens: Count = Count(1_000_000)
    batch_tokens: Count = Count(8192)
    batch_ramp: list[tuple[Count, int]] = field(default_factory=list)
    micro_batch: int | Literal["auto"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    init_from: str | None = None
    time_limit: float | None = None
    step_timeout: float = 600.0
    save_timeout: float = 1800.0


@dataclass
class OptimConfig:
    """AdamW and its schedule (paper §2.3).

    Args:
        name: The optimizer.
        lr: Highest learning rate.
        schedule: Shape after the warm-up; wsd holds lr and decays linearly at the end.
        min_lr_ratio: Learning rate of the last step, as a share of lr.
        warmup_steps: Steps of linear warm-up.
        decay_ratio: Share of the steps in which wsd decays.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of all matrices, embeddings included.
        clip: Largest norm of the global gradient.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    min_lr_ratio: float = 0.1
    warmup_steps: int = 50
    decay_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass
class ParallelConfig:
    """How the model is spread over processes; one of them may be -1 for the rest of the world.

    Args:
        replicate: Copies of the sharded model.
        shard: Processes that share one copy (FSDP).
        tensor: Processes that share each matrix (tensor and sequence parallel).
        async_tensor: Whether torch overlaps their collectives with products, piece by piece: for
            tensor groups on GPUs with compiled blocks.
        context: Processes that share each sequence.
        recompute: What the backward pass computes again instead of keeping; budget mixes none,
            manual and full by block.
        budget: Bytes that recompute budget may keep for the backward pass per process (20GB).
        reshard: Give up a block's weights after its forward pass and gather them again in the
            backward pass; false keeps them from the first micro-batch to the last (ZeRO-2), for a
            small model on slow links.
        prefetch: Blocks that are gathered ahead, in both directions; with 0 torch still gathers one
            in the backward pass; 2 where one block computes
            less long than the next one travels, as with short sequences over many machines.
        accumulate: What is kept between micro-batches: sharded gradients, reduced each time;
            unsharded ones, reduced once a step, for small models on slow links; replica_deferred
            is sharded with the sum over replicas left to the last one, for replicas far apart.
    """

    replicate: int = 1
    shard: int = -1
    tensor: int = 1
    async_tensor: bool = False
    context: int = 1
    recompute: Recompute = "none"
    budget: Bytes | None = None
    reshard: bool = True
    prefetch: int = 1
    accumulate: Literal["sharded", "unsharded", "replica_deferred"] = "sharded"


@dataclass
class KernelsConfig:
    """Which implementations run.

    Args:
        attention: Backend of causal attention; auto is sdpa.
        deterministic: Whether the backward pass of triton and gluon gives the same bits every time;
            false lets it sum with atomic additions.
    """

    attention: Literal["auto", "triton", "gluon", "sdpa", "xformers", "reference"] = "auto"
    deterministic: bool = True


@dataclass
class CheckpointConfig:
    """When the run is saved and what it resumes from.

    Args:
        every: Steps between checkpoints.
        keep: Newest checkpoints that are kept.
        keep_every: Steps between checkpoints that are kept for good; null for none.
        background: Whether a copy is written while training goes on; false needs no memory for it.
        resume: auto takes the newest valid one of the run, never starts a new run only.
        accept_changes: Go on although the configuration changed; the differences are printed.
    """

    every: int = 100
    keep: int = 2
    keep_every: int | None = None
    background: bool = True
    resume: Literal["auto", "never"] = "auto"
    accept_changes: bool = False


@dataclass
class ValidationConfig:
    """Loss on held-out documents, per source.

    Args:
        every: Steps between validations; 0 for none.
        tokens: Tokens per validation over all sources.
    """

    every: int = 50
    tokens: Count = Count(65536)


@dataclass
class GuardConfig:
    """What happens about numbers that cannot be right.

    Args:
        spike: What follows a spike of the loss or the gradient norm: off (a warning), skip (the
            step changes nothing), rewind (to an older checkpoint, then past the batches around it).
        sigma: Standard deviations above the last steps from which on it is a spike.
        window: Steps that these are; before there are as many, nothing is a spike. Made longer in
            the middle of a run, it judges on with those it has.
        rewind_steps: How far before the spike the checkpoint is to lie, where there is one.
        skip_steps: Batches that a rewind passes over, half of them before the spike.
        rewinds: Most rewinds to the same checkpoint.
        patience: Steps in a row that may change nothing before the run stops.
        replicas_every: Steps between comparisons of what several processes hold; 0 for none.
        rerun: Whether a suspicious step is computed twice, to tell bad data from bad hardware by
            the bits; every step then waits for its loss and norm.
    """

    spike: Literal["off", "skip", "rewind", False] = "off"
    sigma: float = 6.0
    window: int = 128
    rewind_steps: int = 100
    skip_steps: int = 200
    rewinds: int = 3
    patience: int = 20
    replicas_every: int = 100
    rerun: bool = False

    def __post_init__(self) -> None:
        self.spike = self.spike or "off"  # YAML reads a bare off as false


@dataclass
class LogConfig:
    """Where numbers go besides metrics.jsonl.

    Args:
        every: Steps between log lines.
        wandb: Weights & Biases mode.
        tensorboard: Write TensorBoard events into the run folder.
        profile: Steps to record for python -m llama.trace, as 10-12; `--profile` for short.
    """

    every: int = 10
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    tensorboard: bool = False
    profile: str | None = None


@dataclass
class Config:
    """A run.

    Args:
        name: The run's folder under runs/.
        seed: Seed of the initial weights and of the data order.
    """

    name: str = "quickstart"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)


# Keys under which a run may be continued with other values without asking: they change neither the
# model nor the data order nor the optimizer's path.
FREE_KEYS = tuple(
    "log. validation. checkpoint. guard. parallel. kernels. data.path train.micro_batch"
    " train.compile train.time_limit train.step_timeout train.save_timeout".split()
)


def parser(prog: str = "python train.py") -> cli.Parser:
    """The parser of every command that takes a run's configuration."""
    p = cli.parser(prog, "Configuration of a run; every key can be given as an option.")
    p.add_argument("--config", action="config", help="A YAML file; several are applied in order.")
    defaults = Config()
    for part in fields(Config):
        value = getattr(defaults, part.name)
        p.add_argument(f"--{part.name}", type=part.type, default=value)  # type: ignore[arg-type]
    return p


def load(argv: Sequence[str], p: cli.Parser | None = None) -> Config:
    """Configuration of a command line; without `--config` the quickstart's.

    Raises `UserError` naming the key and the value for anything that cannot be trained.
    """
    argv = list(argv)
    given = values_of(argv, "--config")
    if not given and (default := CONFIGS / "quickstart.yaml").exists():
        given, argv = [str(default)], ["--config", str(default), *argv]
    for path in given:
        files.read_yaml(path)
    p = p or parser()
    parsed = p.parse_args(argv)
    for part in fields(Config):
        value = parsed[part.name]
        if is_dataclass(part.type) and isinstance(value, list | None):
            raise UserError(f"{part.name} is {value!r}, expected its keys")
    values = p.instantiate(parsed)
    cfg = Config(**{part.name: getattr(values, part.name) for part in fields(Config)})
    if isinstance(cfg.data.mixture, str):
        cfg.data.mixture = read_mixture(_beside(cfg.data.mixture, argv, given))
    check(cfg)
    return cfg


def of_run(run: Path) -> Config:
    """What a run folder was configured with."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    return load(["--config", str(path)])


def values_of(argv: Sequence[str], name: str) -> list[str]:
    """The values of every `--name value` and `--name=value`."""
    words = [arg.split("=", 1) if arg.startswith("--") else [arg] for arg in argv]
    return [value for option, value in pairwise(chain(*words)) if option == name]


def _beside(path: str, argv: Sequence[str], given: Sequence[str]) -> Path:
    """A file named in a YAML lies beside it; one named in an option, in the working folder."""
    if not values_of(argv, "--data.mixture"):
        for file in reversed(given):
            named = files.read_yaml(file).get("data") or {}
            if named.get("mixture") == path:
                return Path(file).parent / path
        if not Path(path).exists():
            return CONFIGS / path
    return Path(path)


def read_mixture(path: str | Path) -> dict[str, float]:
    """Weights of a mixture file, `source: weight` per line.

    Raises `UserError` for weights that are no numbers, not positive, or do not sum to 1.
    """
    return limits.check_weights(files.read_yaml(path), str(path))


def to_dict(cfg: Config) -> dict[str, Any]:
    """Nested plain values, as they are written to YAML and JSON."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(cfg)))
    return found


def to_yaml(cfg: Config) -> str:
    """The configuration as a YAML file that `load` reads back to the same values."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, default_flow_style=None, width=100)


def check(cfg: Config) -> None:
    """`UserError` naming key and value for anything that cannot be trained."""
    limits.check(to_dict(cfg))


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level of dotted ones."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every value that differs between two nested configurations."""
    a, b = flat(old, prefix), flat(new, prefix)
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in a | b if a.get(key) != b.get(key)]


def total_steps(cfg: TrainConfig) -> int:
    """Steps of the whole run: the ramp's, then full batches until `tokens` are reached."""
    left, steps = int(cfg.tokens), 0
    for batch, ramp_steps in cfg.batch_ramp:
        taken = min(ramp_steps, math.ceil(left / batch))
        left, steps = left - taken * batch, steps + taken
        if left <= 0:
            return steps
    return steps + math.ceil(left / cfg.batch_tokens)
