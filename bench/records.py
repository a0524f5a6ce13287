"""How a benchmark is timed and what its record carries."""

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import triton

from bench.shapes import DEVICE


class Paired(NamedTuple):
    """seconds: median of a round. ratio: median over rounds of its time over that of the reference just before."""

    seconds: float
    ratio: float


def synchronised(function: Callable[[], object]) -> Callable[[], None]:
    """The call, returning only when the device has done it."""

    def call() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return call


def time_in_turn(benchmark, function: Callable[[], object], reference: Callable[[], object], rounds: int) -> Paired:
    """Time `function` with pytest-benchmark, and `reference` before each of its rounds.

    The median of the paired quotients stays put on a machine that is busy for a while; absolute times do not.
    Both are called once before, so that compilation and allocation are not timed.
    """
    function, reference = synchronised(function), synchronised(reference)
    function()
    reference()
    references: list[float] = []

    def time_reference() -> None:
        start = time.perf_counter()
        reference()
        references.append(time.perf_counter() - start)

    benchmark.pedantic(function, setup=time_reference, rounds=rounds, warmup_rounds=0)
    times = benchmark.stats.stats.data
    return Paired(median(times), median(t / r for t, r in zip(times, references, strict=True)))


def environment() -> dict[str, str | int]:
    """Device, threads, versions and commit of this run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
