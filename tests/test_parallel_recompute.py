"""Every mode of recompute gives the gradients of `none`, and keeps the bytes that are promised."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from made_kernels import Exchange, in_threads
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention
from llama import costs
from llama.cli import UserError
from llama.config import Bytes, Config, ModelConfig, ParallelConfig
from llama.costs import Layout
from llama.model import Transformer, TransformerBlock
from llama.parallel import fsdp, manual, recompute
from llama.parallel.layout import resolve

MODES = ("none", "manual", "selective", "full")


@pytest.fixture(autouse=True)
def seeded(rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(2**31))


def model(cfg: ModelConfig, dtype: torch.dtype = torch.float32, mode: str = "none") -> Transformer:
    made = Transformer(cfg, "sdpa")
    made.init_weights(0)
    recompute.apply(made, [mode] * cfg.n_layers)
    return made.to(dtype)


def gradients(made: Transformer, tokens: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    losses, _ = made(tokens[:, :-1], tokens[:, 1:], ids)
    losses.sum().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None} | {
        "loss": losses.detach()
    }


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_have_the_bits_of_none(mode: str, dtype: torch.dtype, documents: bool) -> None:
    cfg = ModelConfig(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=97)
    tokens = torch.randint(97, (2, 31))
    ids = (torch.rand(2, 30) < 0.1).cumsum(1) if documents else None
    expected = gradients(model(cfg, dtype), tokens, ids)
    found = gradients(model(cfg, dtype, mode), tokens, ids)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_gradcheck_of_the_block_by_hand() -> None:
    cfg = ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=5)
    block = model(cfg, torch.float64, "manual").layers[0]
    names, weights = zip(*block.named_parameters(), strict=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    table = torch.polar(torch.ones(5, 2), torch.rand(5, 2))

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x, table))

    torch.autograd.gradcheck(run, (x, *weights))


@pytest.mark.parametrize("mode", ["none", "manual"])
def test_the_bytes_kept_are_those_of_the_formula(mode: str) -> None:
    cfg = ModelConfig(dim=96, n_layers=4, n_heads=6, n_kv_heads=3, vocab_size=64)
    made, tokens = model(cfg, mode=mode), torch.randint(64, (2, 129))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses, _ = made(tokens[:, :-1], tokens[:, 1:])
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    size = sum(n for place, n in kept.items() if place not in weights)
    # beside the blocks: the head's two gradients, the last norm's input, RoPE's table
    C, N = cfg.dim, tokens.shape[0] * 128
    rest = 4 * (64 * C + 2 * N * C + N) + 8 * 128 * cfg.head_dim // 2
    at = Layout(128, tokens.shape[0], element_bytes=4)
    blocks = cfg.n_layers * costs.kept_by_block(cfg, at, mode)
    assert abs(size - rest - blocks) <= 0.005 * size
    del losses


def test_frozen_weights_have_no_gradient() -> None:
    cfg = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=11)
    made, tokens = model(cfg, mode="manual"), torch.randint(11, (1, 9))
    made.layers[0].attention.wk.weight.requires_grad_(False)
    found = gradients(made, tokens, None)
    assert "layers.0.attention.wk.weight" not in found
    assert "layers.0.attention.wv.weight" in found


def test_generating_goes_the_plain_way() -> None:
    cfg = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=11)
    tokens = torch.randint(11, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(cfg, mode="manual")(tokens), model(cfg)(tokens))


class ParallelBlock(TransformerBlock):
    pass


class Adapted(nn.Linear):
    """A low-rank addition to a matrix."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, bias=False)
        self.weight, self.up = of.weight, nn.Parameter(torch.ones(of.out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :1] @ self.up.t()


def double(*given: Any) -> Any:
    """As a hook or a forward."""
    return 2 * given[-1]


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "child": ("Linear as more", lambda block: block.add_module("more", nn.Linear(1, 1))),
    "norm": ("LayerNorm as ffn_norm", lambda block: setattr(block, "ffn_norm", nn.LayerNorm(16))),
    "adapter": (
        "Adapted as attention.wq",
        lambda block: setattr(block.attention, "wq", Adapted(block.attention.wq)),
    ),
    "bias": (
        "Linear as feed_forward.w2 with additions",
        lambda block: setattr(block.feed_forward.w2, "bias", nn.Parameter(torch.ones(16))),
    ),
    "norms of heads": (
        "LayerNorm as attention.q_norm",
        lambda block: block.attention.add_module("q_norm", nn.LayerNorm(8)),
    ),
    "forward": (
        "FeedForward as feed_forward with additions",
        lambda block: setattr(block.feed_forward, "forward", double),
    ),
    "hook": (
        "Linear as attention.wv with additions",
        lambda block: block.attention.wv.register_forward_hook(double),
    ),
    "hook before": (
        "Attention as attention with",
        lambda block: block.attention.register_forward_pre_hook(double),
    ),
    "hook behind": (
        "RMSNorm as attention_norm with",
        lambda block: block.attention_norm.register_full_backward_hook(double),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("later", [False, True])
def test_a_changed_block_is_refused_by_name(change: str, later: bool) -> None:
    block = TransformerBlock(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=11), "sdpa")
    name, make = CHANGES[change]
    if later:
        manual.apply(block)
    make(block)
    with pytest.raises(
        UserError, match=f"manual knows only the stock block, not {name}.*: use selective"
    ):
        if later:
            block(torch.randn(1, 3, 16), torch.ones(3, 4, dtype=torch.complex64))
        manual.apply(block)


def test_another_class_or_forward_of_the_block_is_refused_by_name() -> None:
    cfg = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=11)
    with pytest.raises(UserError, match="not ParallelBlock as block: use selective"):
        manual.apply(ParallelBlock(cfg, "sdpa"))
    block = TransformerBlock(cfg, "sdpa")
    block.forward = double  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not TransformerBlock as block with additions"):
        manual.apply(block)


