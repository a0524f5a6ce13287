"""Every measurement against a computation of its own, in float64, token by token."""

import math

import numpy as np
import pytest
import tiny_decoder
import torch
import torch.nn.functional as F
from diagnosed_models import CHANNELS, N_LOOPS, VOCABULARY, Recurrence, batches, rows_of
from torch import nn

from looped.diagnose import validation_batches
from looped.diagnose.depth import measure_depth
from looped.diagnose.dynamics import PERCENTILES, measure_dynamics
from looped.diagnose.halting import measure_halting
from looped.diagnose.interventions import ALPHAS, clamp_radially, scale_response, sweep_alpha
from looped.diagnose.model import LoopedModel, from_decoder, in_float64
from looped.diagnose.radial import measure_radial
from looped.halting import calibrate, exit_loops
from looped.run_directory import Validation


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


def test_what_one_loop_makes_of_the_scale_it_begins_with(model):
    """Without and with a norm between loops, which the model applies and describes."""

    def between(state):
        return F.rms_norm(state, (CHANNELS,), eps=0.0)

    def loop(state, embedded, done):
        return model.advance(between(state) if done else state, embedded, done)

    for removes in (False, True):
        changes = {"between": between, "loop": loop} if removes else {}
        norms, _ = measure_dynamics(model.described(**changes), batches(), 4)
        tokens = torch.cat([part.flatten() for part, _ in batches()])
        with torch.no_grad():
            embedded = state = model.embedding(tokens)
            for k in range(4):
                start = between(state) if removes and k else state
                state = model.advance(start, embedded, 0)
                lengths = state.norm(dim=1), start.norm(dim=1)
                assert norms.entered[k] == pytest.approx(lengths[1].mean().item(), rel=1e-12)
                assert norms.within[k] == pytest.approx((lengths[0] / lengths[1]).mean().item(), rel=1e-12)
        assert (norms.entered[2] == pytest.approx(math.sqrt(CHANNELS))) == removes


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


def test_loops_before_the_first_trained_one_have_no_whole_gradient(model):
    """The loss is that of the later ones, and the penalty their mean."""
    weights = (0.0, 0.5, 0.5)
    trained = measure_radial(model.described(backprop_loops=2, weights=weights, penalty=0.3), batches())
    whole = measure_radial(model.described(weights=weights, penalty=0.3 * N_LOOPS / 2), batches())
    assert trained.total[0] == trained.training[0] == 0 < whole.total[0]
    assert trained.total[1:] == pytest.approx(whole.total[1:])
    assert trained.training[1:] == pytest.approx(whole.training[1:])
    assert trained.immediate == whole.immediate


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


def clamped_by_hand(model: Recurrence, form: str) -> list[torch.Tensor]:
    """Losses [tokens] after every loop, one token after the other, by the definition of a form of the clamp."""
    inputs, targets = (torch.cat([part.flatten() for part in parts]) for parts in zip(*batches(), strict=True))
    losses = []
    with torch.no_grad():
        embedded = model.embedding(inputs)
        states = model.advance(embedded, embedded, 0)
        scales = [h.square().mean().sqrt() for h in states]
        for loop in range(N_LOOPS):
            if loop > 0:
                moved = model.advance(states, embedded, loop)
                rows = []
                for h, after, scale in zip(states, moved, scales, strict=True):
                    u = h / h.square().mean().sqrt()
                    b = after - h
                    v = h + b if form in ("free", "frozen") else h + b - (u @ b / CHANNELS) * u
                    rows.append(scale * v / v.square().mean().sqrt() if form in ("frozen", "both") else v)
                states = torch.stack(rows)
            readout = normalised(states, model.norm.weight, 1e-2)
            losses.append(F.cross_entropy(model.head(readout), targets, reduction="none"))
    return losses


def test_clamp_token_by_token(model):
    clamp = clamp_radially(model.described(), batches())
    free = clamped_by_hand(model, "free")
    assert clamp.free == pytest.approx([loss.mean().item() for loss in free], rel=1e-12)
    changes = []
    for form in ("frozen", "tangential", "both"):
        measured = getattr(clamp, form)
        for loop, losses in enumerate(clamped_by_hand(model, form)):
            difference = (losses - free[loop]).view(3, 5).mean(1).numpy()  # three windows of five tokens
            assert measured.change[loop] == pytest.approx(difference.mean(), abs=1e-12)
            assert measured.error[loop] == pytest.approx(difference.std(ddof=1) / math.sqrt(3), abs=1e-12)
        changes.append(measured.change[-1])
    assert len(set(changes)) == 3
    assert clamp.change == clamp.both.change[-1] != 0


def test_a_single_window_has_no_standard_error(model):
    clamp = clamp_radially(model.described(), batches(sizes=(1,)))
    assert all(math.isnan(error) for error in clamp.both.error)


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
    for form in (clamp.frozen, clamp.tangential, clamp.both):
        assert form.change == pytest.approx([0.0] * 5, abs=1e-12)
    assert max(clamp.free) - min(clamp.free) > 0.01  # though the loops do something
    seen = clamp_radially(tangential_model(None), batches())  # a raw readout sees the scale that is taken away
    assert abs(seen.change) > 0.1
    assert seen.tangential.change == pytest.approx([0.0] * 5, abs=1e-12)  # which the updates alone leave there


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
    assert depth.as_trained[-1] == depth.ce[N_LOOPS - 1]
    for loop, state in enumerate(states[: N_LOOPS - 1]):
        assert depth.as_trained[loop] == pytest.approx(F.cross_entropy(model.head(state), targets).item(), rel=1e-12)
    assert depth.two_readings
    usual = measure_depth(model.described(), batches(), N_LOOPS)
    assert all(math.isnan(bits) for bits in usual.bits_per_byte)
    assert (usual.as_trained, usual.two_readings) == (usual.ce, False)


