"""Norm + penalty, with and without the residual add, forward and backward apart: GB/s of the least possible traffic."""

from functools import cache, lru_cache

import pytest
import torch

from bench import norms
from bench.implementations import Implementation
from bench.measurement import Measurement, Work
from bench.norms import IMPLEMENTATIONS, NormInputs
from bench.roofs import copy_rate
from bench.shapes import ROWS, Case, RowsShape
from bench.timing import Call, Prepare


@lru_cache(maxsize=1)
def inputs_of(case: Case[RowsShape], residual: bool) -> NormInputs:
    return NormInputs.of(case.shape, case.dtype, residual=residual)


@cache
def plain_errors(case: Case[RowsShape], residual: bool) -> norms.Errors:
    return norms.errors(norms.plain, inputs_of(case, residual))


def forward_round(norm, inputs: NormInputs) -> Prepare:
    def call() -> object:
        with torch.no_grad():
            return norm(inputs)

    return lambda: call


def backward_round(norm, inputs: NormInputs) -> Prepare:
    """The forward pass is not timed."""

    def prepare() -> Call:
        outputs = norm(inputs)
        return lambda: torch.autograd.grad(outputs, inputs.differentiated, inputs.gradients)

    return prepare


def least_bytes(case: Case[RowsShape], *, residual: bool, backward: bool) -> int:
    """Each tensor once. Forward: x (+ residual) read, y (+ sum) written; backward: h, dy (+ dsum) read, dh written."""
    if backward:
        tensors = 4 if residual else 3
    else:
        tensors = 4 if residual else 2
    return tensors * case.shape.n_rows * case.shape.d * case.dtype.itemsize + 4 * case.shape.n_rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add-norm"])
@pytest.mark.parametrize("case", ROWS, ids=str)
def bench_norm(measure, case: Case[RowsShape], residual: bool, direction: str, implementation: Implementation) -> None:
    inputs, norm = inputs_of(case, residual), implementation.make()
    backward = direction == "backward"
    n_bytes = least_bytes(case, residual=residual, backward=backward)
    make_round = backward_round if backward else forward_round
    measure(
        Measurement(
            group=f"{'add + ' if residual else ''}norm + penalty {direction}",
            case=case,
            implementation=implementation,
            errors=lambda: norms.errors(norm, inputs),
            allowed=lambda: plain_errors(case, residual),
            prepare=make_round(norm, inputs),
            reference=make_round(norms.fused, inputs),
            work=Work(n_bytes / 1e9, "GB/s", lambda: n_bytes / copy_rate(n_bytes)),
        )
    )
