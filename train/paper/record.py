"""Records as JSON, of which people read the differences: an item of a list stands on a line of its own."""

import json
from pathlib import Path
from typing import Any

from looped.whole_file import replacing
from train.metrics import finite


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path``, which at no moment holds half of it; nan and infinity as null."""
    parts = []
    for key, value in finite(record).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    with replacing(path) as scratch:
        scratch.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
