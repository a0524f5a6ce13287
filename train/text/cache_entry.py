"""Entries of a cache: directories that appear whole or not at all, and of which every change is seen.

``digests.json`` has a digest of every file of an entry. Reading gigabytes at every start would take minutes, so
``checked`` has the size, times and place of the files when their digests were last found to be right; only when those
differ, every byte is read again. An entry that is not whole is made anew.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from looped.run_directory import hold
from looped.whole_file import digest_of, read_json
from train.text.corpus import file_state

DIGESTS, CHECKED = "digests.json", "checked"


def is_whole(entry: Path) -> bool:
    """Whether the files of an entry are as they were written. They are read only if there is reason to."""
    try:
        digests = dict(read_json(entry / DIGESTS))
        state = file_state([entry / name for name in (DIGESTS, *digests)]).key
        if _content(entry / CHECKED) == state:
            return True
        whole = bool(digests) and all(digest_of(entry / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, TypeError):
        return False
    if whole:
        with suppress(OSError):  # a cache that may not be written is read anew each time
            (entry / CHECKED).write_text(state, encoding="utf-8")
    return whole


def make_entry(entry: Path, fill: Callable[[Path], dict[str, str]]) -> None:
    """Have ``entry`` be there and whole. If it is not, ``fill`` writes its files into a directory that it is given.

    ``fill`` returns their digests. What it has written when it is killed, or when the disk is full, is there when it is
    called for this entry again. Of several processes one fills it and the others wait. Raises ValueError if ``fill``
    does, with nothing left behind, or if the cache cannot be written.
    """
    if is_whole(entry):
        return
    staging = entry.with_name(f"unfinished-{entry.name}")
    created = not entry.parent.exists()
    try:
        with _held(staging):
            if not is_whole(entry):  # another process may have been first
                if entry.exists():
                    print(f"the cached tokens in {entry} are damaged; the text is encoded again", file=sys.stderr)
                    shutil.rmtree(entry)
                _fill(staging, fill)
                os.rename(staging, entry)
                is_whole(entry)
    except OSError as error:
        if is_whole(entry):  # another process was first, on a file system without locks
            return
        kept = f" What has been encoded is kept in {staging.name} for the next try." if staging.exists() else ""
        raise ValueError(f"cache {entry.parent} cannot be written ({error.strerror or error}).{kept}") from error
    finally:
        if created:
            with suppress(OSError):  # there is something in it
                entry.parent.rmdir()


@contextmanager
def _held(staging: Path) -> Iterator[None]:
    """Have ``staging`` be there, and this process alone write in it. Waits for another that does."""
    told = False
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        try:
            handle = hold(staging)
        except FileNotFoundError:  # the other process has just finished
            continue
        except ValueError:
            if not told:
                print("waiting for another process, which encodes the same text", file=sys.stderr)
            told = True
            time.sleep(0.1)
            continue
        if handle is None or _is_at(staging, handle):
            break
        os.close(handle)
    try:
        yield
    finally:
        if handle is None or _is_at(staging, handle):  # and not the directory of the next process, begun meanwhile
            with suppress(OSError):  # not empty: there is something to go on with
                staging.rmdir()
        if handle is not None:
            os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    """Whether the open directory still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _fill(staging: Path, fill: Callable[[Path], dict[str, str]]) -> None:
    """Have all files of an entry be there, their digests last, and no others."""
    try:
        digests = fill(staging)
    except ValueError:
        shutil.rmtree(staging, ignore_errors=True)  # while it is held: the next process may want it at once
        raise
    for path in staging.iterdir():
        if path.is_file() and path.name not in digests:
            path.unlink()
    with open(staging / DIGESTS, "w", encoding="utf-8") as file:
        json.dump(digests, file)
        file.flush()
        os.fsync(file.fileno())


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeError):
        return None
