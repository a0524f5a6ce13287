"""The weights before a readout's chunks and the sums after them, against their definition in float64."""

import pytest
import torch
from looped.kernels.weighted_loss import BLOCK_TOKENS, loop_weights, loss_sums, loss_weights

LENGTHS = [1, 7, BLOCK_TOKENS, BLOCK_TOKENS + 37]


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
    scales = loss_weights(targets, weights, 50, ignore_index=-100, mean=mean, dmean_square=0.25)
    valid = targets != -100
    n = max(1, int(valid.sum()))
    coefficient = weights.double() * valid / (n if mean else 1)
    assert float(scales.share) == pytest.approx(1 / n)
    assert float(scales.dmean_square) == 0.25
    largest = coefficient.abs().amax() if valid.any() else torch.tensor(1 / (n if mean else 1))
    torch.testing.assert_close(scales.reference.cpu().double(), largest.cpu().double(), rtol=1e-6, atol=0)
    product = scales.omega.view(3, n_tokens).double() * scales.reference.double()
    torch.testing.assert_close(product, coefficient, rtol=1e-6, atol=0)
    assert scales.in_range is None or bool(scales.in_range)

    loss, square = torch.rand(3, n_tokens, device=device) * valid, torch.rand(4, n_tokens, device=device)
    total, per_loop = loss_sums(loss, scales, square, 0.1)
    expected = (coefficient * loss).sum() + 0.1 * square.double().mean()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_loop.double(), loss.double().sum(1) / n, rtol=1e-5, atol=0)
    without, _ = loss_sums(loss, scales)
    torch.testing.assert_close(without.double(), (coefficient * loss).sum(), rtol=1e-5, atol=1e-6)


def test_without_weights(backend, device):
    targets, _ = inputs(40, device, False)
    scales = loss_weights(targets, None, 50, ignore_index=-100, mean=True, dmean_square=0.0)
    assert scales.omega is None
    loss = torch.rand(2, 40, device=device)
    total, per_loop = loss_sums(loss, scales)
    assert float(total) == 0
    torch.testing.assert_close(per_loop, loss.sum(1) * scales.share)


def test_all_ignored_or_without_weight(backend, device):
    targets, weights = inputs(9, device, True)
    for some_targets, some_weights in ((torch.full_like(targets, -100), weights), (targets, torch.zeros_like(weights))):
        scales = loss_weights(some_targets, some_weights, 50, ignore_index=-100, mean=True, dmean_square=0.0)
        assert not scales.omega.any()
        assert float(scales.reference / scales.share) == pytest.approx(1)


def test_a_weight_that_is_not_finite_keeps_to_its_row(backend, device):
    """It is the user's, so it shows; an ignored token's does not, and neither sets the unit of the others."""
    targets, weights = inputs(9, device, True)
    targets[:] = 3
    targets[0] = -100
    weights[0, :3] = torch.tensor([torch.nan, torch.inf, torch.nan], device=device)
    scales = loss_weights(targets, weights, 50, ignore_index=-100, mean=False, dmean_square=0.0)
    omega = scales.omega.view_as(weights)
    assert omega[0, 0] == 0
    assert omega[0, 1].isinf()
    assert omega[0, 2].isnan()
    assert omega.isfinite().sum() == omega.numel() - 2
    assert omega[omega.isfinite()].abs().max() == 1


@pytest.mark.parametrize(("target", "inside"), [(49, True), (50, False), (-1, False), (-100, True)])
def test_targets_out_of_range_are_noticed(backend, device, target, inside):
    targets = torch.zeros(BLOCK_TOKENS + 3, dtype=torch.int64, device=device)
    targets[-1] = target
    scales = loss_weights(targets, None, 50, ignore_index=-100, mean=True, dmean_square=0.0)
    assert (scales.in_range is None) == (backend == "cpu")  # where check_range looks itself
    assert scales.in_range is None or bool(scales.in_range) == inside


def test_weights_of_loops():
    wide, head = torch.float32, torch.empty(3, 2)
    assert loop_weights(None, [0, 1], 2, head, wide).tolist() == [[0.5], [0.5]]
    assert loop_weights([0, 0.25, 2], [1, 2], 3, head, wide).tolist() == [[0.25], [2]]
    per_loop, per_token = torch.rand(2), torch.rand(2, 3, 4, requires_grad=True)
    assert torch.equal(loop_weights(per_loop, [0, 1], 2, head, wide), per_loop.view(2, 1))
    weights = loop_weights(per_token, [0, 1], 2, head, wide)
    assert torch.equal(weights, per_token.view(2, 12))
    assert weights.requires_grad
