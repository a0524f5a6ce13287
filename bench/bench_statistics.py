"""Readout, forward only: what K states predict, without gradients; the loss alone, and all statistics."""

import pytest
import torch

from bench.competitors.readouts import inputs_of
from bench.competitors.statistics import SUBJECTS, Statistics, errors
from bench.measure.measurement import Work, cases
from bench.measure.roofs import readout_roof
from bench.measure.timing import Prepare
from bench.shapes import STATISTICS


@pytest.mark.parametrize(
    ("subject", "implementation"), [(subject, name) for subject, given in SUBJECTS.items() for name in given]
)
@cases(STATISTICS)
def bench_statistics(measure, case: str, subject: str, implementation: str) -> None:
    shape, dtype = STATISTICS[case].shape, STATISTICS[case].dtype
    inputs, implementations = inputs_of(shape, dtype), SUBJECTS[subject]

    def round_of(name: str) -> Prepare:
        statistics = implementations[name].fresh()

        def call() -> Statistics:
            with torch.no_grad():
                return statistics(inputs)

        return lambda: call

    measure(
        subject=f"readout forward only, {subject}",
        case=STATISTICS[case],
        implementation=implementations[implementation],
        prepare=round_of(implementation),
        reference=round_of("fused"),
        errors=lambda found: errors(found, inputs),
        plain=lambda: errors(round_of("plain")()(), inputs),
        work=Work(shape.flops / 3e9, "GFLOP/s", lambda: readout_roof(shape, dtype, backward=False)),
    )
