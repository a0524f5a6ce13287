"""Readout, forward and backward: fused against every competitor, in one process, on the same inputs, in turn."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.accuracy import Errors, allowing_for_luck
from bench.implementations import Implementation
from bench.measurement import Measurement, Work
from bench.readouts import IMPLEMENTATIONS, Inputs, errors, fused, make_round, plain, results
from bench.roofs import readout_floor
from bench.shapes import READOUTS, Case, ReadoutShape


@lru_cache(maxsize=1)
def inputs_of(case: Case[ReadoutShape]) -> Inputs:
    return Inputs.of(case.shape, case.dtype)


@lru_cache(maxsize=1)
def truth_of(case: Case[ReadoutShape]) -> dict[str, Tensor | None]:
    """Plain PyTorch on the same numbers in float32."""
    return results(plain, inputs_of(case).to(torch.float32))


@lru_cache(maxsize=1)
def plain_errors(case: Case[ReadoutShape]) -> Errors:
    return errors(plain, inputs_of(case), truth_of(case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("case", READOUTS, ids=str)
def bench_readout(measure, case: Case[ReadoutShape], implementation: Implementation) -> None:
    inputs, loss = inputs_of(case), implementation.make()
    measure(
        Measurement(
            group="readout forward + backward",
            case=case,
            implementation=implementation,
            errors=lambda: plain_errors(case) if loss is plain else errors(loss, inputs, truth_of(case)),
            allowed=lambda: allowing_for_luck(plain_errors(case), case.dtype),
            prepare=make_round(loss, inputs),
            reference=make_round(fused, inputs),
            work=Work(case.shape.flops / 1e9, "GFLOP/s", lambda: readout_floor(case.shape, case.dtype, backward=True)),
        )
    )
