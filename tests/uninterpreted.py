"""Programs whose Triton kernels are compiled: Triton decides when it is imported whether they are interpreted, as here.

A child without TRITON_INTERPRET imports once what the programs need.  Each program then runs in a fork of it.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]


@cache
def _server() -> subprocess.Popen:
    """The child, which ends with this process: that closes its input."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True, process_group=0
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen) -> None:
    assert server.stdin is not None
    with suppress(OSError):
        server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        _kill(server)


def _kill(server: subprocess.Popen) -> None:
    """End the child and the program that it runs."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def run(program: str, *arguments: object, packages: Path | None = None) -> str:
    """What a program prints that has the arguments in sys.argv, and a folder with packages before all others.

    Raises AssertionError with the end of its error output if it fails.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {"program": program, "arguments": list(map(str, arguments)), "folder": folder}
        request |= {"packages": [] if packages is None else [str(packages)]}
        try:
            with suppress(BrokenPipeError):
                print(json.dumps(request), file=server.stdin, flush=True)
            code = server.stdout.readline().strip()
            assert code, f"the child that runs the programs has ended: exit code {server.wait(10)}"
        except BaseException:  # the next program gets a child of its own, which owes no other answer
            _kill(server)
            _server.cache_clear()
            raise
        said = {name: Path(folder, name).read_text() for name in ("output", "errors")}
    assert code == "0", f"exit code {code}\n{said['output'][-2000:]}{said['errors'][-4000:]}"
    return said["output"]


def _carry_out(program: str, arguments: list[str], folder: str, packages: list[str]) -> NoReturn:
    code = 1
    try:
        for number, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv[1:], sys.path[:0] = arguments, packages
        exec(program, {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch._dynamo  # noqa: F401  what the first fake tensor imports

    import bench.offline.whole_program  # noqa: F401  all of looped and train

    gc.freeze()  # what is imported stays: no program looks through it for garbage
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _carry_out(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
