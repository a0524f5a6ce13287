"""How benchmarks measure: memory of a known pattern, pairs of times, what is skipped, wrong or ours."""

from types import SimpleNamespace

import pytest
import torch

from bench import measurement, timing
from bench.implementations import Implementation
from bench.measurement import Measurement, Work, measure
from bench.memory import peak_beyond_results, peak_memory
from bench.shapes import Case, ReadoutShape, RowsShape
from kernels import rms_norm_penalty

MIB = 2**20
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's allocator does")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], 0),
        ([4, -4], 4),
        ([4, 6], 0),  # all of it is results
        ([4, 6, -4, 2], 2),  # 4 + 6 at the highest, 6 + 2 stay
        ([4, -4, 6, -6, 5, -5], 6),
    ],
)
def test_peak_beyond_results(changes, expected):
    assert peak_beyond_results(changes) == expected


@on_cpu
def test_peak_memory_of_a_known_pattern():
    before = torch.zeros(MIB // 4)

    def call() -> torch.Tensor:
        first = torch.empty(2 * MIB, dtype=torch.uint8)
        second = torch.empty(3 * MIB, dtype=torch.uint8)
        del first, second
        third = before + 1  # 1 MiB, freed
        return torch.empty(MIB, dtype=torch.uint8).add_(int(third[0]))  # 1 MiB, the result

    assert peak_memory(call) == 4 * MIB
    assert peak_memory(call) == 4 * MIB


@on_cpu
def test_peak_memory_sees_inside_custom_ops():
    """Results 2 MiB of y and the mean squares; inside, the CPU implementation needs some rows in float32."""
    x = torch.randn(1024, 1024, dtype=torch.bfloat16)
    inside = peak_memory(lambda: rms_norm_penalty(x, torch.ones(1024)))
    assert 0 < inside <= 3 * 4 * MIB


@on_cpu
def test_peak_memory_does_not_count_what_is_freed_from_before():
    held = [torch.empty(8 * MIB, dtype=torch.uint8)]
    assert peak_memory(held.clear) == 0


class FakeBenchmark:
    """pytest-benchmark's pedantic mode, its rounds taking the times given; disabled without."""

    def __init__(self, times: list[float] | None) -> None:
        self.times, self.group, self.extra_info = times, None, {}
        self.stats = None if times is None else SimpleNamespace(stats=SimpleNamespace(data=times))

    def pedantic(self, target, setup, rounds) -> None:
        for _ in range(rounds if self.times is not None else 1):
            arguments, keywords = setup()
            target(*arguments, **keywords)


def test_time_in_turn_pairs_each_round_with_the_reference_before_it(monkeypatch):
    """The reference takes 1, 2, 10 s while ours takes 2, 6, 10 s: ratios 2, 3, 1; a quotient of medians would be 3."""
    events: list[str] = []
    references = iter([1.0, 2.0, 10.0])

    def seconds_of(call) -> float:
        call()
        return next(references)

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    prepare = lambda: lambda: events.append("ours")  # noqa: E731
    reference = lambda: lambda: events.append("reference")  # noqa: E731
    paired = timing.time_in_turn(FakeBenchmark([2.0, 6.0, 10.0]), prepare, reference, 3)
    assert paired == (6.0, 2.0)
    assert events == ["reference", "ours"] * 3


def test_time_in_turn_without_reference_or_timing():
    prepare = lambda: lambda: None  # noqa: E731
    assert timing.time_in_turn(FakeBenchmark([2.0, 4.0]), prepare, None, 2) == (3.0, 1.0)
    assert timing.time_in_turn(FakeBenchmark(None), prepare, None, 2) is None


CASE = Case(RowsShape(4, 8), "fp32", 2)


def case_of(name: str, *, errors=lambda: {"y": 0.0}, case=CASE, **fields) -> Measurement:
    return Measurement(
        group="thing",
        case=case,
        implementation=Implementation(name, lambda: None, **fields),
        errors=errors,
        allowed=lambda: {"y": 1e-3},
        prepare=lambda: lambda: None,
        reference=lambda: lambda: None,
        work=Work(6.0, "GFLOP/s", lambda: 1.5),
    )


def test_measure_records_rate_and_share_of_roof():
    records, benchmark = [], FakeBenchmark([2.0, 4.0])
    measure(benchmark, records, case_of("fused"))
    assert records == [benchmark.extra_info]
    assert benchmark.group == "thing 4x8 fp32"
    kept = records[0]
    assert (kept["gflops_per_second"], kept["share_of_roof"], kept["milliseconds"]) == (2.0, 0.5, 3000.0)
    assert (kept["correct"], kept["errors"], kept["ratio_to_fastest"]) == (True, {"y": 0.0}, None)
    assert {"device", "threads", "versions", "commit", "date", "peak_memory_mib"} <= kept.keys()


def test_measure_reports_a_wrong_competitor_and_fails_a_wrong_fused():
    records = []
    wrong = lambda: {"y": 1.0}  # noqa: E731
    measure(FakeBenchmark([1.0, 1.0]), records, case_of("plain", errors=wrong))
    assert records[0]["correct"] is False
    assert records[0]["errors"] == {"y": 1.0}
    with pytest.raises(AssertionError, match="fused is wrong"):
        measure(FakeBenchmark([1.0, 1.0]), records, case_of("fused", errors=wrong))


def test_measure_skips_with_the_reason():
    def fails():
        raise RuntimeError("no compiler")

    with pytest.raises(pytest.skip.Exception, match="peer: peer is not installed"):
        measure(FakeBenchmark([1.0]), [], case_of("peer", missing="peer is not installed"))
    with pytest.raises(pytest.skip.Exception, match="cannot run here: RuntimeError: no compiler"):
        measure(FakeBenchmark([1.0]), [], case_of("compiled", errors=fails))
    with pytest.raises(RuntimeError, match="no compiler"):
        measure(FakeBenchmark([1.0]), [], case_of("fused", errors=fails))


@on_cpu
def test_slow_implementations_take_one_round_and_no_large_vocabulary():
    records = []
    measure(FakeBenchmark([1.0]), records, case_of("slow", slow_on_cpu=True))
    assert records[0]["rounds"] == 1
    large = Case(ReadoutShape(1, 8, 8, measurement.LARGE_VOCABULARY + 1), "fp32", 2)
    with pytest.raises(pytest.skip.Exception, match="too slow"):
        measure(FakeBenchmark([1.0]), [], case_of("slow", slow_on_cpu=True, case=large))
