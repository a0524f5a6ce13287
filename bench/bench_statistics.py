"""Readout, forward only: what K states predict, without gradients; the loss alone, and all statistics."""

from functools import lru_cache

import pytest
import torch

from bench.competitors.readouts import Inputs
from bench.competitors.statistics import SUBJECTS, Statistics, errors, truth
from bench.measure.accuracy import Errors, limits
from bench.measure.measurement import Measurement, Work, cases
from bench.measure.roofs import readout_roof
from bench.measure.timing import Prepare
from bench.shapes import STATISTICS


@lru_cache(maxsize=1)
def inputs_of(case: str) -> Inputs:
    return Inputs.of(STATISTICS[case].shape, STATISTICS[case].dtype)


@lru_cache(maxsize=1)
def truth_of(case: str) -> Statistics:
    return truth(inputs_of(case))


@lru_cache(maxsize=1)
def allowed(case: str, subject: str) -> Errors:
    plain = make_round(SUBJECTS[subject][1], inputs_of(case))
    return limits(errors(plain()(), inputs_of(case), truth_of(case)))


def make_round(statistics, inputs: Inputs) -> Prepare:
    def call() -> Statistics:
        with torch.no_grad():
            return statistics(inputs)

    return lambda: call


@pytest.mark.parametrize(
    ("subject", "implementation"), [(subject, name) for subject, (given, _) in SUBJECTS.items() for name in given]
)
@cases(STATISTICS)
def bench_statistics(measure, case: str, subject: str, implementation: str) -> None:
    inputs, shape, dtype = inputs_of(case), STATISTICS[case].shape, STATISTICS[case].dtype
    implementations = SUBJECTS[subject][0]
    measure(
        Measurement(
            subject=f"readout forward only, {subject}",
            case=STATISTICS[case],
            implementation=implementations[implementation],
            prepare=make_round(implementations[implementation].make(), inputs),
            reference=make_round(implementations["fused"].make(), inputs),
            errors=lambda found: errors(found, inputs, truth_of(case)),
            allowed=lambda: allowed(case, subject),
            work=Work(shape.flops / 3e9, "GFLOP/s", lambda: readout_roof(shape, dtype, backward=False)),
        )
    )
