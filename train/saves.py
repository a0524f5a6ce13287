"""The saves of a run on its way: at most one is being written, and one that fails need not end the run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from train import processes
from train.checkpoint import CheckpointError
from train.config import OnSaveError

if TYPE_CHECKING:
    from train.checkpoint_writer import Saving

# Seconds for what several processes are writing when a run ends with an error: one of them may be gone. A single one
# waits as long as it takes, because a run's directory must not be free while something is written there.
PATIENCE = 30.0


class Saves:
    """``failed``: saves that could not be written."""

    def __init__(self, on_error: OnSaveError) -> None:
        self.failed = 0
        self._on_error = on_error
        self._pending: Saving | None = None

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being written, whatever becomes of it. Only a run that ends with an error leaves any."""
        if self._pending is not None:
            self._pending.settle(PATIENCE if processes.world_size() > 1 else None)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Write what will be tried again. If the run is to go on, an OSError or CheckpointError is said and counted."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            if self._on_error == "stop":
                raise
            self.failed += 1
            if processes.is_first():
                line = f"not saved: {error}. Training goes on, and tries again later. Saves that failed: {self.failed}."
                tqdm.write(" ".join(line.split()), file=sys.stderr)

    def take(self, save: "Callable[[], Saving]") -> None:
        """Save, after what is being written."""
        with self.attempt():
            self._wait()
        with self.attempt():
            self._pending = save()

    def take_last(self, save: "Callable[[], Saving]") -> None:
        """Save, and wait until it is written. Raises OSError or CheckpointError if it is not: nothing tries again."""
        with self.attempt():
            self._wait()
        save().wait()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
