"""Runs in forks of this process, which has loaded PyTorch already: they begin at once."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from looped.checkpoint import contents, found, read_into
from train.interrupt import SIGNALS
from train.metrics import read_metrics
from train.run import main

PATIENCE = 120.0  # seconds for a run that nobody kills


def forked(call: Callable[[], int | None], stdout: int | None, stderr: int | None) -> int:
    """Start a process that ends with the exit code of ``call`` and writes to these descriptors. Gives its id.

    None: the descriptor is closed.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.set_wakeup_fd(-1)
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_DFL)  # as a program begins, whatever this process does with them
            sys.stdout, sys.stderr = _stream(1, stdout), _stream(2, stderr)
            torch.set_num_threads(1)  # the other threads have stayed behind
            code = call() or 0
            if sys.stdout is not None:
                sys.stdout.flush()
        except BaseException:
            code = 70
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _stream(number: int, target: int | None) -> TextIO | None:
    """What Python has as sys.stdout or sys.stderr when the descriptor ``number`` is ``target``."""
    if target is None:
        os.close(number)
        return None
    os.dup2(target, number)
    return open(number, "w", buffering=1 if number == 2 else -1, closefd=False)


def ended(children: list[int], said: Callable[[], str]) -> list[int]:
    """The exit codes of processes, once all have ended.

    Raises AssertionError if that takes too long. Whatever is raised has a note of what they have ``said``, and none
    of them goes on.
    """
    limit, codes = time.monotonic() + PATIENCE, list[int]()
    try:
        for child in children:
            while not (found := os.waitpid(child, os.WNOHANG))[0]:
                assert time.monotonic() < limit, f"no end after {PATIENCE} s"
                time.sleep(0.005)
            codes.append(os.waitstatus_to_exitcode(found[1]))
    except BaseException as error:
        kill(children[len(codes) :])
        error.add_note(said())
        raise
    return codes


def run_forked(call: Callable[[], int]) -> tuple[int, str]:
    """The exit code of ``call`` in a process of its own and its standard error, of no more than a pipe holds."""
    reader, writer = os.pipe()
    with open(os.devnull, "wb") as null, open(reader) as stderr:
        child = forked(call, null.fileno(), writer)
        os.close(writer)
        (code,) = ended([child], stderr.read)
        return code, stderr.read()


def fork(work: Callable[[], int | None], log: Path) -> int:
    """The process id of a fork that does the work, writes to the log and has the code that the work returns."""
    with open(log, "ab") as output:
        return forked(work, output.fileno(), output.fileno())


def free_port() -> str:
    """One that no process of the machine has, by the system's choice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(argv: list[str], processes: int, log: Path, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """The command line's run in forks of this process, as torchrun starts them; their process ids."""
    port = free_port()

    def run(rank: int) -> int:
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        before(rank)
        return main(argv)

    return [fork(lambda rank=rank: run(rank), log) for rank in range(processes)]


def finish(children: list[int], log: Path) -> None:
    """Wait until a run ends. Raises AssertionError if it does not, or not well."""
    codes = ended(children, log.read_text)
    assert not any(codes), f"exit codes {codes}:\n{log.read_text()}"


def kill(children: list[int]) -> None:
    """Kill processes. With one that leads a group, all of the group."""
    for child in children:
        if os.getpgid(child) == child:
            os.killpg(child, signal.SIGKILL)
        else:
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
