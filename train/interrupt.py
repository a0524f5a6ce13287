"""Ctrl-C and SIGTERM: finish the step where one is being taken, stop at once elsewhere.

Python handles a signal only once the main thread is back from native code. So that a second one always ends the
program, a thread watches: it is woken by the signal itself.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0  # seconds that the main thread has after a second signal to end the program itself
ONE_PRESS = 0.1  # seconds within which signals are one: timeout(1) sends its own to the process and to its group


class Interrupted(KeyboardInterrupt):
    """A signal arrived where nothing needs finishing. ``signum`` is the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:
        return Interrupted, (self.signum,)  # one of several processes tells the others


class Interruptions:
    """What the signals do: raise Interrupted, or, within ``deferred()``, only set ``pending`` the first time."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferred = False

    @contextmanager
    def installed(self) -> Iterator["Interruptions"]:
        """Take the signals over, and give them back at the end."""
        before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        left, (receiver, sender) = threading.Event(), socket.socketpair()
        sender.setblocking(False)
        fd_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(receiver, left), daemon=True).start()
        try:
            yield self
        finally:
            left.set()
            signal.set_wakeup_fd(fd_before)
            sender.close()  # ends the watch
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note the first signal instead of raising; a second one raises after all."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._deferred and self.pending is None:
            self.pending = signum
        else:
            raise Interrupted(signum)


def _watch(receiver: socket.socket, left: threading.Event) -> None:
    """End the process with a second signal, unless ``left`` is set within GRACE seconds."""
    first = None
    with receiver:
        while number := receiver.recv(1):
            if number[0] not in SIGNALS:
                continue
            now = time.monotonic()
            first = first or now
            if now - first > ONE_PRESS and not left.wait(GRACE):
                os._exit(128 + number[0])
