"""Truncated backpropagation: the loops before the last ones run without gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_bad_steps import located
from test_step import adamw, batch, make, take
from tiny_decoder import COMPILED, LAYERS, LENGTH, D, V, assert_same_gradients, model, tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import looped.kernels.device
from looped.model import LoopedLM

Gradients = dict[str, Tensor]


def targets(seed: int = 5) -> Tensor:
    values = tokens(seed=seed)
    values[0, 3] = -100
    return values


def gradients_of(decoder: LoopedLM, loss: Tensor) -> Gradients:
    decoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def by_hand(decoder: LoopedLM, n_loops: int, n_last: int, penalty: float) -> Tensor:
    """The loss of the last loops alone, on a state that is detached before the first of them."""
    state = embedded = decoder.embed(tokens())
    losses, squares = [], []
    for loop in range(n_loops):
        if loop == n_loops - n_last:
            state = state.detach()
        state = decoder.apply_loop(state, loop, embedded)
        if loop >= n_loops - n_last:
            logits = decoder.readout_logits(state, final=loop == n_loops - 1)
            losses.append(F.cross_entropy(logits.float().flatten(0, 1), targets().flatten()))
            squares.append(state.float().square().mean())
    return torch.stack(losses).mean() + penalty * torch.stack(squares).mean()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "readout": "final-only"},
        {"positions": "rotary", "inter_loop_norm": True},
        {"n_prelude": 1, "n_coda": 1, "injection": "concat"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("n_loops", "n_last"), [(5, 2), (3, 1)])
def test_gradients_are_those_of_a_detached_state(fused: bool, changes: dict[str, Any], n_loops: int, n_last: int):
    decoder = model(fused=fused, **changes)
    output = decoder(tokens(), targets(), n_loops=n_loops, backprop_loops=n_last, penalty=0.3)
    expected = by_hand(decoder, n_loops, n_last, 0.3)
    torch.testing.assert_close(output.loss, expected)
    assert_same_gradients(gradients_of(decoder, output.loss), gradients_of(decoder, expected))
    assert [state.requires_grad for state in output.states] == [False] * (n_loops - n_last) + [True] * n_last
    torch.testing.assert_close(output.states, decoder(tokens(), n_loops=n_loops).states)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_under_autocast(fused: bool, monkeypatch: pytest.MonkeyPatch):
    """Autocast keeps a weight that it has rounded; one rounded without gradient must not serve the loops with one."""
    monkeypatch.setattr(looped.kernels.device, "multiplies_faster", lambda dtype: True)
    decoder = model(fused=fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = decoder(tokens(), targets(), n_loops=4, backprop_loops=2).loss
    found = gradients_of(decoder, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = by_hand(decoder, 4, 2, 0.0)
    assert_same_gradients(found, gradients_of(decoder, expected), 0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_recomputed_loops_with_dropout(fused: bool):
    found = []
    for checkpoint_loops in (False, True):
        decoder = model(fused=fused, dropout=0.2)
        decoder.checkpoint_loops = checkpoint_loops
        torch.manual_seed(3)
        found.append(gradients_of(decoder, decoder(tokens(), targets(), n_loops=4, backprop_loops=2).loss))
    assert_same_gradients(*found)


@pytest.mark.parametrize("supervision", ["per-loop", "terminal"])
def test_only_loops_with_gradient_are_read(supervision: str):
    decoder = model()
    options = {"n_loops": 5, "supervision": supervision, "statistics": True}
    output = decoder(tokens(), targets(), backprop_loops=2, **options)
    whole = decoder(tokens(), targets(), **options)
    read = [3, 4] if supervision == "per-loop" else [4]
    assert output.per_loop.isfinite().nonzero().flatten().tolist() == read
    torch.testing.assert_close(output.per_loop[read], whole.per_loop[read])
    torch.testing.assert_close(output.loss, output.per_loop[read].mean())
    assert len(output.statistics.loss) == 2


@pytest.mark.parametrize("n_last", [3, 8, None])
def test_as_many_as_there_are_is_no_truncation(n_last: int | None):
    decoder = model()
    whole, other = (decoder(tokens(), targets(), penalty=0.1, **extra) for extra in ({}, {"backprop_loops": n_last}))
    assert torch.equal(whole.loss, other.loss)
    assert torch.equal(whole.per_loop, other.per_loop)
    first, second = gradients_of(decoder, whole.loss), gradients_of(decoder, other.loss)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_first_loop_starts_from_has_no_gradient():
    """Of a tied embedding there remains the head's. With an injection, it has one."""
    untied = model(tied=False)
    names = gradients_of(untied, untied(tokens(), targets(), n_loops=4, backprop_loops=3).loss)
    assert {name for name, _ in untied.named_parameters()} - names.keys() == {"embedding.weight", "positions.weight"}
    tied = model()
    unread = torch.ones(V, dtype=torch.bool)
    unread[tokens().flatten()] = False
    assert unread.any()
    found = gradients_of(tied, tied(tokens(), targets(), n_loops=4, backprop_loops=3).loss)
    assert (found["embedding.weight"][unread] != 0).any()
    assert "positions.weight" not in found
    injected = model(tied=False, injection="add")
    found = gradients_of(injected, injected(tokens(), targets(), n_loops=4, backprop_loops=3).loss)
    assert {"embedding.weight", "positions.weight"} <= found.keys()


