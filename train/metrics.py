"""metrics.jsonl, and JSON in general: one object a line, nan and infinity as null."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from looped.whole_file import regular, replacing

SCALARS = ("step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second")  # of every row
PER_LOOP = ("ce", "state_norm", "radial_fraction")  # lists [K]
# bad_steps (not taken so far) and mfu (a share) came later: rows of older runs are without them. Rows of gated
# supervision also have exit_loop (1 to K) and exit_entropy (nats), means over the tokens.


def finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot write, at any depth, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``, which at no moment holds half of it."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """As `write_json`, for people who read the differences: an item of a list stands on a line of its own."""
    parts = []
    for key, value in finite(record).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    with replacing(path) as scratch:
        scratch.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Lines that are none, such as a last one that a kill cut short, are left out."""
    return [row for _, row in _lines(path) if row is not None]


def foreign_lines(path: Path) -> list[int]:
    """Numbers, from 1, of the lines that are no rows. A last line without an end was cut short, and is not counted."""
    found = [number for number, row in _lines(path) if row is None]
    whole = path.read_bytes().count(b"\n") if path.exists() else 0
    return [number for number in found if number <= whole]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and row of every line that is not blank; None for one that is no row."""
    for number, line in enumerate(regular(path).read_bytes().split(b"\n") if path.exists() else [], start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, not UTF-8, nested without end
                row = None
            yield number, row if _is_row(row) else None


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(name in row for name in (*SCALARS, *PER_LOOP)):
        return False
    lists = [row[name] for name in PER_LOOP]
    return (
        _is_count(row["tokens"])
        and _is_count(row["step"])
        and row["step"] >= 1
        and _is_count(row.get("bad_steps", 0))
        and all(_is_number(row[name]) for name in SCALARS)
        and all(isinstance(values, list) and all(map(_is_number, values)) for values in lists)
        and len({len(values) for values in lists}) == 1
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


class MetricsLog:
    """metrics.jsonl, to be appended to. Rows already there stay only where ``keep`` says so."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
        self.kept = [row for row in read_metrics(path) if keep(row)]
        self._path = path
        self._unwritten = b""
        with replacing(path) as scratch:
            scratch.write_bytes(b"".join(map(_line, self.kept)))

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, so that a reader of the file sees it at once. Raises as `flush`."""
        self._unwritten += _line(row)
        self.flush()

    def flush(self) -> None:
        """Write the rows that are not in the file. Raises OSError if the disk is full or the file gone; nothing of them
        is in it then, and they are kept for the next time."""
        if not self._unwritten:
            return
        with open(self._path, "r+b", buffering=0) as file:  # which makes no new file, without the rows before
            size, written = file.seek(0, os.SEEK_END), 0
            try:
                while written < len(self._unwritten):
                    written += file.write(self._unwritten[written:])
            except OSError as error:
                file.truncate(size)
                raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._unwritten = b""


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(finite(row), allow_nan=False).encode() + b"\n"
