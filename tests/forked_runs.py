"""Runs of one or several processes that are forks of this one, which has PyTorch loaded and has not used it."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from looped.checkpoint import contents, found, read_into
from train.metrics import read_metrics
from train.run import main

PATIENCE = 120.0  # seconds for a run that nobody kills


def start(argv: list[str], processes: int, log: Path, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """The command line's run in forks of this process, as torchrun starts them; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            code = 70
            try:
                before(rank)
                code = main(argv)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def finish(children: list[int], log: Path) -> None:
    """Wait until a run ends. Raises AssertionError if it does not, or not well."""
    limit, waiting, codes = time.monotonic() + PATIENCE, set(children), []
    while waiting:
        for child in list(waiting):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                waiting.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if time.monotonic() > limit:
            kill(list(waiting))
            raise AssertionError(f"no end after {PATIENCE} s:\n{log.read_text()}")
        time.sleep(0.005)
    assert not any(codes), f"exit codes {codes}:\n{log.read_text()}"


def kill(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def rows_of(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what a clock measured."""
    return [{key: row[key] for key in row if key != "tokens_per_second"} for row in read_metrics(run / "metrics.jsonl")]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    directory = found(run)
    weights = {name: torch.empty_like(value, device="cpu") for name, value in contents(directory, "model").items()}
    read_into(directory, "model", weights)
    return weights
