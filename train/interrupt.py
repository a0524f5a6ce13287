"""Ctrl-C and SIGTERM: finish the step where one is being taken, stop at once elsewhere."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal arrived where nothing needs finishing. ``signum`` is the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruptions:
    """What the signals do: raise Interrupted, or, within ``deferred()``, only set ``pending`` the first time."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False

    @contextmanager
    def installed(self) -> Iterator["Interruptions"]:
        """Take the signals over, and give them back at the end."""
        before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator["Interruptions"]:
        """Note the first signal instead of raising; a second one raises after all."""
        self._deferred = True
        try:
            yield self
        finally:
            self._deferred = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._deferred and self.pending is None:
            self.pending = signum
        else:
            raise Interrupted(signum)
