"""How a call is timed: in turn with a reference, on the device's own clock, with a cold cache on a GPU."""

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.shapes import DEVICE

Call = Callable[[], object]
Prepare = Callable[[], Call]  # called before every round, untimed; what it returns is timed


SHORT_ROUND = 1.0  # seconds: up to here there are at least ROUNDS of them, and together they last at least as long
ROUNDS, MOST_ROUNDS, FEWEST_ROUNDS = 7, 100, 2


class Paired(NamedTuple):
    """seconds: median of a round. ratio: median over rounds of its time over that of the reference just before, with
    its quartiles. rounds: how many there were."""

    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    rounds: int


def rounds_of(seconds: float) -> int:
    """How many rounds there is time for, if one takes so many seconds."""
    if seconds <= SHORT_ROUND:
        return min(MOST_ROUNDS, max(ROUNDS, math.ceil(SHORT_ROUND / max(seconds, 1e-9))))
    return max(FEWEST_ROUNDS, int(ROUNDS * SHORT_ROUND / seconds))


class Instant:
    """A point in the GPU's time: a CUDA event. The difference of two waits for the later and gives seconds.

    Unlike the host's clock it leaves out what the host does before the first kernel starts.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


clock: Callable[[], Any] = Instant if DEVICE.type == "cuda" else time.perf_counter


@cache
def _flush_buffer() -> torch.Tensor:
    """Twice the GPU's L2 cache."""
    n_bytes = 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return torch.empty(n_bytes, dtype=torch.uint8, device=DEVICE)


def flush_cache() -> None:
    """Empty the GPU's L2 cache by writing over it; on a CPU, whose caches a call finds as a loop would, nothing."""
    if DEVICE.type == "cuda":
        _flush_buffer().zero_()


def seconds_of(call: Call) -> float:
    """Time of one call."""
    flush_cache()
    start = clock()
    call()
    return clock() - start


def time_in_turn(benchmark: Any, prepare: Prepare, reference: Prepare, rounds: int) -> Paired | None:
    """Time a call with pytest-benchmark, and the reference before each of its rounds.

    The median of the paired quotients stays put on a machine that is busy for a while; absolute times do not.
    Both must have been called before, so that compilation and first allocations are not timed.  None where
    pytest-benchmark was told not to time.
    """
    references: list[float] = []

    def before_round() -> tuple[tuple[Call], dict[str, Any]]:
        references.append(seconds_of(reference()))
        call = prepare()
        flush_cache()
        return (call,), {}

    benchmark.pedantic(lambda call: call(), setup=before_round, rounds=rounds)
    if benchmark.stats is None:
        return None
    times = benchmark.stats.stats.data
    ratios = [t / r for t, r in zip(times, references[:rounds], strict=True)]
    low, middle, high = (float(quartile) for quartile in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return Paired(float(np.median(times)), middle, (low, high), rounds)
