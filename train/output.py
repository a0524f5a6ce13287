"""Standard output and error of a program that goes on when nobody can read them any more: `| head`, a full disk."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class LastingStream:
    """A text stream. After the first error of a write it takes everything, and writes nothing."""

    def __init__(self, stream: TextIO, on_error: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._on_error = on_error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is still in the stream's buffer goes there too, when Python flushes it at its end.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._on_error(error)


class NoTerminal(LastingStream):
    """A stream that no progress bar is drawn on."""

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def lasting_output(*, errors_alone: bool = False) -> Iterator[None]:
    """Have sys.stdout and sys.stderr outlast errors. One line on stderr says that stdout is gone.

    errors_alone: write nothing on stdout, and no progress bars: another process does.
    """
    before = sys.stdout, sys.stderr

    def say(error: OSError) -> None:
        print(f"standard output cannot be written ({error.strerror}). The run goes on.", file=sys.stderr, flush=True)

    # A stream is None where the program was started with its descriptor closed, which the null device takes here.
    kind, stdout = (NoTerminal, None) if errors_alone else (LastingStream, sys.stdout)
    sys.stderr = kind(sys.stderr or open(os.devnull, "w"), lambda error: None)  # noqa: SIM115
    sys.stdout = LastingStream(stdout or open(os.devnull, "w"), say)  # noqa: SIM115
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
