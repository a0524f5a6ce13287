"""The weights before a readout's chunks and the sums after them, against their definition in float64."""

import pytest
import torch

from looped.kernels.readout_call import ReadoutCall, ReadoutTensors
from looped.kernels.row_weights import LossScales, loop_weights, loss_sums, row_weights, scaled
from looped.kernels.row_weights_triton import BLOCK_TOKENS

LENGTHS = [1, 7, BLOCK_TOKENS, BLOCK_TOKENS + 37]


def scales_of(targets, weights, *, n_columns, n_penalised=0, penalty=None, n_targets=None, **options):
    """`row_weights` in space of its own."""
    device = targets.device
    space = None if weights is None else torch.empty(len(weights) * len(targets), device=device)
    tensors = ReadoutTensors(torch.empty(0), targets, weights, penalty=penalty, n_targets=n_targets)
    call, scales = ReadoutCall("raw", 0.0, 1, (0,), **options), LossScales(space, torch.empty(3, device=device))
    return row_weights(tensors, call, scales, n_columns=n_columns, n_penalised=n_penalised)


def sums_of(loss, scales, mean_square=None):
    """`loss_sums` as results."""
    total, per_loop = loss.new_empty(()), loss.new_empty(len(loss))
    loss_sums(loss, scales, mean_square, total, per_loop)
    return total, per_loop


def inputs(n_tokens, device, per_token):
    torch.manual_seed(0)
    targets = torch.randint(50, (n_tokens,))
    targets[n_tokens // 2 :: 3] = -100
    weights = torch.randn(3, n_tokens if per_token else 1)
    return targets.to(device), weights.to(device)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_weights_and_sums(backend, device, n_tokens, per_token, mean):
    targets, weights = inputs(n_tokens, device, per_token)
    penalty = torch.tensor(0.1, device=device)
    scales = scales_of(
        targets, weights, n_columns=50, ignore_index=-100, mean=mean, penalty=penalty, n_penalised=4 * n_tokens
    )
    valid = targets != -100
    n = max(1, int(valid.sum()))
    coefficient = weights.double() * valid / (n if mean else 1)
    assert float(scales.share) == pytest.approx(1 / n)
    assert float(scales.dmean_square) == pytest.approx(0.1 / (4 * n_tokens))
    largest = coefficient.abs().amax() if valid.any() else torch.tensor(1 / (n if mean else 1))
    torch.testing.assert_close(scales.unit.cpu().double(), largest.cpu().double(), rtol=1e-6, atol=0)
    product = scales.row_weight.view(3, n_tokens).double() * scales.unit.double()
    torch.testing.assert_close(product, coefficient, rtol=1e-6, atol=0)
    assert scales.in_range is None or bool(scales.in_range)

    loss, square = torch.rand(3, n_tokens, device=device) * valid, torch.rand(4, n_tokens, device=device)
    total, per_loop = sums_of(loss, scales, square)
    expected = (coefficient * loss).sum() + 0.1 * square.double().mean()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_loop.double(), loss.double().sum(1) / n, rtol=1e-5, atol=0)
    without, _ = sums_of(loss, scales)
    torch.testing.assert_close(without.double(), (coefficient * loss).sum(), rtol=1e-5, atol=1e-6)


def test_one_weight_for_all_rows(backend, device):
    targets, _ = inputs(40, device, False)
    scales = scales_of(targets, None, n_columns=50, ignore_index=-100, mean=True, weight=0.25)
    assert scales.row_weight is None
    loss = torch.rand(2, 40, device=device) * (targets != -100)
    total, per_loop = sums_of(loss, scales)
    torch.testing.assert_close(total, 0.25 * per_loop.sum())
    torch.testing.assert_close(per_loop, loss.sum(1) * scales.share)


