"""Other people's models as LoopedModels, against the models' own logits at every depth."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from foreign_models import MODELS, run, small, token_batch
from torch import nn

import looped
from looped.adapters import find_adapter
from looped.diagnose import diagnose, from_model
from looped.diagnose.model import in_float64

TOKENS, LABELS = token_batch()
TARGETS = LABELS.clamp(min=0)


def start_as_the_adapted(model: nn.Module) -> None:
    """Let Huginn start from what the diagnosis draws."""
    if find_adapter(model).kind == "huginn_raven":
        initialize, forward = model.initialize_state, model.forward

        def drawn(embedded):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return initialize(embedded)

        model.initialize_state = drawn
        model.forward = lambda input_states=None, **options: forward(**options)


@pytest.mark.parametrize("name", MODELS)
def test_from_model(name):
    """Logits of every loop, and of one beyond those that were trained."""
    model = small(name).eval()
    described = from_model(model)
    states = described.states(TOKENS, described.n_loops + 1)
    start_as_the_adapted(model)
    for n_loops, state in enumerate(states, start=1):
        logits = described.head(described.normalised(state, final=True))
        torch.testing.assert_close(logits, run(model, TOKENS, n_loops).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_from_model_states_are_those_captured(name):
    """HRM-Text's are the first half, the high state."""
    model = small(name).eval()
    states = from_model(model).states(TOKENS, find_adapter(model).n_loops)
    start_as_the_adapted(model)
    with looped.capture(model) as captured:
        run(model, TOKENS)
    for state, wanted in zip(states, captured.states, strict=True):
        torch.testing.assert_close(state[..., : wanted.shape[-1]], wanted)


def test_from_model_gradients_are_the_models():
    """HRM-Text's low cycles have gradients in part. Those of the embedding are left out, where none flow."""
    model = small("hrm_text").eval()
    described = from_model(model)
    states = described.unroll(described.embed(TOKENS), 3)
    described.cross_entropy(states[-1], TARGETS, final=True).mean().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    F.cross_entropy(run(model, TOKENS).logits.flatten(0, 1), TARGETS.flatten()).backward()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


@pytest.mark.parametrize("name", ["ouro", "nanbeige", "hrm_text"])
def test_from_model_between_is_what_a_loop_does_first(name):
    """The same state, normed before, gives the same loop; twice the state does not matter."""
    described = from_model(small(name).eval())
    embedded = described.embed(TOKENS)
    state = described.loop(embedded, embedded, 0)
    after = described.loop(state, embedded, 1)
    torch.testing.assert_close(described.loop(2 * state, embedded, 1), after, rtol=1e-3, atol=1e-3)


def test_from_model_takes_batches_of_several_shapes():
    described = from_model(small("ouro").eval())
    first, second = described.embed(TOKENS), described.embed(TOKENS[:1, :4])
    one = described.loop(second, second, 0)
    torch.testing.assert_close(described.loop(first, first, 0)[:1, :4], one)


def test_from_model_without_the_readout_norm():
    model = small("ouro").eval()
    described = dataclasses.replace(from_model(model), norm=None)
    state = described.states(TOKENS, 1)[0]
    torch.testing.assert_close(described.head(described.normalised(state, final=True)), model.lm_head(state))


def test_in_float64():
    """The readout alone, and only where it is a norm and a head."""
    described = from_model(small("ouro", torch.float32).eval())
    double = in_float64(described)
    state = described.states(TOKENS, 1)[0]
    logits = double.head(double.normalised(state.double(), final=True))
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), described.head(described.normalised(state, final=True)))
    assert in_float64(from_model(small("huginn").eval())) is None


@pytest.mark.parametrize(
    ("name", "control"),
    [("ouro", "removed"), ("nanbeige, one norm", "free"), ("hrm_text", "removed"), ("albert", None), ("huginn", None)],
)
def test_diagnose_adapted(name, control):
    """A norm that is fed back removes the scale; one after the loop leaves it free."""
    described = from_model(small(name, torch.float32).eval().requires_grad_(False))
    diagnosis = diagnose(described, [(TOKENS, TARGETS)], name=name, horizon=5)
    assert control is None or diagnosis.verdict.control == control
    radial = diagnosis.measured.radial
    if control == "free":
        assert radial.exact[-1] == pytest.approx(radial.immediate_float64[-1], rel=1e-3)


def test_from_model_weights():
    """Ouro's loss reads every loop, that of the others the last."""
    assert from_model(small("ouro").eval()).loss_weights == (1 / 3,) * 3
    assert from_model(small("huginn").eval()).loss_weights == (0.0, 0.0, 1.0)


def test_from_model_rejects():
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        from_model(small("ouro").train())
    with pytest.raises(ValueError, match="model must be one of albert"):
        from_model(nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match="n_loops must be at least 1"):
        dataclasses.replace(from_model(small("ouro").eval()), n_loops=0)
    model = small("ouro").eval()
    model.config.total_ut_steps = 0
    with pytest.raises(ValueError, match=r"n_loops must be at least 1. Got n_loops=0"):
        from_model(model)
