"""What a benchmark times: the work that it names, on data that is there before the clock starts."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from bench import bench_forward, bench_norm, bench_radial, bench_readout, bench_statistics, bench_swiglu
from bench.shapes import FORWARDS, HIDDEN_ROWS, READOUTS, ROWS, STATISTICS

BENCHMARKS = {
    "norm forward": (bench_norm.bench_norm, ROWS, {"residual": True, "direction": "forward"}),
    "norm backward": (bench_norm.bench_norm, ROWS, {"residual": True, "direction": "backward"}),
    "radial": (bench_radial.bench_radial, ROWS, {}),
    "swiglu forward": (bench_swiglu.bench_swiglu, HIDDEN_ROWS, {"direction": "forward"}),
    "swiglu backward": (bench_swiglu.bench_swiglu, HIDDEN_ROWS, {"direction": "backward"}),
    "readout": (bench_readout.bench_readout, READOUTS, {}),
    "loss": (bench_statistics.bench_statistics, STATISTICS, {"subject": "loss"}),
    "statistics": (bench_statistics.bench_statistics, STATISTICS, {"subject": "all statistics"}),
    "forward": (bench_forward.bench_forward, FORWARDS, {}),
}
DRAWS = {"rand", "randn", "randint", "random_", "normal_", "uniform_"}


class Names(TorchDispatchMode):
    """The names of the operations of ATen and ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def operations(name: str, implementation: str) -> list[str]:
    """Of the timed call of the smallest case of a benchmark, the data of which is made anew."""
    benchmark, shapes, arguments = BENCHMARKS[name]
    smallest = next(name for name, case in shapes.items() if case.smoke)
    given = {}
    benchmark(lambda **fields: given.update(fields), case=smallest, implementation=implementation, **arguments)
    call = given["prepare"]()
    with Names() as names:
        call()
    return names.seen


@pytest.mark.parametrize("implementation", ["fused", "plain"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_data_is_made_while_the_clock_runs(name, implementation):
    found = operations(name, implementation)
    assert found
    assert not DRAWS.intersection(found)


def test_the_backward_pass_is_timed_alone():
    """The fused norm and the fused product are one operation each way."""
    assert "rms_norm_mean_square" in operations("norm forward", "fused")
    assert "rms_norm_mean_square" not in operations("norm backward", "fused")
    assert "swiglu" in operations("swiglu forward", "fused")
    assert "swiglu" not in operations("swiglu backward", "fused")
