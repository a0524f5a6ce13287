"""Processes that are forks of this one, which has loaded PyTorch already: in them a run begins at once."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

import torch


def forked(call: Callable[[], int], stdout: int | None, stderr: int | None) -> int:
    """Start a process that ends with the exit code of ``call`` and writes to these descriptors. Gives its id.

    None: the descriptor is closed.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            sys.stdout, sys.stderr = _stream(1, stdout), _stream(2, stderr)
            torch.set_num_threads(1)  # the other threads have stayed behind
            code = call()
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


def run_forked(call: Callable[[], int]) -> tuple[int, str]:
    """The exit code and the standard error of ``call`` in a process of its own."""
    reader, writer = os.pipe()
    with open(os.devnull, "wb") as null, open(reader) as stderr:
        child = forked(call, null.fileno(), writer)
        os.close(writer)
        said = stderr.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
