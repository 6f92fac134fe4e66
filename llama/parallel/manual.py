"""A block's backward pass by hand, keeping only what is dear to compute (paper §2.4).

The block of llama/model.py in, one that computes the same out. Kept for the backward pass: the
block's input, q, k and v, attention's output, the sum that the second norm takes, gate and up:
12 C + 4 F bytes a token in bfloat16. Computed again, by the kernels' own functions: the outputs of
both norms and SwiGLU's product. Weights are kept as they are given, never copied, so that FSDP may
gather and free them around the block.

    y = norm1(x)   q, k = rope(y wqᵀ), rope(y wkᵀ)   v = y wvᵀ   o = attention(q, k, v)
    h = x + o woᵀ   z = norm2(h)   out = h + (silu(z w1ᵀ) · z w3ᵀ) w2ᵀ
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from kernels.dispatch import function
from llama.cli import UserError
from llama.model import Attention, FeedForward, RMSNorm, TransformerBlock
from llama.parallel import tensor
from llama.parallel.tensor import Seam, local

MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
# by the last part of their names
STOCK: dict[str, type[nn.Module]] = {
    "": TransformerBlock,
    "attention": Attention,
    "feed_forward": FeedForward,
    "attention_norm": RMSNorm,
    "ffn_norm": RMSNorm,
} | dict.fromkeys(MATRICES, nn.Linear)
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


class Plan(NamedTuple):
    """What a block is besides its weights.

    Where a sequence is divided over processes, `gather` makes it whole for the matrix products and
    `reduce_scatter` sums their parts and divides them; each is the other's backward.
    """

    block: TransformerBlock
    gather: Seam
    reduce_scatter: Seam


def apply(block: Any, gather: Seam = lambda x: x, reduce_scatter: Seam = lambda x: x) -> None:
    """Give a block of the model this forward and backward pass, in place.

    What it computes is written out here: raises `UserError` for any other block, and so does its
    forward pass once it is changed.
    """
    _check(dict(block.named_modules()))
    block.forward = partial(_forward, Plan(block, gather, reduce_scatter), block.forward)


def _check(parts: dict[str, nn.Module]) -> None:
    """Refuse parts of a block, none of which is called, that are not as the model made them."""
    for path, part in parts.items():
        kind, given = type(part), vars(part)
        called = [f for name in HOOKS for f in given[name].values()] if path else []
        called += [given["forward"]] if "forward" in given else []
        # those of tensor.py are the seams
        more = any(getattr(f, "func", f).__module__ != tensor.__name__ for f in called)
        more |= any(name != "weight" and w is not None for name, w in part._parameters.items())
        if more or kind is not STOCK.get(path.rpartition(".")[2]):
            raise UserError(
                "parallel.recompute manual knows only the stock block, not "
                f"{kind.__name__} as {path or 'block'}{' with additions' * more}: use selective"
            )


# compiling would look into the backward pass, where attention's own is called
@torch.compiler.disable
def _forward(
    plan: Plan, plain: Callable[..., Tensor],
    x: Tensor, freqs_cis: Tensor, docs: Tensor | None = None, cache: Any = None,
) -> Tensor:  # fmt: skip
    if cache is not None or not torch.is_grad_enabled():
        return plain(x, freqs_cis, docs, cache)
    block, a, f = plan.block, plan.block.attention, plan.block.feed_forward
    _check({path: part for path, part in block.named_modules() if path})
    modules = a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3, block.attention_norm, block.ffn_norm
    out: Tensor = _Block.apply(plan, x, freqs_cis, docs, *(local(m.weight) for m in modules))
    return out


class _Block(Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, table: Tensor, docs: Tensor | None, *weights: Tensor
    ) -> Tensor:
        block, (wq, wk, wv, wo, w1, w2, w3, norm1, norm2) = plan.block, weights
        y = plan.gather(function("rms_norm_forward", x)(x, norm1, block.attention_norm.eps)[0])
        q, k, v = (
            F.linear(y, w).unflatten(-1, (-1, block.attention.head_dim)) for w in (wq, wk, wv)
        )
        del y
        rope = function("rope_forward", x)
        # attention keeps what its own backward pass needs
        with torch.enable_grad():
            heads = [t.detach().requires_grad_() for t in (rope(q, table), rope(k, table), v)]
            mixed = block.attention.attend(heads[0], heads[1], heads[2], docs)
        del q, k, v
        projected = plan.reduce_scatter(F.linear(mixed.detach().flatten(2), wo))
        z, h, _ = function("add_rms_norm_forward", x)(projected, x, norm2, block.ffn_norm.eps)
        z = plan.gather(z)
        gate, up = F.linear(z, w1), F.linear(z, w3)
        del z
        product = function("swiglu_forward", x)(gate, up)
        out = h + plan.reduce_scatter(F.linear(product, w2))
        ctx.plan, ctx.heads, ctx.mixed = plan, heads, mixed
        ctx.save_for_backward(x, table, h, gate, up, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # first, as it says what is wrong where all are gone
        x, table, h, gate, up, wq, wk, wv, wo, w1, w2, w3, norm1, norm2 = ctx.saved_tensors
        plan, heads, mixed = ctx.plan, ctx.heads, ctx.mixed
        # from here on each goes as soon as it is not needed, unless backward is to run again
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        ctx.maybe_clear_saved_tensors()
        if not again:
            del ctx.heads, ctx.mixed
        norm = function("rms_norm_forward", x)
        wanted = dict(zip(MATRICES, ctx.needs_input_grad[4:], strict=False))

        def of(matrix: str, grad: Tensor, x: Tensor) -> Tensor | None:
            """Gradient of the matrix w of x wᵀ, unless it is frozen."""
            return grad.flatten(0, -2).t() @ x.flatten(0, -2) if wanted[matrix] else None

        # the feed-forward half
        whole = plan.gather(grad)
        to_gate, to_up, product = function("swiglu_backward_with_product", x)(whole @ w2, gate, up)
        z, scale = norm(h, norm2, plan.block.ffn_norm.eps)
        z = plan.gather(z)
        of_feed_forward = of("w1", to_gate, z), of("w2", whole, product), of("w3", to_up, z)
        del z, product, whole, gate, up
        to_z = _sum_of_products((to_up, w3), (to_gate, w1))
        del to_gate, to_up
        to_h, of_norm2 = function("add_rms_norm_backward", x)(
            plan.reduce_scatter(to_z), grad, h, norm2, scale
        )
        del to_z, h

        # the attention half
        whole = plan.gather(to_h)
        of_wo = of("wo", whole, mixed.detach().flatten(2))
        to_mixed = (whole @ wo).view_as(mixed)
        to_q, to_k, to_v = torch.autograd.grad(mixed, heads, to_mixed, again)
        del whole, to_mixed, mixed, heads
        back = function("rope_backward", x)
        to_q, to_k, to_v = (t.flatten(2) for t in (back(to_q, table), back(to_k, table), to_v))
        y, scale = norm(x, norm1, plan.block.attention_norm.eps)
        y = plan.gather(y)
        of_attention = of("wq", to_q, y), of("wk", to_k, y), of("wv", to_v, y)
        del y
        to_y = _sum_of_products((to_v, wv), (to_k, wk), (to_q, wq))
        to_x, of_norm1 = function("add_rms_norm_backward", x)(
            plan.reduce_scatter(to_y), to_h, x, norm1, scale
        )
        return None, to_x, None, None, *of_attention, of_wo, *of_feed_forward, of_norm1, of_norm2


def _sum_of_products(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Σ x w of (B, T, .) and matrices, in place."""
    (x, w), *others = pairs
    total = x @ w
    for x, w in others:
        total += x @ w
    return total
