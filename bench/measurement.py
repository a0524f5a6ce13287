"""One measurement: checked, its memory counted, timed in turn with the fused implementation, and put on record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from bench.accuracy import Errors, is_correct
from bench.implementations import Implementation
from bench.memory import peak_memory
from bench.records import Record, complete, environment
from bench.shapes import DEVICE, LARGE_VOCABULARY, Case, ReadoutShape
from bench.timing import Paired, Prepare, time_in_turn


@dataclass(frozen=True)
class Work:
    """What a task asks of the machine at least: 1e9 FLOPs or bytes, and the seconds that the measured roof allows."""

    giga: float
    unit: Literal["GFLOP/s", "GB/s"]
    roof_seconds: Callable[[], float]


@dataclass(frozen=True)
class Measurement:
    """An implementation on a case.

    errors and allowed: of the implementation and of plain PyTorch in the same dtype.  prepare and reference: the
    implementation and the fused one, ready to be timed.  n_tokens: where tokens per second say something.
    """

    group: str
    case: Case
    implementation: Implementation
    errors: Callable[[], Errors]
    allowed: Callable[[], Errors]
    prepare: Prepare
    reference: Prepare
    work: Work
    n_tokens: int | None = None


def skip_what_cannot_run(implementation: Implementation, case: Case) -> None:
    """Skip the test, with the reason, if the implementation is missing or too slow for the case."""
    if implementation.missing:
        pytest.skip(f"{implementation.name}: {implementation.missing}")
    large = isinstance(case.shape, ReadoutShape) and case.shape.vocabulary > LARGE_VOCABULARY
    if DEVICE.type == "cpu" and implementation.slow_on_cpu and large:
        pytest.skip(f"{implementation.name}: too slow for this vocabulary; see its record at V = {LARGE_VOCABULARY}")


def checked(measurement: Measurement) -> tuple[Errors, bool]:
    """Errors and verdict. A competitor that raises cannot run here; ours must run and be right."""
    name, fused = measurement.implementation.name, measurement.implementation.is_fused
    try:
        found = measurement.errors()
    except Exception as error:
        if fused:
            raise
        pytest.skip(f"{name} cannot run here: {type(error).__name__}: {error}")
    allowed = measurement.allowed()
    correct = is_correct(found, allowed)
    assert correct or not fused, f"fused is wrong: errors {found}, plain PyTorch {allowed}"
    return found, correct


def measure(benchmark: Any, records: list[Record], measurement: Measurement) -> None:
    """Check, count, time; the record goes to `records` and to the benchmark's extra_info."""
    case, implementation = measurement.case, measurement.implementation
    skip_what_cannot_run(implementation, case)
    benchmark.group = f"{'smoke ' if case.smoke else ''}{measurement.group} {case.shape} {case.dtype_name}"
    found, correct = checked(measurement)
    peak = peak_memory(measurement.prepare())
    reference = None if implementation.is_fused else measurement.reference
    fused_has_run = any(record["group"] == benchmark.group for record in records)
    if reference is not None and not fused_has_run:
        reference()()
    rounds = 1 if implementation.slow_on_cpu and DEVICE.type == "cpu" else case.rounds
    paired = time_in_turn(benchmark, measurement.prepare, reference, rounds)
    if paired is not None:
        benchmark.extra_info.update(record_of(measurement, benchmark.group, paired, peak, found, correct, rounds))
        records.append(benchmark.extra_info)
        complete(records)


def record_of(
    measurement: Measurement, group: str, paired: Paired, peak: int, errors: Errors, correct: bool, rounds: int
) -> Record:
    """What is kept of one measurement, but for the ratios to other records of its group."""
    work = measurement.work
    rate = "gflops_per_second" if work.unit == "GFLOP/s" else "gigabytes_per_second"
    tokens = {} if measurement.n_tokens is None else {"tokens_per_second": measurement.n_tokens / paired.seconds}
    return {
        "subject": measurement.group,
        "group": group,
        "smoke": measurement.case.smoke,
        "implementation": measurement.implementation.name,
        "milliseconds": 1e3 * paired.seconds,
        "rounds": rounds,
        rate: work.giga / paired.seconds,
        **tokens,
        "share_of_roof": work.roof_seconds() / paired.seconds,
        "peak_memory_mib": peak / 2**20,
        "ratio_to_fused": paired.ratio,
        "correct": correct,
        "errors": errors,
        **environment(),
    }
