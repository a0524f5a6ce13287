"""metrics.jsonl, and JSON in general: one object a line, nan and infinity as null."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot write, at any depth, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``, which at no moment holds half of it."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
    os.replace(scratch, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsLog:
    """metrics.jsonl, open for appending. Rows already there stay only where ``keep`` says so."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if keep(row)]
        scratch = path.with_name(f"{path.name}.new")
        scratch.write_text("".join(kept))
        os.replace(scratch, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, so that a reader of the file sees it at once."""
        self._file.write(json.dumps(finite(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
