"""One measurement: checked, its memory counted, timed in turn with the fused implementation, and put on record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from bench.measure.accuracy import Errors, is_correct, limits
from bench.measure.implementation import Implementation, cannot_run_here, is_ours
from bench.measure.memory import peak_memory
from bench.measure.place import Record, environment
from bench.measure.records import Session, complete
from bench.measure.roofs import Roof
from bench.measure.timing import Paired, Prepare, rounds_of, seconds_of, time_in_turn
from bench.shapes import DEVICE, Case


@dataclass(frozen=True)
class Work:
    """What a task asks of the machine at least: 1e9 FLOPs or bytes, and the fastest way known to do no more."""

    giga: float
    unit: Literal["GFLOP/s", "GB/s"]
    roof: Callable[[], Roof]


@dataclass(frozen=True)
class Measurement:
    """An implementation on a case.

    prepare and reference: the implementation and the fused one, ready to be timed.  errors: of what a call of the
    implementation gave.  plain: the errors of plain PyTorch on the same case, from which `limits` makes those that are
    allowed.  n_tokens: where tokens per second say something.
    """

    subject: str
    case: Case
    implementation: Implementation
    prepare: Prepare
    reference: Prepare
    errors: Callable[[Any], Errors]
    plain: Callable[[], Errors]
    work: Work
    limits: Callable[[Errors], Errors] = limits
    n_tokens: int | None = None

    @property
    def group(self) -> str:
        return f"{'smoke ' if self.case.smoke else ''}{self.subject} {self.case.shape} {self.case.dtype_name}"


def cases(of: Mapping[str, Case]) -> pytest.MarkDecorator:
    """The test's parameter `case`: the names; the long ones are marked, and left out by default."""
    return pytest.mark.parametrize(
        "case", [pytest.param(name, marks=[pytest.mark.long] if case.long else []) for name, case in of.items()]
    )


@dataclass(frozen=True)
class Checked:
    """What one untimed call tells: errors and their limits, the peak of memory in bytes, and about its seconds."""

    errors: Errors
    allowed: Errors
    peak: int
    seconds: float

    @property
    def correct(self) -> bool:
        return is_correct(self.errors, self.allowed)


def skip(session: Session, measurement: Measurement, reason: str) -> None:
    """Skip the test and keep the reason."""
    name = measurement.implementation.name
    session.skipped.append({"group": measurement.group, "implementation": name, "reason": reason})
    pytest.skip(f"{name}: {reason}")


def checked(session: Session, measurement: Measurement) -> Checked:
    """One call that serves as check, memory count and warm-up: large readouts take seconds each.

    A competitor that cannot run here is skipped; ours must run and be right.
    """
    name, prepare = measurement.implementation.name, measurement.prepare
    try:
        if measurement.implementation.compiles or DEVICE.type == "cuda":
            prepare()()
        call, results = prepare(), []
        seconds = seconds_of(lambda: results.append(peak_memory(call)))
        if seconds < 1:  # the count itself may take longer than the call
            seconds = seconds_of(prepare())
        [(peak, result)] = results
        found = measurement.errors(result)
    except Exception as error:
        if is_ours(name) or not cannot_run_here(error):
            raise
        skip(session, measurement, f"cannot run here: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    allowed = measurement.limits(session.plain_errors(measurement.group, measurement.plain))
    check = Checked(found, allowed, getattr(call, "peak_bytes", peak), seconds)  # a graph says what its capture took
    assert check.correct or not is_ours(name), f"{name} is wrong: errors {found}, allowed {allowed}"
    return check


def measure(benchmark: Any, session: Session, measurement: Measurement) -> None:
    """Check, count, time; the record goes to the session and to the benchmark's extra_info."""
    implementation = measurement.implementation
    benchmark.group = measurement.group
    if implementation.missing:
        skip(session, measurement, implementation.missing)
    if implementation.compiles and not measurement.case.compiles:
        skip(session, measurement, "compiles, and so is left out of this case")
    check = checked(session, measurement)
    roof = measurement.work.roof() if implementation.name == "fused" else None
    reference = measurement.reference if roof is None else lambda: roof.call
    seconds = (None if roof else session.reference_seconds(measurement.group)) or seconds_of(reference())
    rounds = 1 if measurement.case.smoke else rounds_of(check.seconds + seconds)
    paired = time_in_turn(benchmark, measurement.prepare, reference, rounds)
    if paired is not None:
        benchmark.extra_info.update(record_of(measurement, paired, check, roof))
        session.records.append(benchmark.extra_info)
        complete(session.records)


def record_of(measurement: Measurement, paired: Paired, check: Checked, roof: Roof | None) -> Record:
    """What is kept of one measurement, but for the ratios to other records of its group.

    roof: what the fused implementation took turns with; all others took turns with the fused one.
    """
    work, seconds = measurement.work, paired.seconds
    rate = "gflops_per_second" if work.unit == "GFLOP/s" else "gigabytes_per_second"
    tokens = {} if measurement.n_tokens is None else {"tokens_per_second": measurement.n_tokens / seconds}
    return {
        "subject": measurement.subject,
        "group": measurement.group,
        "smoke": measurement.case.smoke,
        "implementation": measurement.implementation.name,
        "milliseconds": 1e3 * seconds,
        "rounds": paired.rounds,
        rate: work.giga / seconds,
        **tokens,
        "share_of_roof": None if roof is None else 1 / (roof.share * paired.ratio),
        "peak_memory_mib": check.peak / 2**20,
        "ratio_to_fused": paired.ratio if roof is None else 1.0,
        "ratio_quartiles": list(paired.ratio_quartiles) if roof is None else [1.0, 1.0],
        "correct": check.correct,
        "errors": check.errors,
        "allowed": check.allowed,
        **environment(),
    }
