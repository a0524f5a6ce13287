"""The option --record, the clock on a GPU, and the fixture that measures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure.measurement import Measurement
from bench.measure.measurement import measure as measure_one
from bench.measure.place import RESULTS
from bench.measure.records import Results, Session, write
from bench.measure.tables import markdown
from bench.measure.timing import clock
from bench.shapes import DEVICE

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the measurements to --results")
    parser.addoption(
        "--results", type=Path, default=RESULTS, help="folder of the records; tiny cases never enter bench/results"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session()


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
def measure(request: pytest.FixtureRequest, benchmark) -> Callable[..., None]:
    """Check, count and time one measurement, given by its fields, with denormals flushed for everybody.

    What torch.compile gives up on must not be timed under its name: it would fall back to eager without a word.
    """
    torch.set_flush_denormal(True)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    session, options = request.config.stash[SESSION], request.config.option

    def measure_and_write(**fields: Any) -> None:
        """Written at once: a session that is stopped keeps what it has."""
        try:
            measure_one(benchmark, session, Measurement(**fields))
        finally:
            if options.record:
                write(session, options.results)

    return measure_and_write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    session.records = sorted((r for r in session.records if not r["smoke"]), key=lambda r: (r["subject"], r["group"]))
    if not session.records:
        return
    terminalreporter.write_line(markdown(Results(session.records, session.skipped)))
    if config.option.record:
        terminalreporter.write_line(f"written: {write(session, config.option.results)}")
