"""What a model costs: parameters, FLOPs and bytes of a configuration, and what chips can do.

A configuration and a layout in, numbers out: a run, its plan and its out-of-memory message ask the
same functions. A multiplication and an addition count as two FLOPs, the backward pass as twice the
forward pass, recomputation as nothing; norms, RoPE and softmax are left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from llama import files
from llama.cli import as_user_error, expect
from llama.config import ModelConfig

CHIPS_FILE = Path(__file__).with_name("chips.yaml")
Shapes = dict[str, tuple[int, int]]


# -- chips -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """What one GPU can do, and its place in the usual machine; one entry of chips.yaml.

    Args:
        driver: Name that the driver, and so torch, gives it.
        flops: Dense bf16 peak per second, from the maker's data sheet.
        matmul: What the best shapes of matrix products reach of it.
        attention: What causal attention reaches both ways: 8,192 tokens, head size 128.
        memory: Bytes that torch finds.
        bandwidth: Bytes per second of its memory, by the data sheet.
        link: Bytes per second to its neighbours in a machine, as collectives reach it.
        node_link: Bytes per second of all network cards of a machine together.
        watts: Its power limit, which the paper counts (§6).
        node: GPUs in a machine.
    """

    driver: str
    flops: float
    matmul: float
    attention: float
    memory: float
    bandwidth: float
    link: float
    node_link: float
    watts: float
    node: int = 8


@cache
def chips() -> dict[str, Chip]:
    """The table by name. Raises `UserError` naming an entry that is no chip, and why."""
    return {name: _chip(name, facts) for name, facts in files.read_yaml(CHIPS_FILE).items()}


def _chip(name: str, facts: Any) -> Chip:
    kinds = {"driver": str, "node": int}
    with as_user_error(f"{CHIPS_FILE}: {name}", TypeError, ValueError, AttributeError):
        # to YAML, 312e12 without a point and a sign is text
        chip = Chip(**{key: kinds.get(key, float)(value) for key, value in facts.items()})
    for key, value in vars(chip).items():
        what = f"{CHIPS_FILE}: {name}.{key} is {value}"
        expect(key == "driver" or 0 < value < math.inf, what, "more than 0")
    return chip


def chip_of(device_name: str) -> Chip | None:
    """The chip that torch calls so; None for one that is not in the table."""
    return next((chip for chip in chips().values() if chip.driver == device_name), None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a chip as torch names it; None for one that is not in the table."""
    return chip.flops if (chip := chip_of(device_name)) else None


# -- parameters and FLOPs --------------------------------------------------------------------------


def shapes(cfg: ModelConfig, tensor: int = 1) -> tuple[Shapes, Shapes]:
    """(rows, columns) by name of a block's weights and of the others, in one of `tensor` processes.

    Gains of norms have one column. Rows of wq, wk, wv, w1, w3 and of both vocabulary matrices are
    divided, columns of wo and w2 (Shoeybi et al. 2019).
    """
    assert cfg.vocab_size, "the vocabulary size is known before costs are asked for"
    C, F, V = cfg.dim, cfg.hidden_dim // tensor, cfg.vocab_size // tensor
    heads, kv_heads = C // tensor, cfg.kv_heads * cfg.head_dim // tensor
    block = {
        "attention.wq": (heads, C), "attention.wk": (kv_heads, C), "attention.wv": (kv_heads, C),
        "attention.wo": (C, heads), "feed_forward.w1": (F, C), "feed_forward.w2": (C, F),
        "feed_forward.w3": (F, C), "attention_norm": (C, 1), "ffn_norm": (C, 1),
    }  # fmt: skip
    return block, {"tok_embeddings": (V, C), "output": (V, C), "norm": (C, 1)}


def _count(weights: Iterable[tuple[int, int]], shard: int = 1) -> int:
    """Weights, or what one of `shard` processes holds: FSDP divides rows, rounded up."""
    return sum(math.ceil(rows / shard) * columns for rows, columns in weights)


