"""Norm + penalty, with and without the residual add, forward and backward apart: GB/s of the least possible traffic."""

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.competitors.norms import IMPLEMENTATIONS, NormInputs, fused, plain
from bench.measure.accuracy import Errors, limits, relative_error, truth_dtype
from bench.measure.measurement import Measurement, Work
from bench.measure.roofs import copy_roof
from bench.measure.timing import Call, Prepare
from bench.shapes import ROWS, Case, RowsShape


@lru_cache(maxsize=1)
def inputs_of(case: str, residual: bool) -> NormInputs:
    return NormInputs.of(ROWS[case].shape, ROWS[case].dtype, residual=residual)


def forward_round(norm, inputs: NormInputs) -> Prepare:
    def call() -> list[Tensor]:
        with torch.no_grad():
            return norm(inputs)

    return lambda: call


def backward_round(norm, inputs: NormInputs) -> Prepare:
    """The forward pass is not timed."""

    def prepare() -> Call:
        outputs = norm(inputs)
        return lambda: torch.autograd.grad(outputs, inputs.differentiated, inputs.gradients)

    return prepare


ROUNDS = {"forward": forward_round, "backward": backward_round}
NAMES = {"forward": ("y", "mean square", "sum"), "backward": ("dx", "dweight", "dresidual")}


@lru_cache(maxsize=1)
def truth_of(case: str, residual: bool, direction: str) -> Sequence[Tensor]:
    return ROUNDS[direction](plain, inputs_of(case, residual).to(truth_dtype(ROWS[case].dtype)))()()


def errors(found: Sequence[Tensor], case: str, residual: bool, direction: str) -> Errors:
    expected = truth_of(case, residual, direction)
    names = NAMES[direction][: len(expected)]
    return {name: relative_error(a, b) for name, a, b in zip(names, found, expected, strict=True)}


def least_bytes(case: Case[RowsShape], *, residual: bool, backward: bool) -> int:
    """Each tensor once. Forward: x (+ residual) read, y (+ sum) written; backward: h, dy (+ dsum) read, dh written."""
    if backward:
        tensors = 4 if residual else 3
    else:
        tensors = 4 if residual else 2
    return tensors * case.shape.n_rows * case.shape.d * case.dtype.itemsize + 4 * case.shape.n_rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add-norm"])
@pytest.mark.parametrize("case", ROWS)
def bench_norm(measure, case: str, residual: bool, direction: str, implementation: str) -> None:
    inputs, make_round = inputs_of(case, residual), ROUNDS[direction]
    n_bytes = least_bytes(ROWS[case], residual=residual, backward=direction == "backward")
    plain_call = make_round(plain, inputs)
    measure(
        Measurement(
            subject=f"{'add + ' if residual else ''}norm + penalty {direction}",
            case=ROWS[case],
            implementation=IMPLEMENTATIONS[implementation],
            prepare=make_round(IMPLEMENTATIONS[implementation].make(), inputs),
            reference=make_round(fused, inputs),
            errors=lambda found: errors(found, case, residual, direction),
            allowed=lambda: limits(errors(plain_call()(), case, residual, direction)),
            work=Work(n_bytes / 1e9, "GB/s", lambda: copy_roof(n_bytes)),
        )
    )
