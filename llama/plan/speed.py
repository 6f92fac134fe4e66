"""How long a step takes: a model, a layout and a chip in, seconds by what they are spent on out.

Paper §2.4 and §6. Matrix products, attention and memory traffic run at what the chip reaches, all
divided by one efficiency per software stack, which `llama.plan.published` fits. Collectives take
bytes over bandwidth plus hops times latency, and hide behind the computation as FSDP hides them.
"""

import math
from collections import Counter
from dataclasses import dataclass

from llama import costs
from llama.config import ModelConfig
from llama.costs import Chip, Layout

# Of NCCL's model (src/graph/tuning.cc), ring algorithm: seconds a hop in a machine and between two,
# and the share of the bandwidth, by its protocols simple and LL128. It takes the quicker one.
PROTOCOLS = ((3.4e-6, 9.6e-6, 1.0), (1.9e-6, 4.0e-6, 0.92))
# What collectives reach of the network cards' line rate, and the share of a GPU they take from the
# computation that they hide behind: NCCL runs on up to 32 of the 108 or 132 SMs.
NETWORK_SHARE, TAKEN_SHARE = 0.9, 0.3

# Paper §6: machines take 1.1 times what their GPUs take, a kWh of the US average emits 0.385 kg.
PUE, KG_PER_KWH = 1.1, 0.385


