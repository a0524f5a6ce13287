"""diagnosis.json: every number of one or several diagnoses. This module writes the file, and it alone reads it."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from looped.checkpoint import weights_hash
from looped.diagnose.diagnosis import Diagnosis
from looped.diagnose.dynamics import PERCENTILES
from looped.diagnose.findings import findings
from looped.diagnose.verdict import THRESHOLDS, Measurements, judge
from looped.whole_file import read_json, replacing

FORMAT = 5  # of the file: raised whenever something in it is added, removed, called or measured otherwise


class OtherFormatError(ValueError):
    """The record is sound, but another version of this project wrote it."""


def to_json(diagnoses: Sequence[Diagnosis]) -> str:
    """The text of a record. JSON has no nan and no infinity: both become null."""
    content = {
        "format": FORMAT,
        "percentiles": PERCENTILES,
        "thresholds": asdict(THRESHOLDS),
        "diagnoses": [
            asdict(diagnosis)
            | {
                "findings": [asdict(finding) for finding in findings(diagnosis.measured)],
                "alpha_ranges": diagnosis.measured.alpha.ranges,
                "clamp_change": diagnosis.measured.clamp.change,
            }
            for diagnosis in diagnoses
        ],
    }
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1, allow_nan=False) + "\n"


def write_record(diagnoses: Sequence[Diagnosis], path: Path) -> None:
    """Write the record in one step: whoever reads `path` meanwhile finds the old file or the whole new one.

    The directory of `path` is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(to_json(diagnoses), encoding="utf-8")


def read_record(path: Path) -> list[Diagnosis]:
    """The diagnoses in a record. null becomes nan, except for a tau, where it means that no token may leave early.

    The verdict in the file is not read: it follows from the measurements, which are judged again. Raises ValueError
    for a file that is missing or damaged, and OtherFormatError, which is one, for a record of another format.
    """
    try:
        content = read_json(path)
        if not isinstance(content["diagnoses"], list):
            raise ValueError("diagnoses must be a list")
        if content.get("format") != FORMAT:
            raise OtherFormatError(f"{path} must be of format {FORMAT}. Got format {content.get('format')}.")
        return [_read_diagnosis(diagnosis) for diagnosis in content["diagnoses"]]
    except OtherFormatError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r:.120}). Remove it.") from error


def record_of_run(run: Path) -> Path:
    """Where the record of the run in the directory `run` stands."""
    return run / "diagnosis" / "diagnosis.json"


def read_diagnosis_of_run(run: Path, *, n_tokens: int, horizon: int) -> Diagnosis | None:
    """The diagnosis that stands in a run's directory, or None if the run has to be diagnosed again.

    It has to be when there is no record; when it is of other weights than the run has now; when it is of another
    format or of several runs; and when it is on fewer than `n_tokens` tokens or follows the state for fewer than
    `horizon` loops. Raises ValueError if the record is damaged.
    """
    path = record_of_run(run)
    if not path.exists():
        return None
    try:
        diagnoses = read_record(path)
    except OtherFormatError:
        return None
    if len(diagnoses) != 1 or diagnoses[0].origin.get("weights") != weights_hash(run):
        return None
    if diagnoses[0].n_tokens < n_tokens or len(diagnoses[0].measured.norms.mean) < horizon:
        return None
    return diagnoses[0]


def _read_diagnosis(content: dict[str, Any]) -> Diagnosis:
    measured: Measurements = _from_json(Measurements, content["measured"])
    return Diagnosis(content["name"], content["n_tokens"], measured, judge(measured), content["origin"])


def _from_json(kind: Any, value: Any) -> Any:
    """A value as JSON has it, as an instance of the type `kind`, a dataclass or what a field of one is declared as."""
    if get_origin(kind) is dict:
        return {name: _from_json(get_args(kind)[1], item) for name, item in value.items()}
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{field.name: _from_json(kinds[field.name], value[field.name]) for field in fields(kind)})  # type: ignore[operator]
    if isinstance(value, list):
        items = [_from_json(None, item) for item in value]
        return tuple(items) if get_origin(kind) is tuple else items
    return math.nan if value is None and NoneType not in get_args(kind) else value
