import math

import pytest
import torch
from test_step import batch, make

from train.bad_steps import BadSteps, locate

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


@pytest.mark.parametrize(("part", "checkpoint_loops"), [(0, False), (1, False), (0, True)])
@pytest.mark.parametrize(("loop", "layer"), [(0, 1), (2, 0)])
def test_a_number_of_the_forward_pass_is_located(part, checkpoint_loops, loop, layer):
    model = make()
    model.checkpoint_loops = checkpoint_loops
    model.blocks[layer].mlp.register_forward_hook(Nth(3 * part + loop, lambda y: y * math.inf))
    assert located(model) == f"in the forward pass at loop {loop + 1}, layer {layer + 1}"


def test_a_number_of_the_backward_pass_is_located():
    model = make()

    def poison(y):
        y.register_hook(lambda gradient: gradient * math.nan)
        return y

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
        getattr(model, part)[-1].mlp.register_forward_hook(Nth(0, lambda y: y * math.inf))
        assert located(model) == f"in the forward pass at the {part}, layer {len(getattr(model, part))}"
    model = make(exit_gate=True)
    model.exit_gate.register_forward_hook(Nth(1, lambda g: g * math.nan))
    assert located(model, supervision="gated", penalty=0.0) == "in the exit gate"


def test_what_does_not_show_again_is_said_so():
    assert located(make()) == "at a place that did not show again: the step, repeated, was finite"