@pytest.mark.parametrize("n_targets", [0.0, 0.5, 70.0])
@pytest.mark.parametrize("per_token", [True, False])
def test_the_number_of_targets_may_be_given(backend, device, per_token, n_targets):
    """It may be a share of them, as where gradients are averaged over processes; of none, it is 1."""
    targets, weights = inputs(9, device, per_token)
    n = torch.tensor(n_targets, device=device)
    scales = scales_of(targets, weights, n_columns=50, ignore_index=-100, mean=True, n_targets=n)
    assert float(scales.share) == pytest.approx(1 / (n_targets or 1))
    loss = torch.rand(3, 9, device=device) * (targets != -100)
    total, _ = sums_of(loss, scales)
    torch.testing.assert_close(total, (weights * loss).sum() * scales.share)


@pytest.mark.parametrize("lost", [torch.inf, torch.nan])
def test_a_row_without_weight_adds_nothing(backend, device, lost):
    targets, weights = inputs(9, device, True)
    weights[1, 2] = 0.0
    scales = scales_of(targets, weights, n_columns=50, ignore_index=-100, mean=False)
    loss = torch.rand(3, 9, device=device) * (targets != -100)
    expected, _ = sums_of(loss, scales)
    loss[1, 2] = lost
    total, per_loop = sums_of(loss, scales)
    torch.testing.assert_close(total, expected - 0.0)
    assert not per_loop[1].isfinite()


def test_all_ignored_or_without_weight(backend, device):
    targets, weights = inputs(9, device, True)
    for some_targets, some_weights in ((torch.full_like(targets, -100), weights), (targets, torch.zeros_like(weights))):
        scales = scales_of(some_targets, some_weights, n_columns=50, ignore_index=-100, mean=True)
        assert not scales.row_weight.any()
        assert float(scales.unit / scales.share) == pytest.approx(1)


def test_a_weight_that_is_not_finite_keeps_to_its_row(backend, device):
    """It is the user's, so it shows; an ignored token's does not, and neither sets the unit of the others."""
    targets, weights = inputs(9, device, True)
    targets[:] = 3
    targets[0] = -100
    weights[0, :3] = torch.tensor([torch.nan, torch.inf, torch.nan], device=device)
    scales = scales_of(targets, weights, n_columns=50, ignore_index=-100, mean=False)
    row_weight = scales.row_weight.view_as(weights)
    assert row_weight[0, 0] == 0
    assert row_weight[0, 1].isinf()
    assert row_weight[0, 2].isnan()
    assert row_weight.isfinite().sum() == row_weight.numel() - 2
    assert row_weight[row_weight.isfinite()].abs().max() == 1


@pytest.mark.parametrize(("target", "inside"), [(49, True), (50, False), (-1, False), (-100, True)])
def test_targets_out_of_range_are_noticed(backend, device, target, inside):
    targets = torch.zeros(BLOCK_TOKENS + 3, dtype=torch.int64, device=device)
    targets[-1] = target
    scales = scales_of(targets, None, n_columns=50, ignore_index=-100, mean=True)
    assert (scales.in_range is None) == (backend == "cpu")  # where check_range looks itself
    assert scales.in_range is None or bool(scales.in_range) == inside


def test_weights_of_loops():
    wide, like = torch.float32, torch.empty(3, 2)
    assert loop_weights(None, [0, 1], 2, like, wide) == (None, 0.5)
    assert loop_weights([0, 0, 2], [2], 3, like, wide) == (None, 2.0)
    weights, _ = loop_weights([0, 0.25, 2], [1, 2], 3, like, wide)
    assert weights.tolist() == [[0.25], [2]]
    per_loop, per_token = torch.rand(2), torch.rand(2, 3, 4, requires_grad=True)
    assert torch.equal(loop_weights(per_loop, [0, 1], 2, like, wide)[0], per_loop.view(2, 1))
    weights, _ = loop_weights(per_token, [0, 1], 2, like, wide)
    assert torch.equal(weights, per_token.view(2, 12))
    assert weights.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (3, 1000), (2049, 1)])
def test_scaled_rounds_once(backend, device, dtype, shape):
    x, scale = torch.randn(shape, device=device), torch.tensor(1e-3, device=device)
    assert torch.equal(scaled(x, scale, dtype), (x * scale).to(dtype))
    view = torch.randn(shape[::-1], device=device).permute(*range(len(shape))[::-1])
    assert torch.equal(scaled(view, scale, dtype), (view * scale).to(dtype))
