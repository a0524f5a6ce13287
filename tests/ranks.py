"""Several processes that run one function as the ranks of a gloo group on this machine."""

import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

N_RANKS = 2


def run_ranks(function: Callable[..., None], folder: Path, *arguments: Any, n_ranks: int = N_RANKS) -> None:
    """Runs `function(rank, *arguments)` in `n_ranks` processes. If one of them fails or crashes, its stack is printed.

    They are forks of a process that has imported PyTorch and done nothing: one with threads is not safe to fork.
    """
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    given = function, f"{folder}/meeting-{n_ranks}", arguments, n_ranks, environment
    _idle_process().submit(_start, given, n_ranks).result()


@cache
def _idle_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), importlib.import_module, ("conftest",))


def _start(given: tuple[Any, ...], n_ranks: int) -> None:
    torch.multiprocessing.start_processes(_rank, given, nprocs=n_ranks, daemon=True, start_method="fork")


def _rank(
    rank: int,
    function: Callable[..., None],
    meeting: str,
    arguments: tuple[Any, ...],
    n_ranks: int,
    environment: dict[str, str],
) -> None:
    # Nothing is taken down. PyTorch does that in a race with the group's own threads, which it now and then loses:
    # the process aborts, or waits for ever.
    try:
        faulthandler.enable(2)  # pytest's own writes elsewhere in a worker
        os.environ.update(environment)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n_ranks)
        function(rank, *arguments)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
