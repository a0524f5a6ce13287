"""How benchmarks measure: memory of a known pattern, pairs of times, what is skipped, wrong or ours."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from bench.measure import measurement, roofs, timing
from bench.measure.implementation import Implementation, cannot_run_here
from bench.measure.measurement import Measurement, Work, cases, measure
from bench.measure.memory import peak_beyond_results, peak_memory
from bench.measure.records import Session
from bench.measure.roofs import Product, Roof
from bench.measure.timing import rounds_of
from bench.shapes import Case, ReadoutShape, RowsShape
from looped.kernels import rms_norm_penalty

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
        ([-8], 0),  # allocated in an earlier profile
        ([-8, 4, -4], 4),
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

    for _ in range(2):
        peak, result = peak_memory(call)
        assert peak == 4 * MIB
        assert len(result) == MIB


@on_cpu
def test_peak_memory_sees_inside_custom_ops():
    """Results 2 MiB of y and the mean squares; inside, the CPU implementation needs some rows in float32."""
    x = torch.randn(1024, 1024, dtype=torch.bfloat16)
    inside, _ = peak_memory(lambda: rms_norm_penalty(x, torch.ones(1024)))
    assert 0 < inside <= 3 * 4 * MIB


@on_cpu
def test_peak_memory_does_not_count_what_is_freed_from_before():
    held = [torch.empty(8 * MIB, dtype=torch.uint8)]
    assert peak_memory(held.clear)[0] == 0


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
    assert paired == (6.0, 2.0, (1.5, 2.5), 3)
    assert events == ["reference", "ours"] * 3


def test_time_in_turn_without_timing():
    prepare = lambda: lambda: None  # noqa: E731
    assert timing.time_in_turn(FakeBenchmark(None), prepare, prepare, 2) is None


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(0.0, 100), (0.01, 100), (0.1, 10), (0.5, 7), (1.0, 7), (2.0, 3), (5.0, 2), (60.0, 2)],
)
def test_rounds_fill_a_second_and_are_at_least_seven_where_they_are_short(seconds, rounds):
    assert rounds_of(seconds) == rounds


CASE = Case(RowsShape(4, 8), "fp32")


def nothing():
    return lambda: None


def case_of(name: str, *, errors=lambda _: {"y": 0.0}, case=CASE, prepare=nothing, **fields) -> Measurement:
    return Measurement(
        subject="thing",
        case=case,
        implementation=Implementation(name, **fields),
        prepare=prepare,
        reference=nothing,
        errors=errors,
        plain=lambda: {"y": 0.0},
        limits=lambda plain: {name: error + 1e-3 for name, error in plain.items()},
        work=Work(6.0, "GFLOP/s", lambda: Roof(nothing(), 0.5)),
    )


class AnyRounds(FakeBenchmark):
    """Every round, however many, takes one second."""

    def pedantic(self, target, setup, rounds) -> None:
        self.stats.stats.data = [1.0] * rounds
        super().pedantic(target, setup, rounds)


def test_measure_records_rate_and_share_of_roof(monkeypatch):
    """The roof's call, half of the work, takes 0.5 and 1.5 s where the fused one takes 2 and 4 s: all of it would take
    half as long as ours in the first round and three quarters in the second; the share is of the median ratio, 10/3."""
    session, benchmark = Session(), FakeBenchmark([2.0, 4.0])
    monkeypatch.setattr(measurement, "rounds_of", lambda seconds: 2)
    times = iter([0.5, 1.5])
    monkeypatch.setattr(timing, "seconds_of", lambda _: next(times))
    measure(benchmark, session, case_of("fused"))
    assert session.records == [benchmark.extra_info]
    assert benchmark.group == "thing 4x8 fp32"
    kept = session.records[0]
    assert (kept["gflops_per_second"], kept["milliseconds"]) == (2.0, 3000.0)
    assert kept["share_of_roof"] == pytest.approx(0.6)
    assert (kept["correct"], kept["errors"], kept["allowed"]) == (True, {"y": 0.0}, {"y": 1e-3})
    assert (kept["ratio_to_fastest"], kept["ratio_to_fused"], kept["ratio_quartiles"]) == (None, 1.0, [1.0, 1.0])
    assert session.reference_seconds("thing 4x8 fp32") == 3.0
    assert session.reference_seconds("another") is None
    place = {"device", "instructions", "memory", "threads", "versions", "commit", "date"}
    assert {*place, "rounds", "peak_memory_mib"} <= kept.keys()


def test_what_is_checked_is_what_the_call_returned(monkeypatch):
    # A count that takes a second, as on a busy machine, says itself how long a round takes.
    monkeypatch.setattr("bench.measure.measurement.peak_memory", lambda call: (0, call()))
    calls = []

    def prepare():
        return lambda: calls.append("call") or 0.25

    session = Session()
    smoke = CASE._replace(smoke=True)
    measure(AnyRounds([1.0]), session, case_of("plain", prepare=prepare, errors=lambda y: {"y": y}, case=smoke))
    assert session.records[0]["errors"] == {"y": 0.25}
    assert session.records[0]["correct"] is False
    assert len(calls) == 3, "the check, which counts memory too; a round that says how many there may be; a timed one"
    calls.clear()
    measure(AnyRounds([1.0]), session, case_of("compiled", prepare=prepare, case=smoke, compiles="whole"))
    assert len(calls) == 4, "one more, which compiles"


def test_measure_fails_a_wrong_one_of_ours():
    for name in ("fused", "fused-blocks-compiled"):
        with pytest.raises(AssertionError, match=f"{name} is wrong"):
            measure(AnyRounds([1.0]), Session(), case_of(name, errors=lambda _: {"y": 1.0}))


def third_party_that_raises(tmp_path):
    """A function of a package named as a known third party."""
    package = tmp_path / "liger_kernel"
    package.mkdir()
    (package / "ops.py").write_text("def run():\n    raise ValueError('no such GPU')\n")
    spec = importlib.util.spec_from_file_location("ops", package / "ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def test_only_what_is_not_our_fault_is_skipped(tmp_path):
    def raising(error):
        def errors(_):
            raise error

        return errors

    session = Session()
    with pytest.raises(pytest.skip.Exception, match="peer: peer is not installed"):
        measure(AnyRounds([1.0]), session, case_of("peer", missing="peer is not installed"))
    with pytest.raises(pytest.skip.Exception, match="cannot run here: InvalidCxxCompiler"):
        measure(AnyRounds([1.0]), session, case_of("compiled", errors=raising(InvalidCxxCompiler())))
    run = third_party_that_raises(tmp_path)
    with pytest.raises(pytest.skip.Exception, match="cannot run here: ValueError: no such GPU"):
        measure(AnyRounds([1.0]), session, case_of("liger", errors=lambda _: run()))
    assert [(s["group"], s["implementation"]) for s in session.skipped] == [
        ("thing 4x8 fp32", name) for name in ("peer", "compiled", "liger")
    ]
    assert session.skipped[2]["reason"] == "cannot run here: ValueError: no such GPU"
    with pytest.raises(RuntimeError, match="a fault of ours"):
        measure(AnyRounds([1.0]), session, case_of("compiled", errors=raising(RuntimeError("a fault of ours"))))
    with pytest.raises(InvalidCxxCompiler):
        measure(AnyRounds([1.0]), session, case_of("fused", errors=raising(InvalidCxxCompiler())))
    assert len(session.skipped) == 3
    assert not cannot_run_here(TypeError("unexpected keyword argument"))


def test_the_roof_is_the_better_of_the_dtypes_in_which_products_may_be_formed(monkeypatch):
    rates = {torch.bfloat16: 1.0, torch.float32: 3.0}

    def best_product(a, b):
        return Product(nothing(), 6, 6 / rates[a.dtype])

    monkeypatch.setattr(roofs, "best_product", best_product)
    monkeypatch.setattr(roofs, "product_dtype", lambda tensor, dtype: torch.float32)
    monkeypatch.setattr(roofs, "BF16_IS_EMULATED", False)
    assert roofs.product_of(2, 2, 2, torch.bfloat16).rate == 3
    rates[torch.bfloat16] = 4.0
    assert roofs.product_of(2, 2, 2, torch.bfloat16).rate == 4
    assert roofs.product_of(2, 2, 2, torch.float32).rate == 3
    monkeypatch.setattr(roofs, "BF16_IS_EMULATED", True)
    del rates[torch.bfloat16]  # is not tried
    assert roofs.product_of(2, 2, 2, torch.bfloat16).rate == 3


def test_a_slow_layout_is_tried_once(monkeypatch):
    calls = []

    def seconds_of(call):
        calls.append(call.args)
        a, b = call.args
        return 1.0 if a.is_contiguous() and b.is_contiguous() else 9.0

    monkeypatch.setattr(roofs, "seconds_of", seconds_of)
    found = roofs.best_product(torch.ones(3, 4), torch.ones(4, 5))
    assert (found.seconds, found.flops) == (1, 2 * 3 * 4 * 5)
    assert all(matrix.is_contiguous() for matrix in found.call.args)
    assert len(calls) == 2 * (1 + roofs.ROUNDS) + 6  # two layouts of the result, then six slow ones


def test_a_readout_s_roof_repeats_its_products_and_knows_what_share_they_are(monkeypatch):
    """16,384 rows are 32 chunks of 512; where one is more than all 128 rows, it runs once and is four times them."""
    ran = []

    def product_of(rows, inner, columns, dtype):
        return Product(lambda: ran.append((rows, inner, columns)), 2 * rows * inner * columns, float(rows))

    monkeypatch.setattr(roofs, "CHUNK_ROWS", (512,))
    monkeypatch.setattr(roofs, "product_of", product_of)
    roofs._readout_products.cache_clear()
    roof = roofs.readout_roof(ReadoutShape(2, 8192, 64, 100), torch.float32, backward=True)
    roof.call()
    assert roof.share == pytest.approx(1.0)
    assert ran == [(512, 64, 100)] * 32 + [(512, 100, 64)] * 32 + [(100, 512, 64)] * 32
    ran.clear()
    roof = roofs.readout_roof(ReadoutShape(2, 64, 64, 100), torch.float32, backward=False)
    roof.call()
    assert (ran, roof.share) == ([(512, 64, 100)], pytest.approx(4.0))
    roofs._readout_products.cache_clear()


def test_a_copy_s_roof_moves_the_bytes_asked_for():
    roof = roofs.copy_roof(1000)
    assert roof.share == pytest.approx(1.0)
    assert roof.call().nbytes == 500


def test_long_cases_alone_are_marked_so():
    long = CASE._replace(long=True)
    _, parameters = cases({"usual": CASE, "minutes": long}).args
    assert [(p.values, [mark.name for mark in p.marks]) for p in parameters] == [
        (("usual",), []),
        (("minutes",), ["long"]),
    ]