def matmul_parameters(cfg: ModelConfig) -> int:
    """Weights that a token is multiplied with: all matrices but the embedding."""
    block, rest = shapes(cfg)
    matrices = (w for w in block.values() if w[1] > 1)
    return cfg.n_layers * _count(matrices) + _count([rest["output"]])


def made_again(cfg: ModelConfig, tensor: int = 1) -> list[tuple[int, int]]:
    """Matrices of a block whose products full recompute makes once more: torch stops before the
    last, as nothing in the backward pass needs what it gives."""
    block, _ = shapes(cfg, tensor)
    return [w for name, w in block.items() if w[1] > 1 and name != "feed_forward.w2"]


def parameters(cfg: ModelConfig) -> int:
    """All weights: matrices, embedding, and the gains of two norms a block and one at the end."""
    block, rest = shapes(cfg)
    return cfg.n_layers * _count(block.values()) + _count(rest.values())


def flops_per_token(cfg: ModelConfig, seq_len: int) -> tuple[int, int]:
    """Training FLOPs per token, forward and backward: (causal, PaLM).

    6 per matrix weight, and for attention's two products 12·L·T·dim as in the PaLM paper (Chowdhery
    et al. 2022, appendix B), or half of that when only the causal half is counted.
    """
    matmul = 6 * matmul_parameters(cfg)
    attention = 6 * cfg.n_layers * seq_len * cfg.dim
    return matmul + attention, matmul + 2 * attention


# -- bytes -----------------------------------------------------------------------------------------


def checkpoint_bytes(cfg: ModelConfig) -> int:
    """Size of a checkpoint: weights and both moments of AdamW in float32."""
    return 3 * 4 * parameters(cfg)


@dataclass(frozen=True)
class Layout:
    """How a step is spread: what decides the bytes and the speed of one process.

    `accumulates`: whether a step has several micro-batches. `documents`: whether attention stays
    inside them. `own_attention`: by the Triton kernels. `on_gpu`: with the others of them.
    `budget`: bytes that `recompute` budget may keep for the backward pass.
    """

    seq_len: int
    micro_batch: int = 1
    shard: int = 1
    replicate: int = 1
    tensor: int = 1
    context: int = 1
    recompute: str = "none"
    element_bytes: int = 2
    accumulates: bool = False
    documents: bool = False
    own_attention: bool = False
    on_gpu: bool = True
    budget: int = 0
    accumulate: str = "sharded"
    reshard: bool = True
    prefetch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass in one process; its `tensor` group shares them."""
        return self.micro_batch * self.seq_len // self.context

    @property
    def gpus(self) -> int:
        return self.shard * self.replicate * self.tensor * self.context

    @property
    def shards(self) -> int:
        """Processes that FSDP divides a weight over: those of one sequence share one copy too."""
        return self.shard * self.context


def kept_by_block(cfg: ModelConfig, at: Layout, mode: str) -> int:
    """Bytes that a block keeps for the backward pass in one process: in bf16 16d + 6f a token by
    `none`.

    none: the input and output of both norms, q, k, v, the attention's output, gate, up and their
    product. manual: without the outputs of norms and the product (12d + 4f). selective: the block's
    input and the outputs of all seven matrix products and of attention (14d + 4f). full: the input.
    Beside them one float32 number a head (attention) and a norm of none; of our own attention in
    float64, or in half precision what its rounding cut off, a byte each.

    A tensor group shares them, but each of it has whole sequences of what its first products take,
    and selective of what its last give. Processes of a sequence keep the attention's output in two
    pieces and once more in one, manual its own keys and values twice.
    """
    e, divided = at.element_bytes, at.context > 1
    d, kv, f = cfg.dim, 2 * cfg.kv_heads * cfg.head_dim, cfg.hidden_dim
    whole, pieces = 2 * d * at.tensor, d * divided
    elements, sums = {
        "none": (4 * d + kv + 3 * f + pieces + whole, cfg.n_heads + 2),
        "manual": (4 * d + kv + 2 * f + pieces + kv * divided, cfg.n_heads),
        "selective": (3 * d + kv + 2 * f + whole, cfg.n_heads),
        "full": (d, 0),
    }[mode]
    # sdpa makes a mask where there are more keys than queries: those of the second piece
    masked = divided and mode in ("none", "manual") and not (at.documents or at.own_attention)
    rows = e * at.seq_len**2 // (2 * at.context) if masked else 0
    own = (d if e < 4 else 4 * cfg.n_heads) if at.own_attention and mode != "full" else 0
    return (e * elements + 4 * sums + own) * at.tokens // at.tensor + rows


def mask(at: Layout) -> int:
    """Bytes of sdpa's mask of documents, one for all blocks; of two pieces of queries where others
    have the rest of the sequence."""
    T, c, masked = at.seq_len, at.context, at.documents and not at.own_attention
    keys = T if c == 1 else T * (2 * c + 1) // (4 * c)
    return masked * at.element_bytes * at.tokens * (-(-keys // 8) * 8)


def kept_by_inputs(cfg: ModelConfig, at: Layout) -> int:
    """Bytes of token ids, documents, their mask and RoPE's table, which the last block's backward
    pass ends."""
    table = 4 * cfg.head_dim * 2 ** math.ceil(math.log2(at.seq_len))
    return table + (4 + 8 + 8 * at.documents) * at.tokens + mask(at)


def kept_by_the_rest(cfg: ModelConfig, at: Layout) -> int:
    """Bytes kept by the last norm, the head (both gradients), token ids, RoPE's table, the mask."""
    logits = 4 * (cfg.vocab_size or 0) * cfg.dim // at.tensor
    # the head gives gradients of whole sequences
    per_token = at.element_bytes * cfg.dim * (1 + at.tensor) // at.tensor
    return logits + per_token * at.tokens + kept_by_inputs(cfg, at)


