"""Readout, forward and backward: fused against every competitor, in one process, on the same inputs, in turn."""

from functools import lru_cache

import pytest
from torch import Tensor

from bench.competitors.readouts import IMPLEMENTATIONS, Inputs, errors, fused, make_round, plain, truth
from bench.measure.accuracy import Errors, limits_of_float32_loss, limits_with_mean_loss
from bench.measure.implementation import is_ours
from bench.measure.measurement import Measurement, Work, cases
from bench.measure.roofs import readout_roof
from bench.shapes import READOUTS


@lru_cache(maxsize=1)
def inputs_of(case: str) -> Inputs:
    return Inputs.of(READOUTS[case].shape, READOUTS[case].dtype)


@lru_cache(maxsize=1)
def truth_of(case: str) -> dict[str, Tensor | None]:
    return truth(inputs_of(case))


@lru_cache(maxsize=1)
def allowed(case: str) -> Errors:
    inputs = inputs_of(case)
    return limits_with_mean_loss(errors(make_round(plain, inputs)()(), inputs, truth_of(case)), READOUTS[case].dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@cases(READOUTS)
def bench_readout(measure, case: str, implementation: str) -> None:
    inputs, shape, dtype = inputs_of(case), READOUTS[case].shape, READOUTS[case].dtype
    measure(
        Measurement(
            subject="readout forward + backward",
            case=READOUTS[case],
            implementation=IMPLEMENTATIONS[implementation],
            prepare=make_round(IMPLEMENTATIONS[implementation].make(), inputs),
            reference=make_round(fused, inputs),
            errors=lambda loss: errors(loss, inputs, truth_of(case)),
            allowed=lambda: limits_of_float32_loss(allowed(case), dtype) if is_ours(implementation) else allowed(case),
            work=Work(shape.flops / 1e9, "GFLOP/s", lambda: readout_roof(shape, dtype, backward=True)),
        )
    )
