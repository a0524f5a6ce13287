"""The checkpoint in a run's directory: where it is, whether it is whole, and its weights.

``checkpoint/`` holds safetensors files, of which model.safetensors has the weights under the model's own names, and
checkpoint.json: the step, a fingerprint of the data, and size and BLAKE2b of the other files, by which a torn
checkpoint is told. While a new one is put in its place, ``checkpoint.old/`` is the whole one. `train.checkpoint` says
what else is in it. Nothing in it is executable.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from looped.whole_file import read_json, regular

WEIGHTS = "model.safetensors"
RECORD = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, torn, of another model, or cannot be written."""


@dataclass(frozen=True)
class Progress:
    """step: optimisation steps done. fingerprint: the data that they were done on."""

    step: int
    fingerprint: str


def find(run: Path) -> Path | None:
    """Where the checkpoint of the run in directory ``run`` is, None if it has none."""
    return next((path for path in (run / "checkpoint", run / "checkpoint.old") if path.is_dir()), None)


def found(run: Path) -> Path:
    """As `find`. Raises CheckpointError if there is none."""
    directory = find(run)
    if directory is None:
        raise CheckpointError(f"{run} holds no checkpoint.")
    return directory


def seal(directory: Path, progress: Progress) -> None:
    """Write the record of the files in a checkpoint's directory, and wait until it is on the disk."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    record = {
        "step": progress.step,
        "data": progress.fingerprint,
        "files": {name: _size_and_hash(directory / name) for name in names},
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    sync(directory / RECORD)


def check_whole(directory: Path, names: Sequence[str]) -> Progress:
    """What the record of a checkpoint's directory says. Raises CheckpointError if it is missing or damaged, or one of
    the files ``names`` is not what was written."""
    try:
        record = read_json(directory / RECORD)
        torn = next((name for name in names if record["files"][name] != _size_and_hash(directory / name)), None)
        step = record["step"]
        if type(step) is not int or not 0 <= step < 2**63:
            raise ValueError(f"step must be a count. Got {step!r:.30}")
        progress = Progress(step, str(record["data"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} is torn: {error!r:.100}.") from error
    if torn is not None:
        raise CheckpointError(f"checkpoint {directory} is torn: {torn} is not what was written.")
    return progress


def weights_hash(run: Path) -> str | None:
    """BLAKE2b of the weights of the run in directory ``run``, by the checkpoint's record; None if it has none.

    Tells whether something was measured on these weights. A copy has the same, which cannot be said of its times.
    """
    directory = find(run)
    try:
        return None if directory is None else str(read_json(directory / RECORD)["files"][WEIGHTS][1])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_weights(directory: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a checkpoint's directory, on the model's device (the CPU if that is meta). Raises CheckpointError
    if they cannot be read or are not the model's, naming the first that differs."""
    parameter = next(model.parameters())
    device = "cpu" if parameter.is_meta else str(parameter.device)
    try:
        weights = safetensors.torch.load_file(directory / WEIGHTS, device=device)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} cannot be read ({error}).") from error
    here = {name: _shape(value) for name, value in model.state_dict().items()}
    there = {name: _shape(value) for name, value in weights.items()}
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"checkpoint of another shape: {name} is {there.get(name, 'missing')} in the checkpoint and "
                f"{here.get(name, 'missing')} in the model."
            )
    return weights


def _shape(weight: Tensor) -> str:
    """The shape, and the dtype where that is not the usual one."""
    return f"{list(weight.shape)}" + ("" if weight.dtype == torch.float32 else f" {weight.dtype}")


def _size_and_hash(path: Path) -> list[object]:
    with open(regular(path), "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