@pytest.mark.parametrize("norm_every_loop", [True, False])
def test_halting_is_calibrated_on_one_slice_and_reported_on_another(model, norm_every_loop):
    described = model.described(norm_every_loop=norm_every_loop)
    measured = measure_halting(described, batches(sizes=(3, 2), length=40), tolerance=1.05)
    assert (measured.calibration_windows, measured.report_windows) == (2, 3)
    assert (measured.calibration_tokens, measured.report_tokens) == (80, 120)
    rows = torch.cat([tokens for tokens, _ in batches((3, 2), 40)])
    targets = torch.cat([targets for _, targets in batches((3, 2), 40)])
    for reading, as_last in ((measured.as_trained, False), (measured.as_last, True)):
        with torch.no_grad():
            states = described.states(rows, N_LOOPS)
            logits = torch.stack(
                [
                    model.head(model.norm(state) if norm_every_loop or as_last or loop == N_LOOPS - 1 else state)
                    for loop, state in enumerate(states)
                ]
            )
        best = logits.sort(-1, descending=True).values
        margin = best[..., 0] - best[..., 1]
        loss = -logits.log_softmax(-1).gather(-1, targets.expand(N_LOOPS, -1, -1).unsqueeze(-1)).squeeze(-1)
        tau = calibrate(loss[:, :2], margin[:, :2], 1.05)
        assert (math.inf if reading.tau is None else reading.tau) == pytest.approx(tau)
        exits = exit_loops(margin[:, 2:], tau)
        assert reading.loops == pytest.approx(exits.double().mean().item())
        assert reading.exits == pytest.approx([(exits == k).double().mean().item() for k in (1, 2, 3)])
        halted = loss[:, 2:].gather(0, exits.unsqueeze(0) - 1)
        assert reading.ratio == pytest.approx(math.exp(halted.mean() - loss[-1, 2:].mean()))
        assert reading.calibration_ratio <= 1.05 + 1e-12
    assert (measured.as_trained == measured.as_last) == norm_every_loop


def test_the_report_does_not_see_the_calibration_slice(model):
    """Other targets in the second half change the report, and not tau; other targets in the first half change tau."""
    usual, other = batches((2, 2), 40), batches((2, 2), 40)
    described = model.described()
    first = measure_halting(described, usual)
    report = measure_halting(described, [usual[0], (other[1][0], (other[1][1] + 1) % VOCABULARY)])
    assert (report.as_trained.tau, report.as_trained.calibration_ratio) == (
        first.as_trained.tau,
        first.as_trained.calibration_ratio,
    )
    assert report.as_trained.ratio != first.as_trained.ratio
    calibration = measure_halting(described, [(other[0][0], (other[0][1] + 1) % VOCABULARY), usual[1]])
    assert calibration.as_trained.calibration_ratio != first.as_trained.calibration_ratio


def test_one_window_cannot_be_halved(model):
    with pytest.raises(ValueError, match=r"must hold two windows.* Got 1"):
        measure_halting(model.described(), batches(sizes=(1,)))


def test_a_coda_is_read_where_nothing_is_normalised():
    """As training reads `final-only`: the coda after every loop, the norm after the last."""
    decoder = tiny_decoder.model(readout="final-only", n_coda=1, embedding_std=0.3).eval()
    rows = tiny_decoder.tokens(2, 12)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    output = decoder(inputs, targets)
    described = from_decoder(decoder)
    for loop, state in enumerate(output.states):
        loss = described.cross_entropy(state, targets, final=loop == 2).mean()
        torch.testing.assert_close(loss, output.per_loop[loop])


def test_a_coda_is_read_in_float64_where_kernels_have_none(monkeypatch):
    decoder = tiny_decoder.model(fused=True, n_coda=1).eval()
    state = decoder(tiny_decoder.tokens()).states[-1]
    expected = decoder.readout_norm(decoder.read(state))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as on a GPU
    found = in_float64(from_decoder(decoder)).normalised(state.double(), final=True)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected)


def test_windows_do_not_overlap_and_are_spread():
    validation = Validation(torch.arange(101), torch.tensor([0, 101]), None)
    parts = validation_batches(validation, seq_len=10, n_tokens=45)
    inputs, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    assert inputs[:, 0].tolist() == [0, 20, 50, 70]
    assert torch.equal(targets, inputs + 1)
    everything = validation_batches(validation, seq_len=10, n_tokens=10**9)
    assert torch.equal(torch.cat([part[0] for part in everything]).flatten(), torch.arange(100))
    assert len(validation_batches(validation, seq_len=1, n_tokens=50)) == 1
    for seq_len, n_tokens in ((10, 19), (51, 1000)):
        message = rf"two windows of seq_len={seq_len}, .* Got tokens={n_tokens}, validation 101"
        with pytest.raises(ValueError, match=message):
            validation_batches(validation, seq_len=seq_len, n_tokens=n_tokens)
