"""The distribution over loops, where it starts, and the loss that trains a gate behind a frozen model."""

import math

import pytest
import torch
from torch import Tensor

from looped.exit_gate import ExitGate, continuation_loss, exit_entropy, log_exit_probabilities, mean_exit_loop

K = 4


def logits(spread: float = 3.0, n_loops: int = K) -> Tensor:
    return spread * torch.randn(n_loops, 5, 7, generator=torch.Generator().manual_seed(0))


def test_probabilities_are_the_products_of_their_definition() -> None:
    g = logits().double()
    p = log_exit_probabilities(g).exp()
    stop = torch.sigmoid(g)
    torch.testing.assert_close(p[0], stop[0])
    torch.testing.assert_close(p[2], stop[2] * (1 - stop[0]) * (1 - stop[1]))
    torch.testing.assert_close(p[3], (1 - stop[0]) * (1 - stop[1]) * (1 - stop[2]))
    torch.testing.assert_close(p.sum(0), torch.ones(5, 7, dtype=torch.float64))


def test_the_last_loops_gate_counts_nowhere() -> None:
    g = logits().requires_grad_()
    exit_entropy(log_exit_probabilities(g)).sum().backward()
    assert (g.grad[-1] == 0).all()
    assert (g.grad[:-1] != 0).all()


@pytest.mark.parametrize("spread", [1.0, 100.0, 1e5, 1e30])
def test_finite_whatever_the_gate_says(spread: float) -> None:
    g = logits(spread).requires_grad_()
    log_p = log_exit_probabilities(g)
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(5, 7))
    entropy = exit_entropy(log_p)
    (entropy + mean_exit_loop(log_p)).sum().backward()
    assert entropy.isfinite().all()
    assert (entropy >= 0).all()
    assert g.grad.isfinite().all()


def test_mean_loop_and_entropy() -> None:
    p = torch.tensor([[0.5, 0.0, 0.25], [0.25, 0.0, 0.25], [0.25, 1.0, 0.5]], dtype=torch.float64)
    log_p = (p + 1e-300).log()
    torch.testing.assert_close(mean_exit_loop(log_p), torch.tensor([1.75, 3.0, 2.25], dtype=torch.float64))
    wanted = torch.tensor([1.5 * math.log(2), 0.0, 1.5 * math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(exit_entropy(log_p), wanted)


@pytest.mark.parametrize(("n_loops", "share"), [(1, None), (2, 1.0), (4, 0.96), (8, 0.95)])
def test_exits_start_near_uniform(n_loops: int, share: float | None) -> None:
    gate = ExitGate(6, n_loops)
    states = torch.randn(n_loops, 9, 6)
    log_p = log_exit_probabilities(torch.stack([gate(state) for state in states])).detach()
    assert (log_p == log_p[:, :1]).all()  # the same for all tokens
    entropy = float(exit_entropy(log_p)[0])
    assert entropy == 0 if share is None else entropy >= share * math.log(n_loops) - 1e-6


def test_the_gate_computes_in_float32() -> None:
    gate = ExitGate(6, K)
    gate.weight.data.normal_()
    state = torch.randn(3, 6).bfloat16()
    assert gate(state).dtype == torch.float32
    assert torch.equal(gate(state), gate(state.float()))
    assert gate.double()(state.double()).dtype == torch.float64


# The second stage -----------------------------------------------------------------------------------------------------


def test_continuation_loss_is_its_definition() -> None:
    g, losses = logits(1.0).double(), 0.02 * logits(1.0).double().flip(0) + 3
    counted = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    total = 0.0
    for b, t in counted.nonzero().tolist():
        for k in range(1, K):
            improvement = max(0.0, float(losses[k - 1, b, t] - losses[k, b, t]))
            wanted = 1 / (1 + math.exp(-50 * (improvement - 0.005)))
            stop = 1 / (1 + math.exp(-float(g[k, b, t])))
            total -= wanted * math.log(1 - stop) + (1 - wanted) * math.log(stop)
    expected = total / ((K - 1) * int(counted.sum()))
    assert continuation_loss(g, losses, counted).item() == pytest.approx(expected, rel=1e-12)


def test_continuation_loss_takes_the_losses_as_constant_and_leaves_out_what_is_ignored() -> None:
    g, losses = logits(1.0).requires_grad_(), logits(1.0).flip(0).requires_grad_()
    counted = torch.arange(35).view(5, 7) % 3 > 0
    continuation_loss(g, losses, counted).backward()
    assert losses.grad is None
    assert (g.grad[:, ~counted] == 0).all()
    assert (g.grad[1:, counted] != 0).all()
    assert (g.grad[0] == 0).all()
    assert continuation_loss(g, losses, torch.zeros_like(counted)) == 0


def test_tokens_that_gain_nothing_stop_first() -> None:
    """Half of the tokens, told by a channel of their states, lose 0.2 nats a loop; the others nothing."""
    generator = torch.Generator().manual_seed(2)
    gains = torch.arange(200) % 2 == 0
    states = torch.randn(K, 200, 6, generator=generator)
    states[:, :, 0] = torch.where(gains, 1.0, -1.0)
    losses = 3 - 0.2 * gains * torch.arange(K).view(-1, 1)
    gate, counted = ExitGate(6, K), torch.ones(200, dtype=torch.bool)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        continuation_loss(torch.stack([gate(state) for state in states]), losses, counted).backward()
        optimizer.step()
    with torch.no_grad():
        loops = mean_exit_loop(log_exit_probabilities(torch.stack([gate(state) for state in states])))
    assert loops[gains].mean() > 3.5
    assert loops[~gains].mean() < 2.2
    assert loops[gains].min() > loops[~gains].max()


def test_continuation_loss_rejects_one_loop() -> None:
    with pytest.raises(ValueError, match=r"difference of loops, of at least 2\. Got 1\."):
        continuation_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(3, dtype=torch.bool))
