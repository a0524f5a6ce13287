"""What the readout sees of every loop and token: from its definitions, and fused against plain."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model import BATCH, LENGTH, READOUTS, K, batch, expected_logits, model, run
from tiny_decoder import COMPILED, assert_same_gradients


@pytest.mark.parametrize("supervision", ["per-loop", "terminal"])
@pytest.mark.parametrize("readout", READOUTS)
def test_statistics_of_fused_and_plain_agree(readout: Any, supervision: Any) -> None:
    options = {"supervision": supervision, "penalty": 0.1, "statistics": True}
    plain, _ = run(model(fused=False, readout=readout), **options)
    fused, _ = run(model(fused=True, readout=readout), **options)
    assert plain.statistics is not None
    assert fused.statistics is not None
    assert fused.statistics._fields == plain.statistics._fields
    for name, found, wanted in zip(plain.statistics._fields, fused.statistics, plain.statistics, strict=True):
        assert found is not None, name
        assert wanted is not None, name
        assert found.shape == wanted.shape == (K, BATCH, LENGTH), name
        assert found.dtype == wanted.dtype == (torch.int64 if name == "top1" else torch.float32), name
        assert not found.requires_grad, name
        assert not wanted.requires_grad, name
        tolerance = 1e-6 if name.startswith("radial") else 1e-5
        torch.testing.assert_close(
            found, wanted, atol=tolerance, rtol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("fused", [False, True])
def test_statistics_are_their_definitions(fused: bool) -> None:
    decoder = model(fused=fused, readout="raw")
    tokens, targets = batch()
    states = decoder(tokens).states
    found = decoder.readout_loss(states, targets, penalty=0.3, statistics=True).statistics
    assert found is not None
    for loop, state in enumerate(states):
        h = state.detach().double().requires_grad_()
        logits = expected_logits(decoder, h, loop, K)
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        g = torch.autograd.grad(ce.sum() / (targets != -100).sum() / K, h)[0]
        p = logits.softmax(-1)
        ordered = logits.sort(-1, descending=True)
        radial = (g * h).sum(-1)
        fraction = (radial.abs() / (g.norm(dim=-1) * h.norm(dim=-1))).nan_to_num(0.0)
        wanted = {
            "loss": ce,
            "lse": logits.exp().sum(-1).log(),
            "entropy": -(p * p.log()).sum(-1),
            "margin": ordered.values[..., 0] - ordered.values[..., 1],
            "mean_square": h.square().mean(-1),
            "radial_dot": radial,
            "radial_fraction": fraction,
        }
        for name, truth in wanted.items():
            actual = getattr(found, name)[loop].double()
            torch.testing.assert_close(actual, truth.detach(), atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(found.top1[loop], ordered.indices[..., 0])
        assert fraction.median() > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_normalised_readouts_do_not_see_the_scale(fused: bool) -> None:
    fractions = {}
    for readout in ("rmsnorm", "layernorm", "raw", "final-only"):
        statistics = run(model(fused=fused, readout=readout), statistics=True)[0].statistics
        assert statistics is not None
        assert statistics.radial_fraction is not None
        fractions[readout] = statistics.radial_fraction.flatten(1).median(dim=1).values
    assert fractions["rmsnorm"].max() < 1e-4
    assert fractions["raw"].min() > 1e-2
    assert fractions["final-only"][:-1].min() > 1e-2
    assert fractions["final-only"][-1] < 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_statistics_change_neither_loss_nor_gradients(fused: bool) -> None:
    without, expected = run(model(fused=fused), penalty=0.1)
    result, found = run(model(fused=fused), penalty=0.1, statistics=True)
    assert torch.equal(result.loss, without.loss)
    assert torch.equal(result.per_loop, without.per_loop)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("fused", [False, True])
def test_statistics_without_gradients_have_no_radial_part(fused: bool) -> None:
    decoder = model(fused=fused)
    tokens, targets = batch()
    with torch.no_grad():
        result = decoder(tokens, targets, statistics=True)
    assert result.statistics is not None
    assert result.statistics.radial_dot is None
    assert result.statistics.radial_fraction is None
    torch.testing.assert_close(result.statistics.loss.sum((1, 2)) / (targets != -100).sum(), result.per_loop)


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model_measures_statistics(fused: bool) -> None:
    torch._dynamo.reset()
    decoder = model(fused=fused, **COMPILED)
    expected, expected_gradients = run(decoder, statistics=True)
    decoder.compile(backend="aot_eager")
    result, found = run(decoder, statistics=True)
    for a, b in zip(result.statistics, expected.statistics, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert_same_gradients(found, expected_gradients)
