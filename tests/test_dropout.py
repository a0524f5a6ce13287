"""Dropout of activations, and of attention on a CPU: probability, seeds, gradients, memory."""

import math

import pytest
import torch
from attention_case import explicit_attention, random_qkv
from numerics import LAYOUTS, assert_no_worse_than
from torch import Tensor

from looped.attention import causal_attention
from looped.dropout import ROWS_PER_BLOCK, SCORES_PER_BLOCK, _blocks, _keep, dropout


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads and seven rows a block at T = 16, so that a small test has several, and incomplete last ones."""
    monkeypatch.setattr("looped.dropout.ROWS_PER_BLOCK", 7)
    monkeypatch.setattr("looped.dropout.SCORES_PER_BLOCK", 2 * 7 * 16)


SHAPE = (3, 16, 3, 16)  # head_dim = T, so that a unit matrix as v returns the attention weights


@pytest.mark.usefixtures("small_blocks")
def test_dropout_averages_to_no_dropout() -> None:
    q, k, v = random_qkv(*SHAPE)
    with torch.no_grad():
        torch.manual_seed(1)
        draws = torch.stack([causal_attention(q, k, v, dropout_p=0.3) for _ in range(2000)])
        deviation = (draws.mean(0) - causal_attention(q, k, v)).abs() / (draws.std(0) / 2000**0.5 + 1e-6)
    assert deviation.max() < 5  # standard errors, over 2304 outputs
    assert draws.std(0).median() > 0.1


@pytest.mark.usefixtures("small_blocks")
def test_dropout_drops_each_weight_with_its_probability_and_independently() -> None:
    q, k, _ = random_qkv(*SHAPE)
    unit = torch.eye(16).view(1, 16, 1, 16).expand(SHAPE)
    torch.manual_seed(2)
    kept = causal_attention(q, k, unit, dropout_p=0.25) != 0  # [B, T, H, T]
    causal = torch.ones(16, 16, dtype=torch.bool).tril()[None, :, None, :].expand_as(kept)
    assert not kept[~causal].any()
    assert kept[causal].float().mean().item() == pytest.approx(0.75, abs=0.04)  # 1224 weights: 3 standard errors
    pairs = kept.transpose(1, 2).flatten(0, 1)
    for first in range(len(pairs)):
        assert not any(torch.equal(pairs[first], other) for other in pairs[first + 1 :])


@pytest.mark.usefixtures("small_blocks")
def test_dropout_is_deterministic_under_a_seed() -> None:
    q, k, v = random_qkv(*SHAPE)

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        output = causal_attention(q, k, v, dropout_p=0.2)
        return output, *torch.autograd.grad(output.square().sum(), (q, k, v)), torch.rand(3)

    assert all(torch.equal(a, b) for a, b in zip(run(3), run(3), strict=True))
    assert not torch.equal(run(3)[0], run(4)[0])


@pytest.mark.usefixtures("small_blocks")
def test_dropout_gradients_use_the_mask_of_the_forward_pass() -> None:
    q, k, v = random_qkv(*SHAPE, dtype=torch.float64)
    unit = torch.eye(16, dtype=torch.float64).view(1, 16, 1, 16).expand(SHAPE)
    torch.manual_seed(5)
    kept = (causal_attention(q, k, unit, dropout_p=0.4) != 0).transpose(1, 2) / _keep(0.4)  # [B, H, T, T]
    assert 0.5 < (kept > 0).double().mean() / (17 / 32) < 0.7

    torch.manual_seed(5)
    actual = causal_attention(q, k, v, dropout_p=0.4)
    torch.rand(7)  # the backward pass must not depend on what was drawn in between
    gradients = torch.autograd.grad(actual.square().sum(), (q, k, v))
    truth = explicit_attention(q, k, v, kept)
    torch.testing.assert_close(actual, truth)
    for gradient, wanted in zip(gradients, torch.autograd.grad(truth.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("shape", [(2, 130, 5, 8), (1, 600, 3, 8), (3, 4000, 16, 8), (1, 1, 1, 8)])
def test_blocks_cover_every_visible_score_once_and_stay_small(shape: tuple[int, ...]) -> None:
    batch, seq_len, n_heads, _ = shape
    rows = torch.zeros(batch, n_heads, seq_len, dtype=torch.int64)
    seeds = set()
    for block in _blocks(batch * n_heads, seq_len, torch.tensor(11)):
        rows.flatten(0, 1)[block.heads, block.rows] += 1
        assert block.keys == slice(0, block.rows.stop)
        heads = len(range(batch * n_heads)[block.heads])
        scores = heads * (block.rows.stop - block.rows.start) * block.rows.stop
        assert scores <= max(SCORES_PER_BLOCK, ROWS_PER_BLOCK * seq_len)
        seeds.add(block.seed)
    assert (rows == 1).all()
    assert len(seeds) >= math.ceil(seq_len / ROWS_PER_BLOCK)


def test_attention_with_dropout_keeps_no_scores_for_the_backward_pass() -> None:
    q, k, v = random_qkv(8, 128, 4, 16)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        causal_attention(q, k, v, dropout_p=0.1)
    assert sorted(saved) == [1, *[q.numel()] * 4]  # the seed, q, k, v and the output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_with_dropout_passes_opcheck(layout: str) -> None:
    q, k, v = (LAYOUTS[layout](x.detach()).requires_grad_() for x in random_qkv(*SHAPE))
    torch.library.opcheck(torch.ops.looped.dropout_attention.default, (q, k, v, torch.tensor(3), 0.2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attention_with_dropout_keeps_the_dtype(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(*SHAPE, dtype=dtype)
    torch.manual_seed(0)
    output = causal_attention(q, k, v, dropout_p=0.2)
    torch.manual_seed(0)
    wanted = causal_attention(q.float(), k.float(), v.float(), dropout_p=0.2)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), wanted, atol=1e-2, rtol=1e-2)
    assert all(g.dtype == dtype for g in torch.autograd.grad(output.sum(), (q, k, v)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_dropout_is_the_same_function_under_autocast(
    dtype: torch.dtype, autocast_dtype: torch.dtype, backward_too: bool
) -> None:
    """No worse than plain PyTorch in the inputs' dtype, and to the bit what it is without autocast."""
    q, k, v = (2 * x.detach() for x in random_qkv(*SHAPE, dtype=dtype))
    unit = torch.eye(16, dtype=dtype).view(1, 16, 1, 16).expand(SHAPE)
    upstream = torch.randn(SHAPE, dtype=dtype)

    def run(autocast: bool) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(6)
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast):
            output = causal_attention(*leaves, dropout_p=0.35)
            if backward_too:
                output.backward(upstream)
        if not backward_too:
            output.backward(upstream)
        return output.detach(), *(x.grad for x in leaves if x.grad is not None)

    torch.manual_seed(6)
    kept = (causal_attention(q, k, unit, dropout_p=0.35) != 0).transpose(1, 2) / _keep(0.35)  # [B, H, T, T]

    def explicit(wanted: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(wanted).requires_grad_() for x in (q, k, v)]
        output = explicit_attention(*leaves, kept.to(wanted))
        return output.detach(), *torch.autograd.grad(output, leaves, upstream.to(wanted))

    results = zip("oqkv", run(True), run(False), explicit(dtype), explicit(torch.float64), strict=True)
    for name, actual, without, plain, truth in results:
        assert torch.equal(actual, without), name
        assert_no_worse_than(actual, plain, truth, name=name)


