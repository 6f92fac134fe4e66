"""The decoder: parameter counts, names, what it computes, and where it is blind by design."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama import costs
from llama.config import ModelConfig
from llama.model import KVCache, Transformer

# Table 2 of the paper, and the counts that follow from it with 32,000 pieces.
SIZES = {
    "7B": (ModelConfig(dim=4096, n_layers=32, n_heads=32), 6_738_415_616),
    "13B": (ModelConfig(dim=5120, n_layers=40, n_heads=40), 13_015_864_320),
    "33B": (ModelConfig(dim=6656, n_layers=60, n_heads=52), 32_528_943_616),
    "65B": (ModelConfig(dim=8192, n_layers=80, n_heads=64), 65_285_660_672),
}
SMALL = ModelConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=50)


@pytest.fixture(autouse=True)
def seed(rng: random.Random) -> int:
    torch.manual_seed(rng.randrange(2**31))
    return rng.randrange(2**31)


def built(cfg: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(cfg)
    model.init_weights(seed)
    # weights large enough for attention to be far from uniform
    for p in model.parameters():
        p.data.mul_(8) if p.dim() > 1 else p.data.add_(torch.randn_like(p) / 4)
    return model.to(dtype)


def logits_of(model: Transformer, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    out = model(tokens, doc_ids=doc_ids)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_the_four_sizes_have_the_parameters_of_the_paper(size: str) -> None:
    cfg, count = SIZES[size]
    cfg.vocab_size = 32000
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == count == costs.parameters(cfg)


def test_weights_have_the_names_and_shapes_of_the_original_code() -> None:
    shapes = {name: tuple(p.shape) for name, p in Transformer(SMALL).state_dict().items()}
    block = {
        "attention.wq.weight": (32, 32),
        "attention.wk.weight": (16, 32),
        "attention.wv.weight": (16, 32),
        "attention.wo.weight": (32, 32),
        "feed_forward.w1.weight": (256, 32),
        "feed_forward.w2.weight": (32, 256),
        "feed_forward.w3.weight": (256, 32),
        "attention_norm.weight": (32,),
        "ffn_norm.weight": (32,),
    }
    truth = {f"layers.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    truth |= {"tok_embeddings.weight": (50, 32), "norm.weight": (32,), "output.weight": (50, 32)}
    assert shapes == truth


def plain_llama(w: dict[str, Tensor], tokens: Tensor, cfg: ModelConfig, theta: float) -> Tensor:
    """The paper's formulas over a state dict, sharing no code with the model."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + cfg.norm_eps) * w[f"{name}.weight"]

    T, D = tokens.shape[1], cfg.head_dim
    angles = torch.arange(T, dtype=torch.float64)[:, None] / theta ** (torch.arange(0, D, 2) / D)
    matrices = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1)
    matrices = matrices.view(T, D // 2, 2, 2)

    def heads(x: Tensor, name: str, turn: bool) -> Tensor:
        x = (x @ w[f"{name}.weight"].T).view(*x.shape[:2], -1, D // 2, 2)
        x = torch.einsum("tixy,bthiy->bthix", matrices, x) if turn else x
        x = x.flatten(3).repeat_interleave(cfg.n_heads // x.shape[2], 2)
        return x.transpose(1, 2)

    h = w["tok_embeddings.weight"][tokens]
    for i in range(cfg.n_layers):
        block, x = f"layers.{i}", norm(h, f"layers.{i}.attention_norm")
        q, k = (heads(x, f"{block}.attention.{n}", True) for n in ("wq", "wk"))
        scores = q @ k.transpose(-1, -2) / math.sqrt(D)
        scores += torch.full((T, T), -torch.inf).triu(1)
        y = scores.softmax(-1) @ heads(x, f"{block}.attention.wv", False)
        h = h + y.transpose(1, 2).flatten(2) @ w[f"{block}.attention.wo.weight"].T
        x, ffn = norm(h, f"{block}.ffn_norm"), f"{block}.feed_forward"
        gate, up = x @ w[f"{ffn}.w1.weight"].T, x @ w[f"{ffn}.w3.weight"].T
        h = h + (gate * torch.sigmoid(gate) * up) @ w[f"{ffn}.w2.weight"].T
    return norm(h, "norm") @ w["output.weight"].T


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_logits_are_those_of_the_formulas(theta: float, seed: int) -> None:
    cfg = ModelConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=50, rope_theta=theta)
    model = built(cfg, seed, torch.float64)
    tokens = torch.randint(0, 50, (2, 21))
    truth = plain_llama(dict(model.state_dict()), tokens, cfg, theta)
    # RoPE's table is float32
    torch.testing.assert_close(logits_of(model, tokens), truth, rtol=1e-5, atol=1e-5)


def test_losses_and_gradients_are_those_of_the_logits(seed: int) -> None:
    model, twin = built(SMALL, seed), built(SMALL, seed)
    twin.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 50, (3, 18))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[torch.rand(targets.shape) < 0.3] = -100
    losses, counts = model(inputs, targets)
    truth = F.cross_entropy(logits_of(twin, inputs).transpose(1, 2), targets, reduction="none").sum(
        1
    )
    torch.testing.assert_close(losses, truth)
    assert counts.tolist() == (targets != -100).sum(1).tolist()
    losses.sum().backward()
    truth.sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


def test_logits_depend_on_no_later_token(seed: int) -> None:
    model = built(SMALL, seed)
    tokens = torch.randint(0, 50, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = logits_of(model, tokens), logits_of(model, changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert ((before[:, 9:] - after[:, 9:]).abs().amax((0, 2)) > 1e-3).all()


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_a_document_is_computed_as_if_it_stood_alone(attention: str, seed: int) -> None:
    model = Transformer(SMALL, attention).double()
    model.load_state_dict(built(SMALL, seed).state_dict())
    tokens = torch.randint(0, 50, (2, 23))
    doc_ids = torch.tensor([[0] * 5 + [1] + [2] * 17, [0] * 22 + [1]])
    out = logits_of(model, tokens, doc_ids)
    for row, first, last in [(0, 0, 5), (0, 5, 6), (0, 6, 23), (1, 0, 22), (1, 22, 23)]:
        # positions run on, but RoPE knows distances only
        alone = logits_of(model, tokens[row : row + 1, first:last])
        torch.testing.assert_close(out[row, first:last], alone[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_changes_nothing(seed: int) -> None:
    model = built(SMALL, seed, torch.float64)
    tokens = torch.randint(0, 50, (2, 19))
    doc_ids = (torch.arange(19) >= torch.tensor([[0], [4]])).long()
    truth = logits_of(model, tokens, doc_ids)
    cache = [KVCache(19) for _ in model.layers]
    first = 0
    for last in (7, 8, 9, 15, 19):
        out = model(tokens[:, first:last], doc_ids=doc_ids[:, :last], cache=cache)
        assert isinstance(out, Tensor) and out.shape == (2, 1, 50)
        torch.testing.assert_close(out[:, 0], truth[:, last - 1])
        first = last
    with pytest.raises(AssertionError, match="20 tokens in a cache for 19"):
        model(tokens[:, :1], cache=cache)


@torch.no_grad()
def test_initial_weights(seed: int) -> None:
    cfg = ModelConfig(dim=256, n_layers=8, n_heads=4, vocab_size=700)
    model = Transformer(cfg)
    model.init_weights(seed)
    seen = set()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        std = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02
        assert abs(float(p.std()) / std - 1) < 0.02, name
        assert abs(float(p.mean())) < 5 * std / math.sqrt(p.numel()), name
        # every chunk of rows is drawn anew
        seen |= {tuple(row[:4].tolist()) for row in p}
    assert len(seen) == sum(len(p) for p in model.parameters() if p.dim() > 1)


def test_initial_weights_are_the_same_after_the_meta_device_and_in_any_type(seed: int) -> None:
    cfg = ModelConfig(dim=32, n_layers=1, n_heads=4, vocab_size=600)
    model, other = Transformer(cfg), Transformer(cfg)
    model.init_weights(seed)
    other.init_weights(seed + 1)
    with torch.device("meta"):
        late = Transformer(cfg)
    late = late.to_empty(device="cpu").bfloat16()
    late.init_weights(seed)
    tokens = torch.randint(0, 600, (1, 9))
    for p, q, r in zip(model.parameters(), late.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)
        assert p.dim() == 1 or not torch.equal(p, r)
    assert torch.equal(logits_of(late.float(), tokens), logits_of(model.bfloat16().float(), tokens))


def test_the_rope_table_is_float32_whatever_happens_to_the_model(seed: int) -> None:
    model = built(SMALL, seed)
    tokens = torch.randint(0, 50, (1, 40))
    with torch.inference_mode():
        logits_of(model, tokens[:, :3])
    model = copy.deepcopy(model).bfloat16()
    assert logits_of(model, tokens).dtype == torch.bfloat16
    assert model.freqs_cis is not None and model.freqs_cis.dtype == torch.complex64
    assert not any("freqs" in name for name in model.state_dict())
    # made in inference mode, used in training
    logits_of(model, tokens[:, :3]).float().sum().backward()


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(seed: int) -> None:
    cfg = ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=50)
    model, compiled = built(cfg, seed), built(cfg, seed)
    compiled.load_state_dict(model.state_dict())
    for layer in compiled.layers:
        layer.compile()
    assert list(compiled.state_dict()) == list(model.state_dict())
    tokens = torch.randint(0, 50, (2, 17))
    doc_ids = (torch.arange(16) >= 5).long().expand(2, 16)
    results = []
    for m in (model, compiled):
        losses, _ = m(tokens[:, :-1], tokens[:, 1:], doc_ids)
        losses.sum().backward()
        results.append(losses.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-4 * p.grad.norm(), name


@pytest.mark.slow
def test_compiled_blocks_take_another_length() -> None:
    """The second length makes torch.compile treat it as unknown."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=64))
    model.init_weights(0)
    tokens = torch.randint(64, (2, 301))
    cuts = [tokens, tokens[:, :270], tokens[:1, :40]]
    plain = [model(t[:, :-1], t[:, 1:])[0].sum() for t in cuts]
    for block in model.layers:
        block.compile()
    for t, expected in zip(cuts, plain, strict=True):
        torch.testing.assert_close(model(t[:, :-1], t[:, 1:])[0].sum(), expected)
