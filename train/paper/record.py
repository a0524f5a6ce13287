"""Records as JSON, of which people read the differences: an item of a list stands on a line of its own."""

import json
import os
from pathlib import Path
from typing import Any

from train.metrics import finite


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path``, which at no moment holds half of it; nan and infinity as null."""
    parts = []
    for key, value in finite(record).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n".join(json.dumps(item, allow_nan=False) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{items}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(scratch, path)
