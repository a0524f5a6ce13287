import math

import pytest
import torch
from test_step import adamw, batch, copied_state, make, take
from tiny_run import arguments

from train import state_norm
from train.bad_steps import BadSteps, locate
from train.run import main
from train.state_norm import StateNorms

CPU = torch.device("cpu")


def test_bad_steps_are_counted_in_a_row_and_in_all():
    counts = BadSteps(3, CPU, total=10)
    seen = []
    for bad in (0, 1, 1, 0, 1, 1, 1):
        counts.add(torch.tensor(bool(bad)))
        seen.append((counts.in_a_row(), counts.too_many()))
    assert seen == [(0, False), (1, False), (2, False), (0, False), (1, False), (2, False), (3, True)]
    assert counts.total == 15
    counts.add(torch.tensor(False))  # taken before the host saw the third
    assert (counts.in_a_row(), counts.too_many()) == (4, True)


def located(model, **options) -> str:
    defaults = {"supervision": "per-loop", "penalty": 0.01, "dtype": torch.float32, "grad_accumulation": 2}
    return locate(model.train(), *batch(0), **(defaults | options))


class Nth:
    """A hook that does something to the output of its n-th call, from 0."""

    def __init__(self, n: int, change) -> None:
        self.n, self.change, self.calls = n, change, 0

    def __call__(self, module, given, output):
        self.calls += 1
        return self.change(output) if self.calls - 1 == self.n else None


def infinite(results):
    """What a sublayer gives, and the stream that it was given."""
    return results[0] * math.inf, results[1]


@pytest.mark.parametrize(("part", "checkpoint_loops"), [(0, False), (1, False), (0, True)])
@pytest.mark.parametrize(("loop", "layer"), [(0, 1), (2, 0)])
def test_a_number_of_the_forward_pass_is_located(part, checkpoint_loops, loop, layer):
    model = make()
    model.checkpoint_loops = checkpoint_loops
    model.blocks[layer].mlp.register_forward_hook(Nth(3 * part + loop, infinite))
    assert located(model) == f"in the forward pass at loop {loop + 1}, layer {layer + 1}"


def test_a_number_of_the_backward_pass_is_located():
    model = make()

    def poison(results):
        results[0].register_hook(lambda gradient: gradient * math.nan)
        return results

    # The gradient of the second layer's output is whole; what it sends to its input, the first layer's, is not.
    model.blocks[1].attention.register_forward_hook(Nth(1, poison))
    assert located(model, dtype=torch.float32) == "in the backward pass at loop 2, layer 1"


def test_what_is_not_in_a_block_is_located():
    model = make()
    model.blocks[0].mlp.w1.weight.data[3, 4] = math.nan
    assert located(model) == "in the weight blocks.0.mlp.w1.weight"
    assert located(make(), penalty=torch.tensor(math.inf)) == "in the norm penalty"
    model = make(readout="raw")
    model.embedding.weight.data[:] *= 1e30
    assert located(model, penalty=0.0).startswith("in the readout of loop 1")
    assert located(model, penalty=0.0, supervision="terminal").startswith("in the readout of loop 3")
    model = make(readout="raw", exit_gate=True)
    model.embedding.weight.data[:] *= 1e30
    assert located(model, penalty=0.0, supervision="gated").startswith("in the readout of loop 1")
    model = make()
    model.readout_norm.weight.register_hook(lambda gradient: gradient * math.nan)
    assert located(model) == "in the gradient of readout_norm.weight"


def test_what_is_beside_the_loops_is_located():
    for part in ("prelude", "coda"):
        model = make(n_prelude=1, n_coda=2)
        getattr(model, part)[-1].mlp.register_forward_hook(Nth(0, infinite))
        assert located(model) == f"in the forward pass at the {part}, layer {len(getattr(model, part))}"
    model = make(exit_gate=True)
    model.exit_gate.register_forward_hook(Nth(1, lambda g: g * math.nan))
    assert located(model, supervision="gated", penalty=0.0) == "in the exit gate"


def test_what_does_not_show_again_is_said_so():
    assert located(make()) == "at a place that did not show again: the step, repeated, was finite"


# Planted in every place --------------------------------------------------------------------------------------------


def planted(model, place: str, value: float, part: int) -> tuple[dict, list]:
    """One element of a place becomes ``value``. Returns options of the step and hooks, to be removed."""
    weight = model.blocks[1].mlp.w2.weight
    if place == "loss":
        return {"penalty": torch.tensor(value)}, []
    if place == "weight":
        weight.data[3, 4] = value
        return {}, []

    def put(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[5] = value
        return tensor

    if place == "gradient":
        return {}, [weight.register_hook(put)]
    of_block = Nth(3 * part + 1, lambda output: (put(output[0]), output[1]))
    return {}, [model.blocks[1].register_forward_hook(of_block)]


NAMED = {
    "loss": "in the norm penalty",
    "gradient": "in the gradient of blocks.1.mlp.w2.weight",
    "weight": "in the weight blocks.1.mlp.w2.weight",
    "state": "in the forward pass at loop 2, layer 2",
}


@pytest.mark.parametrize(("fused", "grad_accumulation"), [(True, 1), (True, 2), (False, 1), (False, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", NAMED)
def test_what_is_planted_is_not_taken_and_named(place, value, fused, grad_accumulation):
    model = make(fused=fused)
    optimizer = adamw(model)
    assert not take(model, optimizer, batch(0)).bad
    options, hooks = planted(model, place, value, part=grad_accumulation - 1)
    before = copied_state(model, optimizer)
    result = take(model, optimizer, batch(1), grad_accumulation=grad_accumulation, **options)
    assert result.bad
    for a, b in zip(before, copied_state(model, optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for hook in hooks:
        hook.remove()
    options, hooks = planted(model, place, value, part=grad_accumulation - 1)
    assert located(model, grad_accumulation=grad_accumulation, **options) == NAMED[place]
    for hook in hooks:
        hook.remove()
    if place != "weight":
        assert not take(model, optimizer, batch(2)).bad


def test_sums_that_overflow_are_located():
    """Of gradients that are finite: over micro-batches, and in the norm over all elements."""
    for scale, place in ((2e38, "in the gradient of embedding.weight"), (1e30, "in the norm of the gradient")):
        model = make()
        model.embedding.weight.register_hook(lambda gradient, scale=scale: torch.full_like(gradient, scale))
        assert located(model).startswith(place)
        assert take(model, adamw(model), batch(0), grad_accumulation=2).bad


# The state's norm ---------------------------------------------------------------------------------------------------


def test_a_state_past_the_limit_is_said_once():
    norms = StateNorms(penalty=0.0)
    assert norms.warning(1, [20.0, 10_000.0]) is None
    assert norms.warning(2, [math.nan, math.inf]) is None
    line = norms.warning(3, [math.nan, 12_345.4, 11_000.0])
    assert line is not None
    assert line.startswith("warning: the state's norm is 12,345 at loop 2, step 3, above 10,000: ")
    assert line.endswith("Begin a run with --penalty 0.01 or --inter-loop-norm.")
    assert norms.warning(4, [20_000.0, 20_000.0]) is None
    stronger = StateNorms(penalty=0.05).warning(1, [20_000.0])
    assert stronger is not None
    assert "--penalty 0.5 or" in stronger


def test_a_run_warns_of_its_state(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(state_norm, "LIMIT", 0.1)
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"), "--penalty", "0")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "step 1, above 0:" in line