@pytest.mark.usefixtures("small_blocks")
def test_forward_and_backward_pass_use_the_same_probabilities_under_autocast() -> None:
    """With unit matrices as v and as the upstream gradient, the output and dv are the kept weights themselves."""
    q, k, _ = random_qkv(*SHAPE)
    unit = torch.eye(16).view(1, 16, 1, 16).expand(SHAPE)
    v = unit.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = causal_attention(q, k, v, dropout_p=0.35)
    weights.backward(unit)
    assert v.grad is not None
    assert torch.equal(weights, v.grad.transpose(1, 3))


# Of activations -------------------------------------------------------------------------------------------------------


def test_dropout_of_an_activation() -> None:
    x = torch.randn(300, 500, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x, 0.2)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.004)  # 150,000 elements: 4 standard errors
    torch.testing.assert_close(y, torch.where(kept, x / 0.8, 0.0), atol=1e-4, rtol=1e-4)  # 0.2 is rounded to 2^-16
    torch.rand(3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, kept)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.2), y)
    assert not torch.equal(dropout(x, 0.2), y)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_passes_opcheck(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(5, 7)).requires_grad_()
    torch.library.opcheck(torch.ops.looped.dropout.default, (x, torch.tensor(3), 0.2))


@pytest.mark.parametrize("p", [1e-9, 0.999999])
def test_dropout_probabilities_near_the_ends(p: float) -> None:
    y = dropout(torch.ones(1000), p)
    assert torch.isfinite(y).all()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.01)