def test_what_is_read_from_the_parts_is_read_when_it_runs(rng: random.Random) -> None:
    cfg = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=11)
    tokens, found = torch.randint(11, (2, 9)), {}
    for mode in ("none", "manual"):
        made = model(cfg, torch.float64, mode)
        block = made.layers[0]
        block.attention_norm.eps, block.ffn_norm.eps = 0.5, 0.25
        attend = block.attention.attend
        block.attention.attend = lambda *given, attend=attend: 3 * attend(*given)
        block.register_forward_hook(lambda block, given, out: 2 * out)
        found[mode] = gradients(made, tokens, None)
    for name, gradient in found["none"].items():
        assert torch.equal(found["manual"][name], gradient), name


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_has_weights_of_its_own(mode: str) -> None:
    cfg = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=11)
    tokens, made = torch.randint(11, (2, 9)), model(cfg, mode=mode)
    other = copy.deepcopy(made)
    expected = gradients(model(cfg), tokens, None)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    found = gradients(other, tokens, None)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(p.grad is None for p in made.parameters())


@pytest.mark.parametrize("mode", ["none", "manual", "full"])
def test_a_block_goes_back_twice_only_where_it_is_asked_to(mode: str) -> None:
    """Torch refuses the second time for selective in any case."""
    made = model(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=11), mode=mode)
    block, x = made.layers[0], torch.randn(1, 5, 16, requires_grad=True)
    out = block(x, made.rotations(5, x.device)).square().sum()
    out.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    out.backward()
    assert len(once) == 9
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in block.named_parameters())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


@pytest.mark.parametrize("mode", ["full", "selective", "manual"])
def test_blocks_are_compiled_in_every_mode_but_manual(mode: str) -> None:
    cfg = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=11)
    made, tokens = model(cfg, mode=mode), torch.randint(11, (2, 9))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    for block in made.layers:
        block.compile(backend=backend)  # type: ignore[operator]
    expected = gradients(model(cfg), tokens, None)
    for _ in range(2):
        made.zero_grad()
        for name, gradient in gradients(made, tokens, None).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    # one for all blocks and steps
    assert len(graphs) == (mode != "manual")


