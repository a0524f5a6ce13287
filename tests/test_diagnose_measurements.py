"""Every measurement against a computation of its own, in float64, token by token."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diagnosed_models import CHANNELS, N_LOOPS, VOCABULARY, Recurrence, batches, rows_of
from torch import nn

from looped.diagnose.depth import measure_depth
from looped.diagnose.dynamics import PERCENTILES, measure_dynamics
from looped.diagnose.interventions import ALPHAS, clamp_radially, scale_response, sweep_alpha
from looped.diagnose.model import LoopedModel
from looped.diagnose.radial import measure_radial


@pytest.fixture
def model() -> Recurrence:
    return Recurrence()


def test_norms_and_their_percentiles(model):
    norms, _ = measure_dynamics(model.described(), batches(), 7)
    for loop, state in enumerate(rows_of(model, 7)[0]):
        lengths = state.detach().norm(dim=1).numpy()
        assert norms.mean[loop] == pytest.approx(lengths.mean(), rel=1e-12)
        assert norms.percentiles[loop] == pytest.approx(np.percentile(lengths, PERCENTILES), rel=1e-12)
        assert norms.scale[loop] == pytest.approx(lengths.mean() / math.sqrt(CHANNELS), rel=1e-12)


def test_updates_token_by_token(model):
    _, updates = measure_dynamics(model.described(), batches(), 5)
    states, _ = rows_of(model, 5)
    for k in range(4):
        expected = {name: [] for name in updates.__dataclass_fields__}
        for h, after in zip(states[k].detach().numpy(), states[k + 1].detach().numpy(), strict=True):
            s, s_after = np.sqrt((h**2).mean()), np.sqrt((after**2).mean())
            u, u_after = h / s, after / s_after
            a = u @ (after - h) / CHANNELS
            tangential = np.sqrt((((after - h) - a * u) ** 2).mean())
            second = a + tangential**2 / (2 * s)
            angular = np.sqrt(((u_after - u) ** 2).mean())
            row = {
                "increment": s_after - s, "first_order": a, "second_order": second,
                "first_error": abs(a - (s_after - s)), "second_error": abs(second - (s_after - s)),
                "tangential": tangential, "angular": angular, "angular_times_scale": s * angular,
            }  # fmt: skip
            for name, value in row.items():
                expected[name].append(value)
        for name, values in expected.items():
            assert getattr(updates, name)[k] == pytest.approx(np.mean(values), rel=1e-10), name


def test_the_predictions_are_of_first_and_second_order():
    """Halving the update divides their errors by 4 and by 8."""
    torch.manual_seed(3)
    step = torch.randn(VOCABULARY, CHANNELS, dtype=torch.float64)
    errors = []
    for size in (0.02, 0.01):
        model = LoopedModel(
            n_loops=1,
            embed=lambda tokens: F.one_hot(tokens, VOCABULARY).double(),
            loop=lambda state, embedded, done, size=size: embedded @ (1 + step.cos() + size * done * step),
            head=lambda state: state,
        )
        _, updates = measure_dynamics(model, batches(), 2)
        errors.append((updates.first_error[0], updates.second_error[0]))
    assert errors[0][0] / errors[1][0] == pytest.approx(4, rel=0.05)
    assert errors[0][1] / errors[1][1] == pytest.approx(8, rel=0.1)


def fraction(gradient: torch.Tensor, state: torch.Tensor) -> float:
    cosine = (gradient * state).sum(1) / (gradient.norm(dim=1) * state.norm(dim=1))
    return cosine.abs().mean().item()


def normalised(state: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * state / (state.square().mean(1, keepdim=True) + eps).sqrt()


def test_radial_fractions_through_an_rms_norm(model):
    weights, penalty = (0.2, 0.0, 0.8), 0.3
    measured = measure_radial(
        model.described(weights=weights, penalty=penalty), batches(), model.described(weights=weights)
    )
    states, targets = rows_of(model, N_LOOPS)
    states = list(states)
    for state in states:
        state.retain_grad()
    losses = [
        F.cross_entropy(model.head(normalised(h, model.norm.weight, 1e-2)), targets, reduction="sum") for h in states
    ]
    for loop in range(N_LOOPS):
        (gradient,) = torch.autograd.grad(losses[loop], states[loop], retain_graph=True)
        assert measured.immediate[loop] == pytest.approx(fraction(gradient, states[loop]), rel=1e-6)
        assert measured.immediate_float64[loop] == pytest.approx(measured.immediate[loop], rel=1e-6)
        assert measured.exact[loop] == pytest.approx(measured.immediate[loop], rel=1e-6)
        assert measured.exact[loop] > 1e-4
    loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    for gradient, loop in zip(torch.autograd.grad(loss, states, retain_graph=True), range(N_LOOPS), strict=True):
        assert measured.total[loop] == pytest.approx(fraction(gradient, states[loop]), rel=1e-6)
    loss = loss + penalty * sum(h.square().mean(1).sum() for h in states) / N_LOOPS
    for gradient, loop in zip(torch.autograd.grad(loss, states), range(N_LOOPS), strict=True):
        assert measured.training[loop] == pytest.approx(fraction(gradient, states[loop]), rel=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_the_equation_holds_for_a_layer_norm(model, affine):
    norm = model.layer_norm if affine else nn.LayerNorm(CHANNELS, eps=1e-2, elementwise_affine=False)
    measured = measure_radial(model.described(norm=norm), batches())
    assert measured.exact == pytest.approx(measured.immediate, rel=1e-6)
    assert all(math.isnan(value) for value in measured.immediate_float64)


def test_a_raw_readout_has_no_equation_and_a_large_fraction(model):
    measured = measure_radial(model.described(norm=None), batches())
    assert all(math.isnan(value) for value in measured.exact)
    assert min(measured.immediate) > 0.05


def test_final_only_is_read_raw_before_the_last_loop(model):
    measured = measure_radial(model.described(norm_every_loop=False), batches())
    raw = measure_radial(model.described(norm=None), batches())
    every = measure_radial(model.described(), batches())
    assert measured.immediate == pytest.approx([*raw.immediate[:-1], every.immediate[-1]])
    assert [math.isnan(value) for value in measured.exact] == [True, True, False]


def test_loops_after_the_last_read_one_have_no_whole_gradient(model):
    measured = measure_radial(model.described(weights=(1.0, 0.0, 0.0)), batches())
    assert measured.total[0] > 0
    assert measured.total[1:] == [0, 0]


def test_float64_shows_what_float32_rounds_away():
    model = Recurrence(torch.float32)
    model.norm.eps = 1e-9
    double = Recurrence(torch.float64)
    double.load_state_dict(model.state_dict())
    double.norm.eps = 1e-9
    measured = measure_radial(model.described(), batches(), double.described())
    assert measured.immediate_float64 == pytest.approx(measured.exact, rel=1e-5)
    assert min(measured.immediate) > 3 * max(measured.exact)


@pytest.mark.parametrize("kind", ["norm", "layer_norm", "raw", "final-only"])
def test_alpha_sweep(model, kind):
    changes = {"norm": getattr(model, kind, None), "norm_every_loop": True}
    if kind == "final-only":
        changes = {"norm": model.norm, "norm_every_loop": False}
    model.norm.eps = model.layer_norm.eps = 0.0
    described = model.described(**changes)
    sweep = sweep_alpha(described, batches())
    assert (sweep.alphas[0], sweep.alphas[-1]) == pytest.approx((0.1, 10))
    states, targets = rows_of(model, N_LOOPS)
    for loop, state in enumerate(states):
        norm = None if kind == "final-only" and loop < N_LOOPS - 1 else changes["norm"]
        for column, alpha in enumerate(ALPHAS):
            scaled = alpha * state
            expected = F.cross_entropy(model.head(scaled if norm is None else norm(scaled)), targets)
            assert sweep.ce[loop][column] == pytest.approx(expected.item(), rel=1e-12)
        blind = norm is not None
        assert (sweep.ranges[loop] < 1e-12) if blind else (sweep.ranges[loop] > 0.1)


def test_the_sweep_leaves_the_state_fed_back_alone(model):
    sweep = sweep_alpha(model.described(norm=None), batches(), alphas=(1.0, 5.0))
    states, targets = rows_of(model, N_LOOPS)
    assert sweep.ce[1][1] == pytest.approx(F.cross_entropy(model.head(5 * states[1]), targets).item(), rel=1e-12)


def test_clamp_token_by_token(model):
    clamp = clamp_radially(model.described(), batches())
    inputs, targets = (torch.cat([part.flatten() for part in parts]) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        embedded = model.embedding(inputs)
        free = clamped = model.advance(embedded, embedded, 0)
        scale = clamped.norm(dim=1, keepdim=True)
        for loop in range(N_LOOPS):
            if loop > 0:
                free = model.advance(free, embedded, loop)
                update = model.advance(clamped, embedded, loop) - clamped
                along = (update * clamped).sum(1, keepdim=True) / clamped.norm(dim=1, keepdim=True) ** 2
                clamped = F.normalize(clamped + update - along * clamped, dim=1) * scale
                assert (clamped.norm(dim=1, keepdim=True) - scale).abs().max() < 1e-12
            for state, values in ((free, clamp.free), (clamped, clamp.clamped)):
                expected = F.cross_entropy(model.head(normalised(state, model.norm.weight, 1e-2)), targets)
                assert values[loop] == pytest.approx(expected.item(), rel=1e-12)
    assert clamp.change == clamp.clamped[-1] - clamp.free[-1] != 0


def tangential_model(norm: nn.Module | None) -> LoopedModel:
    """Updates `h A` with A antisymmetric: tangential at every state, and in proportion to its scale."""
    model = Recurrence()
    model.norm.eps = 0.0
    random = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64)
    return model.described(
        n_loops=5, norm=norm and model.norm, loop=lambda state, embedded, done: state + state @ (random - random.T)
    )


def test_the_clamp_changes_nothing_where_updates_are_tangential():
    clamp = clamp_radially(tangential_model(nn.Identity()), batches())
    assert clamp.clamped == pytest.approx(clamp.free, rel=1e-12)
    assert max(clamp.free) - min(clamp.free) > 0.01  # though the loops do something
    seen = clamp_radially(tangential_model(None), batches())  # a raw readout sees the scale that is taken away
    assert abs(seen.change) > 0.1


def test_the_next_loops_response_to_the_scale(model):
    response = scale_response(model.described(), batches())
    inputs = torch.cat([tokens.flatten() for tokens, _ in batches()])
    states, _ = rows_of(model, N_LOOPS)
    for loop in range(N_LOOPS - 1):
        once, twice = (model.advance(factor * states[loop], model.embedding(inputs), 0) for factor in (1, 2))
        expected = ((twice - once).norm(dim=1) / once.norm(dim=1)).mean().item()
        assert response[loop] == pytest.approx(expected, rel=1e-12)

    def removes(state, embedded, done):
        return model.advance(F.rms_norm(state, (CHANNELS,), eps=0.0), embedded, done)

    assert max(scale_response(model.described(loop=removes), batches())) < 1e-6
    assert scale_response(model.described(n_loops=1), batches()) == []


def test_depth(model):
    sizes = torch.arange(VOCABULARY)
    depth = measure_depth(model.described(norm_every_loop=False), batches(), 6, sizes)
    states, targets = rows_of(model, 6)
    for loop, state in enumerate(states):
        losses = F.cross_entropy(model.head(normalised(state, model.norm.weight, 1e-2)), targets, reduction="none")
        assert depth.ce[loop] == pytest.approx(losses.mean().item(), rel=1e-12)
        assert depth.ppl[loop] == pytest.approx(math.exp(losses.mean().item()), rel=1e-12)
        expected = losses.sum().item() / math.log(2) / sizes[targets].sum().item()
        assert depth.bits_per_byte[loop] == pytest.approx(expected, rel=1e-12)
    assert all(math.isnan(bits) for bits in measure_depth(model.described(), batches(), 2).bits_per_byte)
