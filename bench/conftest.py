"""The option --record, the clock on a GPU, and the fixture that measures."""

from collections.abc import Callable

import pytest
import torch

from bench.measurement import Measurement
from bench.measurement import measure as measure_one
from bench.records import Record, markdown, write
from bench.shapes import DEVICE
from bench.timing import clock

RECORDS = pytest.StashKey[list[Record]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the measurements to bench/results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tiny cases run only when -k smoke asks for them; on a GPU its events are the clock."""
    if "smoke" not in config.option.keyword:
        smoke = [item for item in items if "smoke" in item.name]
        config.hook.pytest_deselected(items=smoke)
        items[:] = [item for item in items if "smoke" not in item.name]
    if DEVICE.type == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark) -> Callable[[Measurement], None]:
    """Check, count and time one measurement, with denormals flushed for everybody."""
    torch.set_flush_denormal(True)
    return lambda measurement: measure_one(benchmark, request.config.stash[RECORDS], measurement)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = [record for record in config.stash[RECORDS] if not record["smoke"]]
    if not records:
        return
    terminalreporter.write_line(markdown(records))
    if config.getoption("--record"):
        for path in write(records):
            terminalreporter.write_line(f"written: {path}")
