"""All that only a GPU can tell, in one command of less than eight minutes.

    make gpu                                  # with an interpreter that is there, and nothing installed: PY=python3
    python -m bench.gpu [PART ...]            # some of its parts
    python -m bench.gpu --table RECORD.jsonl  # the short table of a record

The parts: the kernels' tests; the host's time a call; the kernels that memory limits, each alone; the training step,
launched kernel by kernel and as one CUDA graph, fused and plain, compiled or not; the readout, forward only and with
gradients; the norms.  Each is a process of its own with a time limit, and what it finds is written at once: a part that
is stopped loses only its rest.  Competitors that are not installed are named.  The record is a file of bench/results.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bench.measure.pivot import table
from bench.measure.place import RESULTS, environment, path_in, place_of
from bench.measure.records import Session, read, write
from looped.command_line import Parser

ROOT = Path(__file__).parents[1]
SHOWN_LINES = 25  # of a part that failed
TEST_SECONDS = 75  # of a process of the kernels' tests
TINY = "smoke and not (compiled or chunked or terminal or (huginn and (plain or eager)))"


def note(results: Path, name: str, **values: Any) -> None:
    """Write a fact into the record."""
    write(Session(facts=[{"name": name, **values, **environment()}]), results)


# The parts: each runs in a process of its own, and returns its exit code ---------------------------------------------


# Without the options of pyproject.toml, so that what is printed is what is read here.
PYTEST = [sys.executable, "-u", "-m", "pytest", "-o", "addopts=", "--tb=short", "-p", "no:cacheprovider"]


def kernel_tests() -> list[str]:
    """The tests of the Triton kernels: of those that run on both implementations, the cases of that one."""
    on_both = re.compile(r"^def test_\w+\(.*\b(backend|device)\b", re.MULTILINE)
    paths = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if on_both.search(path.read_text())]
    command = [*PYTEST, "--collect-only", "-q", "-k", "triton", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if re.match(r"\S+\.py::test_", line)]


def tested(tests: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run tests by their ids in a process of their own, at most so long: how many passed, which failed, the output."""
    command = [*PYTEST, "-v", *tests]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds).stdout
    except subprocess.TimeoutExpired as stopped:
        said = (stopped.stdout or b"").decode()
    ends = dict(re.findall(r"^(\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)\b", said, re.MULTILINE))
    return {
        "passed": sum(end in ("PASSED", "SKIPPED") for end in ends.values()),
        "failed": [name for name, end in ends.items() if end in ("FAILED", "ERROR")],
        "not_run": len(tests) - len(ends),
        "said": said,
    }