def test_a_sequence_that_is_divided_goes_through_both_seams() -> None:
    """Two shards of the sequence and of the heads, one after the other: the whole block's values.

    Each shard's products need the other's inputs: both run in threads that meet in the seams.
    """
    cfg = ModelConfig(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=11)
    block = model(cfg, torch.float64).layers[0]
    assert isinstance(block, TransformerBlock)
    table = torch.polar(torch.ones(6, 2), torch.rand(6, 2))
    x, grad = torch.randn(2, 1, 6, 16, dtype=torch.float64)
    x.requires_grad_()
    out = block(x, table)
    expected = torch.autograd.grad(out, [x, *block.parameters()], grad)
    names = [name for name, _ in block.named_parameters()]

    def work(rank: int, exchange: Exchange) -> list[Tensor]:
        mine = slice(3 * rank, 3 * rank + 3)
        shard = TransformerBlock(cfg, "sdpa").double()
        for name, weight in block.named_parameters():
            part = weight.detach()
            if weight.dim() == 2:
                by_column = name.endswith(("wo.weight", "w2.weight"))
                part = part.chunk(2, dim=int(by_column))[rank]
            module, _, leaf = name.rpartition(".")
            setattr(shard.get_submodule(module), leaf, nn.Parameter(part.clone()))

        def gather(t: Tensor) -> Tensor:
            return torch.cat(exchange(rank, t), 1)

        def reduce_scatter(t: Tensor) -> Tensor:
            return sum(exchange(rank, t))[:, mine]

        manual.apply(shard, gather, reduce_scatter)
        local = x.detach()[:, mine].requires_grad_()
        found = shard(local, table)
        return [found, *torch.autograd.grad(found, [local, *shard.parameters()], grad[:, mine])]

    first, second = in_threads(2, work)
    torch.testing.assert_close(torch.cat([first[0], second[0]], 1), out)
    torch.testing.assert_close(torch.cat([first[1], second[1]], 1), expected[0])
    for name, whole, a, b in zip(names, expected[1:], first[2:], second[2:], strict=True):
        if whole.dim() == 1:
            joined = a + b
        else:
            joined = torch.cat([a, b], int(name.endswith(("wo.weight", "w2.weight"))))
        torch.testing.assert_close(joined, whole, msg=name)


# -- a budget --------------------------------------------------------------------------------------


def held(made: Transformer, tokens: Tensor, documents: bool) -> tuple[int, Tensor]:
    """Bytes that live between the forward and the backward pass besides weights, and the loss."""
    tracker = MemTracker()
    tracker.track_external(made)
    with tracker:
        ids = (tokens[:, :-1] == 0).cumsum(1) if documents else None
        losses, _ = made(tokens[:, :-1], tokens[:, 1:], ids)
        total = tracker.get_tracker_snapshot()[tokens.device]["Total"]
    return total - sum(p.nbytes for p in made.parameters()), losses


