"""Readout, forward and backward: fused against every competitor, in one process, on the same inputs, in turn."""

import pytest

from bench.competitors.readouts import IMPLEMENTATIONS, errors, inputs_of, make_round
from bench.measure.accuracy import Errors, limits_of_float32_loss, limits_with_mean_loss
from bench.measure.implementation import is_ours
from bench.measure.measurement import Work, cases
from bench.measure.roofs import readout_roof
from bench.measure.timing import Prepare
from bench.shapes import READOUTS


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@cases(READOUTS)
def bench_readout(measure, case: str, implementation: str) -> None:
    shape, dtype = READOUTS[case].shape, READOUTS[case].dtype
    inputs = inputs_of(shape, dtype)

    def round_of(name: str) -> Prepare:
        return make_round(IMPLEMENTATIONS[name].fresh(), inputs)

    def limits(plain: Errors) -> Errors:
        allowed = limits_with_mean_loss(plain, dtype)
        return limits_of_float32_loss(allowed, dtype) if is_ours(implementation) else allowed

    measure(
        subject="readout forward + backward",
        case=READOUTS[case],
        implementation=IMPLEMENTATIONS[implementation],
        prepare=round_of(implementation),
        reference=round_of("fused"),
        errors=lambda loss: errors(loss, inputs),
        plain=lambda: errors(round_of("plain")()(), inputs),
        limits=limits,
        work=Work(shape.flops / 1e9, "GFLOP/s", lambda: readout_roof(shape, dtype, backward=True)),
    )