def run_kernel_tests(results: Path, smoke: bool, plugins: Sequence[object]) -> int:
    """On the GPU, many processes beside each other: most of the time goes into compiling."""
    tests = kernel_tests()
    n_processes = os.cpu_count() or 2
    size = max(1, -(-len(tests) // n_processes))
    blocks = [tests[start : start + size] for start in range(0, len(tests), size)]
    if smoke:
        return int(not blocks)
    with ThreadPoolExecutor(n_processes) as pool:
        outcomes = list(pool.map(lambda block: tested(block, TEST_SECONDS), blocks))
    failed = [name for outcome in outcomes for name in outcome["failed"]]
    passed, not_run = (sum(outcome[count] for outcome in outcomes) for count in ("passed", "not_run"))
    print("\n".join(outcome["said"] for outcome in outcomes if outcome["failed"] or outcome["not_run"]))
    note(results, "the kernels' tests", passed=passed, failed=failed, not_run=not_run)
    return int(bool(failed or not_run or not passed))


def run_host(results: Path, smoke: bool, plugins: Sequence[object]) -> int:
    from bench import bench_host

    rounds, calls = (1, 1) if smoke else (7, 20)
    for name, mode, value in bench_host.measured(rounds, calls):
        note(results, f"host, {name}, {mode}", subject=name, mode=mode, microseconds=value)
    for name, times in bench_host.steps_in_turn(rounds).items():
        note(results, f"host, {name}", subject=name, mode=bench_host.STEP, microseconds=statistics.median(times))
    return 0


def run_kernels(results: Path, smoke: bool, plugins: Sequence[object]) -> int:
    from bench import kernel_rates

    for rate in kernel_rates.measured(1, 1024) if smoke else kernel_rates.measured():
        note(results, f"{rate.kernel}, {rate.case}", **rate._asdict())
    return 0


def benchmarks(file: str, chosen: str) -> Callable[[Path, bool, Sequence[object]], int]:
    """A part that runs the benchmarks of a file that pytest's -k chooses, or tiny ones."""

    def run(results: Path, smoke: bool, plugins: Sequence[object]) -> int:
        options = ["--benchmark-only", "--benchmark-columns=median", "-q", "-rfE", "--tb=short", "-pno:cacheprovider"]
        where = [str(ROOT / "bench" / file), "--rootdir", str(ROOT), "--record", f"--results={results}"]
        return int(pytest.main([*where, *options, "-k", TINY if smoke else chosen], plugins=list(plugins)))

    return run


class Part(NamedTuple):
    """`run(results, smoke, plugins)` gives an exit code; seconds: after which it is stopped."""

    seconds: int
    run: Callable[[Path, bool, Sequence[object]], int]


READOUT = "K4-N8192-d768-V20000-bf16"
PARTS = {
    "tests": Part(95, run_kernel_tests),
    "host": Part(25, run_host),
    "kernels": Part(35, run_kernels),
    "step": Part(115, benchmarks("bench_step.py", "129m-32x256-K4-bf16-per-loop or 129m-4x256-K4-bf16-per-loop")),
    "readout": Part(100, benchmarks("bench_readout.py", f"{READOUT} or K4-N8192-d2048-V128256-bf16")),
    "forward only": Part(45, benchmarks("bench_statistics.py", READOUT)),
    "norms": Part(60, benchmarks("bench_norm.py", "32768x768-bf16 or 32768x4096-bf16")),
}


# The command ----------------------------------------------------------------------------------------------------------


def supervised(command: Sequence[str], seconds: float) -> tuple[str, bool, str]:
    """Run a command at most so long: what became of it, whether all went well, and the end of its output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(seconds)
            outcome = f"done in {time.monotonic() - start:.0f} s" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            code, outcome = None, f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return outcome, code == 0, "".join(output.readlines()[-SHOWN_LINES:])


def run_all(names: Sequence[str], results: Path) -> bool:
    """Every part in turn; whether all went well."""
    fine = True
    for name in names:
        print(f"{name}: at most {PARTS[name].seconds} s", flush=True)
        command = [sys.executable, "-m", "bench.gpu", "--part", name, "--results", str(results)]
        outcome, went_well, end = supervised(command, PARTS[name].seconds)
        print(f"{name}: {outcome}" + ("" if went_well else f"\n{end}"), flush=True)
        note(results, f"part {name}", outcome=outcome)
        fine &= went_well
    return fine


def record_of_today(results: Path) -> Path:
    return path_in(results, environment(), ".jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without one")
    parser.add_argument("--part", choices=PARTS, help="run one part in this process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record is written")
    parser.add_argument("--table", type=Path, help="print the short table of a record")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"PART must be one of {', '.join(PARTS)}. Got {', '.join(sorted(unknown))}.")
    if options.table:
        try:
            print(table(read(options.table)))
        except (OSError, ValueError, LookupError) as error:
            parser.error(f"--table must be a record. Got {options.table} ({error!r:.120}).")
        return 0
    if not torch.cuda.is_available():
        parser.error(f"a GPU must be there. Got torch {torch.__version__}, for which there is none.")
    if options.part:
        return PARTS[options.part].run(options.results, False, ())
    fine = run_all(options.parts or list(PARTS), options.results)
    path = record_of_today(options.results)
    print(f"\n{table(read(path))}\n\n{place_of(environment())}\nwritten: {path}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
