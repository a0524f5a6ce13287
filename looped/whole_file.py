"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to. It takes ``path``'s place at the end, and after an error it is removed."""
    scratch = path.with_name(f"{path.name}.new")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write: say which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