def test_a_budget_is_kept_to_and_used_with_the_gradients_of_none(rng: random.Random) -> None:
    seen = set()
    for share in (0.1, 0.4, 0.6, 0.8, 0.9, 1.05):
        heads = rng.choice([2, 4])
        cfg = ModelConfig(32 * heads, rng.randrange(3, 7), heads, vocab_size=64)
        inside = rng.random() < 0.5
        at = Layout(
            64 * rng.randrange(1, 4), 2, recompute="budget", element_bytes=4, documents=inside
        )
        least, most = (costs.kept(cfg, replace(at, recompute=mode)) for mode in ("full", "none"))
        share += rng.uniform(-0.05, 0.05)
        at = replace(at, budget=int(least + share * (most - least)))
        modes = costs.modes(cfg, at)
        seen |= set(modes)
        made = Transformer(cfg, "sdpa")
        made.init_weights(0)
        recompute.apply(made, modes)
        tokens = torch.randint(64, (2, at.seq_len + 1))
        size, losses = held(made, tokens, inside)
        blocks = {mode: costs.kept_by_block(cfg, at, mode) for mode in ("full", "manual", "none")}
        # losses, counts and token ids of two windows are not worth a line in the arithmetic
        assert size <= at.budget + 64, (modes, size, at)
        assert abs(size - costs.kept(cfg, at)) <= 0.01 * size, (modes, size, costs.kept(cfg, at))
        if "full" in modes:
            assert size + blocks["manual"] - blocks["full"] > 0.99 * at.budget
            # fewest products again: no block keeps more than manual while another is full
            assert "none" not in modes or at.budget - size < blocks["manual"] - blocks["full"]
        elif "manual" in modes:
            assert size + blocks["none"] - blocks["manual"] > 0.99 * at.budget
        losses.sum().backward()
        ids = (tokens[:, :-1] == 0).cumsum(1) if inside else None
        expected = gradients(model(cfg), tokens, ids)
        for name, p in made.named_parameters():
            assert p.grad is not None and torch.equal(p.grad, expected[name]), (name, modes)
    assert len(seen) == 3, seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_what_is_kept_beside_documents_and_by_our_own_attention(
    mode: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels themselves are not run: torch knows the shapes of what they return."""
    monkeypatch.setattr(attention, "choose", lambda name, *_: name)
    cfg = ModelConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=64)
    at = Layout(
        256, 2, recompute=mode, element_bytes=dtype.itemsize,
        documents=True, own_attention=backend == "triton",
    )  # fmt: skip
    made = Transformer(cfg, backend).to(dtype)
    with FakeTensorMode() as pretend:
        for part in made.modules():
            part._parameters = {
                name: p if p is None else nn.Parameter(pretend.from_tensor(p))
                for name, p in part._parameters.items()
            }
        recompute.apply(made, [mode] * 3)
        size, _ = held(made, torch.zeros(2, 257, dtype=torch.int64), True)
    # the triton kernels' positions of documents are 16 bytes of a token's
    assert abs(size - costs.kept(cfg, at)) <= 0.004 * size + 16 * 512, (size, costs.kept(cfg, at))


def test_a_budget_that_holds_nothing_is_told_the_least() -> None:
    cfg = Config(model=ModelConfig(dim=64, n_layers=3, n_heads=2, vocab_size=64))
    cfg.parallel.recompute, cfg.parallel.budget = "budget", Bytes(1000)
    with pytest.raises(UserError, match=r"budget 1000 .* train.micro_batch 1 \(379904 would"):
        resolve(cfg, 1, on_gpu=False)
    at = Layout(256, recompute="full", element_bytes=4)
    cfg.parallel.budget = Bytes(costs.kept(cfg.model, at))
    assert costs.modes(cfg.model, resolve(cfg, 1, on_gpu=False)) == ["full"] * 3
    cfg.parallel.budget = Bytes(cfg.parallel.budget - 1)
    with pytest.raises(UserError, match="too small"):
        resolve(cfg, 1, on_gpu=False)


# -- under FSDP ------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Notes what is sent: the collective and the elements of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append((func.__name__, args[0].numel()))
        return func(*args, **(kwargs or {}))


def sent_in_a_step(mode: str) -> list[tuple[str, int]]:
    """What one of four pretended processes sends, in order."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        with torch.device("meta"):
            made = Transformer(ModelConfig(dim=64, n_layers=3, n_heads=4, vocab_size=64))
        recompute.apply(made, [mode] * 3)
        fsdp.apply(made, init_device_mesh("cpu", (4,)), torch.bfloat16, ParallelConfig())
        made.to_empty(device="cpu")
        with Sent() as sent:
            losses, _ = made(torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9).long())
            for block in made.layers:
                of_block = block._get_fsdp_state()._fsdp_param_group.fsdp_params  # type: ignore[operator]
                assert len(of_block) == 9
                # what autograd keeps of the weights has no memory until it is gathered again
                for parameter in of_block:
                    assert parameter._unsharded_param.untyped_storage().size() == 0
            losses.sum().backward()
        return sent.calls
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mode", MODES[1:])
def test_fsdp_frees_and_sends_as_without(mode: str) -> None:
    expected = sent_in_a_step("none")
    # three blocks gathered in both directions and the root once, all reduced
    assert len(expected) >= 3 + 2 + 1 + 4
    assert sent_in_a_step(mode) == expected
