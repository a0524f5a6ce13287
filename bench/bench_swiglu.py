"""SwiGLU's product silu(gate) * up, forward and backward apart: GB/s of reading and writing each tensor once."""

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.measure.accuracy import Errors, limits, relative_error, truth_dtype
from bench.measure.implementation import Implementation, by_name, compiled
from bench.measure.measurement import Measurement, Work
from bench.measure.roofs import copy_roof
from bench.measure.timing import Call, Prepare
from bench.shapes import DEVICE, HIDDEN_ROWS
from looped.kernels import swiglu
from looped.kernels.swiglu import swiglu_reference

IMPLEMENTATIONS = by_name(
    [
        Implementation("fused", lambda: swiglu),
        Implementation("plain", lambda: swiglu_reference),
        compiled("compiled", swiglu_reference),
    ]
)
NAMES = {"forward": ("y",), "backward": ("dgate", "dup")}
TENSORS = {"forward": 3, "backward": 5}  # read and written


@lru_cache(maxsize=1)
def inputs_of(case: str) -> tuple[Tensor, ...]:
    """gate, up and dy, [N, d_ff]."""
    generator = torch.Generator().manual_seed(0)
    shape = HIDDEN_ROWS[case].shape
    return torch.randn(3, shape.n_rows, shape.d, generator=generator).to(DEVICE, HIDDEN_ROWS[case].dtype).unbind()


def make_round(function, inputs: tuple[Tensor, ...], direction: str) -> Prepare:
    """The forward pass, or the backward pass alone."""
    gate, up = (x.detach().requires_grad_(direction == "backward") for x in inputs[:2])

    def prepare() -> Call:
        y = function(gate, up)
        return lambda: torch.autograd.grad(y, (gate, up), inputs[2])

    return prepare if direction == "backward" else lambda: lambda: (function(gate, up),)


@lru_cache(maxsize=1)
def truth_of(case: str, direction: str) -> Sequence[Tensor]:
    wide = tuple(x.to(truth_dtype(HIDDEN_ROWS[case].dtype)) for x in inputs_of(case))
    return make_round(swiglu_reference, wide, direction)()()


def errors(found: Sequence[Tensor], case: str, direction: str) -> Errors:
    expected = truth_of(case, direction)
    return {name: relative_error(a, b) for name, a, b in zip(NAMES[direction], found, expected, strict=True)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", HIDDEN_ROWS)
def bench_swiglu(measure, case: str, direction: str, implementation: str) -> None:
    inputs, shape = inputs_of(case), HIDDEN_ROWS[case].shape
    n_bytes = TENSORS[direction] * shape.n_rows * shape.d * HIDDEN_ROWS[case].dtype.itemsize
    plain = make_round(swiglu_reference, inputs, direction)
    measure(
        Measurement(
            subject=f"SwiGLU {direction}",
            case=HIDDEN_ROWS[case],
            implementation=IMPLEMENTATIONS[implementation],
            prepare=make_round(IMPLEMENTATIONS[implementation].make(), inputs, direction),
            reference=make_round(swiglu, inputs, direction),
            errors=lambda found: errors(found, case, direction),
            allowed=lambda: limits(errors(plain()(), case, direction)),
            work=Work(n_bytes / 1e9, "GB/s", lambda: copy_roof(n_bytes)),
        )
    )