def modes(cfg: ModelConfig, at: Layout) -> list[str]:
    """What each block recomputes. `budget` makes the fewest products again that keep to the bytes:
    the first blocks full, then manual, which makes none again, and none where there is room.

    The first ones, as their backward pass comes last, when nothing else is kept any more. Where the
    bytes do not suffice for that all blocks are full.
    """
    L = cfg.n_layers
    if at.recompute != "budget":
        return [at.recompute] * L
    none, manual, full = (kept_by_block(cfg, at, mode) for mode in ("none", "manual", "full"))
    room = max(0, at.budget - kept_by_the_rest(cfg, at) - L * full)
    by_hand = min(L, room // max(1, manual - full))
    plain = min(by_hand, (room - by_hand * (manual - full)) // max(1, none - manual))
    return ["full"] * (L - by_hand) + ["manual"] * (by_hand - plain) + ["none"] * plain


def kept(cfg: ModelConfig, at: Layout) -> int:
    """Bytes between the forward and the backward pass that only the latter needs."""
    blocks = sum(kept_by_block(cfg, at, mode) for mode in modes(cfg, at))
    return blocks + kept_by_the_rest(cfg, at)


def memory(cfg: ModelConfig, at: Layout) -> dict[str, dict[str, int]]:
    """Bytes of a process by phase of a step, and in it by what they hold; the largest is the peak.

    Counted as FSDP2 allocates: float32 weights, gradients and moments divided over the processes;
    a block gathered in the type of the forward pass with the next ones fetched ahead, or all of
    them throughout; gradients of a block reduced in float32 while the next one is computed, those
    of several micro-batches kept as `accumulate` says; the root gathered throughout.
    """
    e, t, n, L, tokens = at.element_bytes, at.tensor, at.shards, cfg.n_layers, at.tokens
    block, root = (_count(part.values()) for part in shapes(cfg, t))
    block_share, root_share = (_count(part.values(), n) for part in shapes(cfg, t))
    share = L * block_share + root_share
    d, head = cfg.dim, (cfg.vocab_size or 0) * cfg.dim // t
    each = modes(cfg, at)
    # by the blocks before the i-th
    by_blocks = (kept_by_block(cfg, at, mode) for mode in each)
    kept = list(accumulate(by_blocks, initial=kept_by_inputs(cfg, at)))
    # FSDP makes a copy of the weights even where it has only to cast them, and a buffer where they
    # travel; a single process in float32 does without it. In the backward pass it fetches one block
    # ahead even where none is asked for
    copies, travels, fetched = at.gpus > 1 or e < 4, n > 1, (n > 1) * max(1, at.prefetch)
    V = head // d
    if at.on_gpu:
        # kernels/cross_entropy.py: logits become their gradient in place; the next piece's are made
        # beside it
        rows = min(tokens, max(1, 2**27 // V // 256) * 256)
        logits = e * rows * max(V * (1 + (rows < tokens)), V + d)
    else:
        # kernels/eager.py: cast to float32; a piece's gradient is still there with the next piece,
        # and while it is multiplied
        rows = min(tokens, max(128, 2**20 // V))
        wide, after, product = (6 if e < 4 else 4), min(rows, tokens - rows), V if e < 4 else rows
        logits = max(V * max(wide * rows, wide * after + e * rows), e * (V * rows + product * d))
    # unsharded gradients wait for the last micro-batch whole, in float32
    waits = copies and at.accumulates and at.accumulate == "unsharded"
    # a plain module sums its gradients as they come, and so do those that wait in float32
    at_once = waits or (at.accumulates and not copies)
    fresh = e * (not at_once or e < 4)
    # FSDP gives up what it sums over replicas at the end of the pass, unless gradients are in it
    summed = at.accumulates and at.replicate > 1 and at.accumulate == "sharded"
    found = {}

    def phase(name: str, gradients: int, activations: int, gathered: int, working: int) -> None:
        found[name] = {
            "parameters": 4 * share,
            "gradients": gradients if waits or not at.accumulates else 4 * share,
            "optimizer": 8 * share,
            "activations": activations,
            "gathered and in flight": gathered,
            "working set": working,
        }

    last = 2 * e * d * tokens // t + (t > 1) * e * d * tokens
    in_loss = e * d * tokens + 4 * head + logits
    there = waits * 4 * (L * block + root)
    stay, arrives = e * copies * (root + (not at.reshard) * L * block), travels * e * block
    # where blocks stay, only the first micro-batch gathers any, and no gradients are there then
    before = 0 if at.reshard or not at.accumulates else there or 4 * share
    # the root's buffer goes when the first block has been copied out of its own
    held = e * copies * (root + block) + travels * e * (root + min(L, max(1, at.prefetch)) * block)
    held = max(e * copies * (root + block), held - before)
    phase("first block, forward pass", there, kept[0], held, e * d * tokens // t)
    if not at.reshard:
        # the buffers of the last block and of the one before, which goes when this one is copied
        held = stay + max(0, 2 * arrives - before)
        phase("last block, forward pass", there, kept[L - 1], held, e * d * tokens // t)
    phase("loss", there, kept[L] + last, stay + max(0, arrives - before), in_loss)
    # both gradients of the head once more, to scale them, with the first blocks fetched ahead
    held = stay + at.reshard * min(L, at.prefetch) * arrives
    in_head = 2 * e * d * tokens + (4 + e) * head
    phase("head, backward pass", there, kept[L] + e * d * tokens // t, held, in_head)
    # the fullest moment is at an end, where no more is fetched ahead, or where the mode changes
    changes = {i + n for i in range(1, L) if each[i] != each[i - 1] for n in (-2, -1, 0, 1)}
    stays = at.accumulates and not at.reshard and not waits
    for i in sorted({i for i in (0, 1, at.prefetch, L - 2, L - 1, *changes) if 0 <= i < L}):
        done = 4 * (L - 1 - i) * block_share
        output = done * summed
        # without resharding all blocks stay for the next micro-batch, in the last one those to come
        others = min(i, fetched) if at.reshard else L - 1 if at.accumulates else i
        ahead = e * copies * (root + others * block)
        waiting = waits * 4 * (root + i * block)
        name = f"block {i + 1}, backward pass"
        held = ahead + e * copies * block + output + 4 * copies * (i < L - 1) * block
        working = fresh * head + _inside_block(cfg, at, each[i], block, fresh)
        phase(name, done + waiting + waits * 4 * block, kept[i], held, working)
        # gradients when they are put together, or what they sum to. Weights of one process are
        # not given up before, nor at all those that stay for another pass
        fresh_block = e * (not at_once) * block + (n == 1) * e * copies * block * (not stays)
        held = ahead + e * copies * stays * block + output + 4 * copies * block
        reduced = max(fresh_block, 4 * copies * block_share) + fresh * head + e * tokens * d // t
        phase(f"block {i + 1}, reduction", done + waiting, kept[i], held, reduced)
    held = copies * (4 * root + e * stays * (root + L * block)) + 4 * L * block_share * summed
    # the root's gradients when they are put together, or what they sum to, with the head's
    reduced = max(e * (not at_once) * root, copies * (4 * root_share + fresh * head))
    phase("end of the backward pass", 4 * (L * block_share + waits * root), 0, held, reduced)
    phase("update", 4 * share, 0, 0, 0)
    return found


def _inside_block(cfg: ModelConfig, at: Layout, mode: str, block: int, fresh: int) -> int:
    """Most bytes with which the backward pass of one block works, its activations among them.

    `block`: its weights in one process; `fresh`: bytes of a gradient that is not summed up at once.
    """
    e, t, tokens, d, f = at.element_bytes, at.tensor, at.tokens, cfg.dim, cfg.hidden_dim
    by_hand, kv = mode == "manual", 2 * cfg.kv_heads * cfg.head_dim
    unit, whole = e * tokens // t, kept_by_block(cfg, at, "none")
    if by_hand:
        # such a block gives all of its gradients at its end. In its feed-forward half there are,
        # beside what it keeps and the gradient of its output, either five of SwiGLU's tensors, or,
        # with the gradients of its matrices, three and the norm's output once more
        own = kept_by_block(cfg, at, mode) + unit * d * (1 + (t > 1) * t)
        halves = unit * 4 * f, unit * (3 * f + d * t) + 3 * e * d * f // t
        most = max(*(own + half for half in halves), e * block + unit * (5 * d + kv))
    else:
        # torch stops computing again before the last product, so what is kept of it stays
        whole += (mode == "selective") * unit * d * t
        # in SwiGLU's backward pass the product is gone; gradients of it, of gate and up are there
        most = whole + unit * (d + 2 * f) + e * min(tokens * f // t, 2**17)
        # gradients that wait in float32 take each fresh one in at once
        most = max(most + e * d * f // t, max(fresh * block, e * d * f // t) + unit * t * d)
        if t > 1:
            # gradients of whole sequences: of the block's output with that of the product, or of
            # both products; where nothing is computed again also while it is put together
            first = whole + unit * (d * t + d + f) + e * d * f // t
            last = whole + unit * (2 * d * t + d - 2 * f) + 3 * fresh * d * f // t
            before = (mode == "none") * (whole + unit * (2 * d * t + d))
            most = max(most, first, last, before)
    if at.context > 1:
        # in its backward pass attention has keys, values and their gradients of whole sequences,
        # gathered and in order, beside the gradients of all matrices behind it
        behind = e * (3 * d * f + d * d) // t
        # by hand its own keys and values, and their gradients beside those of all
        behind += by_hand * 2 * unit * kv
        most = max(most, whole + behind + unit * (d + 4 * kv * at.context - 3 * f))
    return most


def peak(cfg: ModelConfig, at: Layout) -> tuple[str, dict[str, int]]:
    """The phase of a step that takes most memory, and its parts."""
    return max(memory(cfg, at).items(), key=lambda phase: sum(phase[1].values()))


def needed(cfg: ModelConfig, at: Layout) -> int:
    """Bytes of a process at the fullest moment of a step."""
    return sum(peak(cfg, at)[1].values())
