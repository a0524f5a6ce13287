"""What is known of every run of a sweep: the evaluation that training left, and a diagnosis, which is made once.

A diagnosis is kept as ``diagnosis/diagnosis.json`` in the run's directory, where ``python -m looped.diagnose RUN``
leaves it too.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from looped.diagnose import Diagnosis, diagnose_run
from looped.diagnose.page import FORMAT, to_json
from looped.diagnose.verdict import Measurements
from looped.run_directory import load_run
from train.paper.runs import RunResult

HORIZON = 30  # loops over which the paper follows the state


@dataclass(frozen=True)
class Evidence:
    """A complete run of one condition and seed. diagnosis.name: the condition."""

    result: RunResult
    diagnosis: Diagnosis

    @property
    def measured(self) -> Measurements:
        """Of the diagnosis."""
        return self.diagnosis.measured


def kept_diagnosis(run: Path, n_tokens: int) -> Diagnosis | None:
    """The diagnosis in a run's directory, if it is of its present weights, in the present format, and on ``n_tokens``
    tokens and 30 loops, or more. Raises ValueError if the file is damaged."""
    path, weights = run / "diagnosis" / "diagnosis.json", run / "checkpoint" / "model.safetensors"
    if not path.exists() or (weights.exists() and weights.stat().st_mtime > path.stat().st_mtime):
        return None
    content = _content(path)
    if content.get("format") != FORMAT or len(content["diagnoses"]) != 1:
        return None  # measured by another version of this program, or of several runs
    (one,) = read_diagnoses(path)
    enough = one.n_tokens >= n_tokens and len(one.measured.norms.mean) >= HORIZON
    return one if enough else None


def make_diagnosis(run: Path, n_tokens: int, device: str = "cpu") -> Diagnosis:
    """Diagnose a run on about ``n_tokens`` validation tokens and keep the result. Raises as diagnose_run."""
    diagnosis = diagnose_run(load_run(run), n_tokens=n_tokens, horizon=HORIZON, device=device)
    path = run / "diagnosis" / "diagnosis.json"
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(to_json([diagnosis]), encoding="utf-8")
    scratch.replace(path)
    return diagnosis


def read_diagnoses(path: Path) -> list[Diagnosis]:
    """What ``looped.diagnose.page.to_json`` wrote, null as nan. Raises ValueError if the file cannot be read."""
    content = _content(path)
    try:
        return [_build(Diagnosis, one) for one in content["diagnoses"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r:.120}). Remove it.") from error


def _content(path: Path) -> dict[str, Any]:
    """A diagnosis.json, of any format. Raises ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["diagnoses"], list):
            raise ValueError("diagnoses must be a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r:.120}). Remove it.") from error
    return content


def _build(kind: Any, value: Any) -> Any:
    """``value``, as JSON has it, as an instance of the dataclass ``kind`` and of those inside it."""
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{field.name: _build(kinds[field.name], value[field.name]) for field in fields(kind)})  # type: ignore[operator]
    if isinstance(value, list):
        items: Sequence[Any] = [_build(None, item) for item in value]
        return tuple(items) if getattr(kind, "__origin__", None) is tuple else items
    return math.nan if value is None and NoneType not in get_args(kind) else value
