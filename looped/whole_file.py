"""Files that are there whole or not at all, and files that end."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def regular(path: Path) -> Path:
    """The path, of a file to read. Raises OSError for a directory, a device or a pipe: those may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def digest_of(path: Path) -> str:
    """The hash of a file's bytes. Raises OSError as `regular` does."""
    with open(regular(path), "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_json(path: Path) -> Any:
    """What a file of JSON holds. Raises OSError, or ValueError for what is no JSON or nested without end."""
    try:
        return json.loads(regular(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
