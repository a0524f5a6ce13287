"""The peak of temporary memory in one untimed call: beyond what was there before and what the call leaves behind."""

import gc
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.shapes import DEVICE


def peak_beyond_results(changes: Iterable[int]) -> int:
    """Bytes at the highest point of a sequence of allocations (> 0) and frees (< 0), less those never freed.

    Inputs, weights and optimiser state were allocated before and do not occur; outputs and gradients are what is
    never freed. What an earlier profile saw allocated may be freed in this one: it cannot make less than nothing live.
    """
    live = list(accumulate(changes, lambda total, change: max(0, total + change), initial=0))
    return max(live) - live[-1]


def allocations(call: Callable[[], Any]) -> tuple[list[int], Any]:
    """Every change of the bytes of PyTorch's CPU allocator in a call, inside custom and compiled ops too, as its
    profiler reports them, and what the call returned. What a library allocates by itself is not seen."""
    gc.collect()  # what an earlier call left in reference cycles is not to be freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"], result


def peak_memory(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes, exact and the same in every run, of one call, by `allocations` or by CUDA's caching allocator; and what
    it returned."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), result
    changes, result = allocations(call)
    return peak_beyond_results(changes), result