@pytest.mark.parametrize("fused", [False, True])
def test_compiles_into_one_graph(fused: bool):
    torch._dynamo.reset()
    decoder = model(fused=fused, **COMPILED)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    options = {"backprop_loops": 1, "penalty": 0.1}
    found = gradients_of(decoder, compiled(tokens(), targets(), **options).loss)
    assert_same_gradients(found, gradients_of(decoder, decoder(tokens(), targets(), **options).loss))


@pytest.mark.parametrize(
    ("changes", "n_blocks"),  # passes through blocks of the prelude and the coda: a backward pass is two
    [({}, 0), ({"n_prelude": 1, "n_coda": 1}, 1 + 3 * 2), ({"n_prelude": 1, "injection": "add"}, 3)],
    ids=str,
)
def test_flops_of_a_step(changes: dict[str, Any], n_blocks: int):
    """Forward and backward, as PyTorch counts them; it multiplies the masked half of attention too."""
    decoder = model(fused=False, **changes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(tokens(length=LENGTH), tokens(length=LENGTH), n_loops=5, backprop_loops=2).loss.backward()
    triangle = 2 * LENGTH * D
    per_token = decoder.flops_per_token(5, backprop_loops=2)
    assert per_token == counter.get_total_flops() / (2 * LENGTH) - ((5 + 2 * 2) * LAYERS + n_blocks) * triangle
    assert decoder.flops_per_token(2, backprop_loops=7) == decoder.flops_per_token(2)


@pytest.mark.parametrize("value", [0, -1])
def test_rejects_fewer_than_one(value: int):
    with pytest.raises(ValueError, match=rf"backprop_loops must be at least 1\. Got backprop_loops={value}\."):
        model()(tokens(), targets(), backprop_loops=value)


# The trainer's step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_measured_step(fused: bool):
    decoder = make(fused=fused)
    with torch.no_grad():
        states = decoder(batch(0)[0], n_loops=5).states
    result = take(decoder, adamw(decoder), batch(0), n_loops=5, backprop_loops=2, measure=True)
    assert result.per_loop.isnan().tolist() == result.radial_fraction.isnan().tolist() == [True] * 3 + [False] * 2
    torch.testing.assert_close(result.state_norm, torch.stack([state.norm(dim=-1).mean() for state in states]))
    penalty = 0.01 * torch.stack(states[3:]).square().mean()
    torch.testing.assert_close(result.loss, result.per_loop[3:].mean() + penalty)


def test_accumulation_does_not_change_the_gradient():
    decoders = [make() for _ in range(2)]
    for decoder, n_parts in zip(decoders, (1, 2), strict=True):
        optimizer = torch.optim.SGD(decoder.parameters(), lr=1.0, fused=True)
        take(decoder, optimizer, batch(0), n_loops=4, backprop_loops=2, grad_accumulation=n_parts)
    for a, b in zip(*(decoder.parameters() for decoder in decoders), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_bad_step_is_located_where_it_was_read():
    options = {"n_loops": 5, "backprop_loops": 2}
    assert located(make(), **options).startswith("at a place that did not show again")
    decoder = make(readout="raw")
    decoder.embedding.weight.data[:] *= 1e30
    assert located(decoder, penalty=0.0, **options).startswith("in the readout of loop 4")
    decoder = make()
    decoder.blocks[1].mlp.register_forward_hook(lambda module, given, y: (y[0] * math.inf, y[1]))
    assert located(decoder, **options) == "in the forward pass at loop 1, layer 2"