@dataclass(frozen=True)
class Group:
    """Processes of a collective: `size` of them, `stride` ranks apart."""

    chip: Chip
    size: int
    stride: int

    @property
    def inside(self) -> int:
        """Members in one machine."""
        return max(1, min(self.size, self.chip.node // self.stride))

    @property
    def machines(self) -> int:
        return math.ceil(self.size / self.inside)

    def seconds(self, size_bytes: float) -> float:
        """Of an all-gather to, or a reduce-scatter of, so many bytes in every process."""
        if self.size == 1:
            return 0.0
        # the other groups of a machine share its cards
        cards = NETWORK_SHARE * self.chip.node_link * self.inside / self.chip.node
        rate = min(self.chip.link, cards) if self.machines > 1 else self.chip.link
        travelling = size_bytes * (self.size - 1) / self.size
        between = self.machines - 1
        return min(
            travelling / (rate * share) + (self.size - 1 - between) * near + between * far
            for near, far, share in PROTOCOLS
        )

    def all_reduce(self, size_bytes: float) -> float:
        """Twice the bytes; the hops are those of a tree."""
        if self.size == 1:
            return 0.0
        near, far, _ = PROTOCOLS[0]
        hops = 2 * math.log2(self.size) * (far if self.machines > 1 else near)
        moved = self.seconds(size_bytes) - self.seconds(0)
        return 2 * moved + hops


def exposed(transfer: float, computation: float) -> float:
    """Seconds that a transfer adds to the computation it runs beside."""
    hidden = min(transfer, computation)
    return transfer - hidden + TAKEN_SHARE * hidden


@dataclass(frozen=True)
class Step:
    """Seconds of one step, its terms, and what follows from them."""

    terms: dict[str, float]
    tokens_per_gpu: float
    flops: tuple[int, int]
    chip: Chip

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def tokens_per_s(self) -> float:
        """Per GPU."""
        return self.tokens_per_gpu / self.seconds

    @property
    def mfu(self) -> tuple[float, float]:
        """(causal, PaLM), as shares of the chip's peak."""
        causal, palm = (self.tokens_per_s * flops / self.chip.flops for flops in self.flops)
        return causal, palm


def attention_rate(chip: Chip, seq_len: int, head_dim: int) -> float:
    """FLOP/s of causal attention, for a chip that reaches `chip.attention` at 8,192 and 128.

    It reaches half as much of 500 tokens as of very many, and of heads of 16, whose exponentials
    take as long as wide ones'. So FlashAttention-2's figures of A100 and H100 (2k to 16k tokens, 64
    and 128) are met within 4 %.
    """
    short, narrow = (1 + 500 / seq_len) / (1 + 500 / 8192), (1 + 16 / head_dim) / (1 + 16 / 128)
    return chip.attention / (short * narrow)


def step(
    cfg: ModelConfig, at: Layout, chip: Chip, efficiency: float, passes: int, again: float = 0.0
) -> Step:
    """The time of a step of `passes` micro-batches.

    `again` is the share of the matrix products, and of a tensor group's collectives, that selective
    recompute makes once more.
    """
    e, t, d, f = at.element_bytes, at.tensor, cfg.dim, cfg.hidden_dim
    tokens, L, V = at.tokens, cfg.n_layers, cfg.vocab_size or 0
    shapes = costs.shapes(cfg, t)
    block, root = (sum(r * c for r, c in part.values()) for part in shapes)
    rate = attention_rate(chip, at.seq_len, cfg.head_dim)

    def compute(matmul: float, attention: float, moved: float) -> float:
        """Per token: FLOPs of products and of attention, elements read and written, in one GPU."""
        work = matmul / chip.matmul + attention / rate + e * moved / chip.bandwidth
        return tokens * work / efficiency

    # Elements a fused kernel reads and writes: forward twice a norm with its residual (4d), RoPE
    # (4d), SwiGLU (3f); backward as much again, with the sums of attention (2d) and the product
    # made once more. Attention's backward pass is five products to the forward pass's two. A
    # product reads while it multiplies, but writes when a tile is done: a row of its matrix each
    # forward, a column backward, which is much of the time where the other side is short.
    dot, moved = 2 * at.seq_len * d / t, (12 * d + 3 * f) / t
    rows, columns = (sum(w[side] for w in shapes[0].values() if w[1] > 1) for side in (0, 1))
    made = costs.made_again(cfg, t)
    forward = compute(2 * block, dot, moved + rows)
    backward = compute(4 * block, 2.5 * dot, (14 * d + 5 * f) / t + columns)
    again_in = {
        "none": 0.0,
        "manual": compute(0, 0, 4 * d / t),
        "selective": compute(2 * again * block, 0, moved + again * rows),
        "full": compute(2 * sum(r * c for r, c in made), dot, moved + sum(r for r, _ in made)),
    }
    share = {mode: n / L for mode, n in Counter(costs.modes(cfg, at)).items()}
    repeated = sum(again_in[mode] * part for mode, part in share.items())
    # two gathers and two reductions of the sequence's activations each way, in plain sight
    sequence = 4 * Group(chip, t, 1).seconds(e * d * tokens)
    gathered = 2 + share.get("full", 0) + again * share.get("selective", 0)
    # keys and values of other processes pass beside the attention of a process's own; backward,
    # their gradients pass too. What hides them hides no weights.
    attention, kv = compute(0, dot, 0), 2 * e * cfg.kv_heads * cfg.head_dim * tokens / t
    passing = Group(chip, at.context, t).seconds(kv * at.context)
    ring = exposed(passing, attention) + exposed(2 * passing, 2.5 * attention)
    free = forward + sequence - min(passing, attention)
    free_back = backward + repeated + sequence - min(2 * passing, 2.5 * attention)
    beside, edges = _fsdp(at, chip, (block, root), passes, free, free_back)

    terms = {
        "forward pass": passes * L * forward,
        "backward pass": passes * L * backward,
        "made again": passes * L * repeated,
        "head and loss": passes * compute(6 * V * d / t, 0, 4 * V / t + d),
        "tensor parallel": passes * L * gathered * sequence,
        "context parallel": passes * L * ring,
        "FSDP beside them": L * beside,
        "FSDP before and after": edges,
        # reads the gradient, reads and writes float32 weights and both moments
        "optimizer": 28 * (L * block + root) / at.shards / chip.bandwidth / efficiency,
    }
    trained = passes * at.micro_batch * at.seq_len / (t * at.context)
    return Step(terms, trained, costs.flops_per_token(cfg, at.seq_len), chip)


def _fsdp(
    at: Layout, chip: Chip, sizes: tuple[int, int], passes: int, forward: float, backward: float
) -> tuple[float, float]:
    """What a step waits for FSDP: beside the work of each block, and before and after all of it.

    `sizes` are the elements of a block and of the rest, `forward` and `backward` a block's seconds.
    """
    block, root = sizes
    # ranks that share a matrix are neighbours, then those of a sequence, of a copy, of all
    shards = Group(chip, at.shards, at.tensor)
    replicas = Group(chip, at.replicate, at.tensor * at.shards)
    gather, reduce = shards.seconds(at.element_bytes * block), shards.seconds(4 * block)
    copies = replicas.all_reduce(4 * block / at.shards)
    # Weights that stay gathered are asked for once a step; gradients that wait, or wait for the
    # other copies, are reduced, or summed over those, in the last micro-batch alone.
    gathers = passes if at.reshard else 1
    reductions = 1 if at.accumulate == "unsharded" else passes
    sums = passes if at.accumulate == "sharded" else 1

    def beside(reduce: float, copies: float) -> float:
        moved = gather * at.reshard + reduce
        # within a machine FSDP's collectives leave the network to the replicas
        between = max(moved, copies) if shards.machines == 1 else moved + copies
        return exposed(between, backward)

    waited = gathers * exposed(gather, forward) + beside(reduce, copies)
    waited += (passes - 1) * beside(reduce * (reductions > 1), copies * (sums > 1))
    edges = gathers * shards.seconds(at.element_bytes * (root + block))
    edges += reductions * shards.seconds(4 * root)
    edges += sums * replicas.all_reduce(4 * root / at.shards)
    return waited, edges


def energy(gpu_hours: float, watts: float) -> tuple[float, float]:
    """(MWh, tonnes of CO2 equivalent) of a run, by the formula of the paper's §6."""
    mwh = gpu_hours * watts * PUE / 1e6
    return mwh, mwh * KG_PER_KWH
