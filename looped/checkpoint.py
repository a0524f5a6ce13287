"""The checkpoint in a run's directory: where it is, whether it is whole, and what is in it.

``checkpoint/`` holds safetensors files of three kinds: model (the weights, under the model's own names), optimizer and
rng. What one process wrote is model.safetensors, optimizer.safetensors and rng.safetensors. Of several, each wrote its
part, model-00002-of-00004.safetensors; a tensor may then be in pieces, and the metadata of a file says where each piece
begins, as torch.distributed.checkpoint has it. A tensor that is not in pieces is the same in both.

checkpoint.json has the step, a fingerprint of the data, and size and BLAKE2b of the other files, by which a torn
checkpoint is told, and a BLAKE2b of all that. While a new one is put in its place, ``checkpoint.old/`` is the whole
one. `train.checkpoint` says how it is written. Nothing in it is executable.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looped.whole_file import digest_of, read_json

KINDS = ("model", "optimizer", "rng")
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


def file_name(kind: str, part: int = 1, parts: int = 1) -> str:
    """Of a kind's only file, or of one of its parts, from 1."""
    return f"{kind}.safetensors" if parts == 1 else f"{kind}-{part:05d}-of-{parts:05d}.safetensors"


def seal(directory: Path, progress: Progress) -> None:
    """Write the record of the files in a checkpoint's directory, and wait until it is on the disk."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    record: dict[str, Any] = {
        "step": progress.step,
        "data": progress.fingerprint,
        "files": {name: _size_and_hash(directory / name) for name in names},
    }
    record["digest"] = _digest(record)
    (directory / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    sync(directory / RECORD)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_record(directory: Path) -> dict[str, Any]:
    """The record of a checkpoint's directory. Raises CheckpointError if it is missing or damaged."""
    try:
        record = read_json(directory / RECORD)
        digest = record.pop("digest", None)  # of older checkpoints there is none
        if digest not in (None, _digest(record)):
            raise ValueError(f"{RECORD} is not what was written")
        step = record["step"]
        if type(step) is not int or not 0 <= step < 2**63:
            raise ValueError(f"step must be a count. Got {step!r:.30}")
        return {"step": step, "data": str(record["data"]), "files": dict(record["files"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {directory} is torn: {error!r:.100}.") from error


def files_of(directory: Path, kind: str) -> dict[str, Any]:
    """Size and hash of the files of a kind, by name, as the record of a checkpoint's directory has them.

    Raises CheckpointError if the record is missing or damaged, or has none.
    """
    files = _read_record(directory)["files"]
    found = {name: files[name] for name in sorted(files) if re.fullmatch(rf"{kind}(-\d+-of-\d+)?\.safetensors", name)}
    if not found:
        raise CheckpointError(f"checkpoint {directory} is torn: {RECORD} names no {file_name(kind)}.")
    return found


def check_whole(directory: Path, kinds: Sequence[str]) -> Progress:
    """What the record of a checkpoint's directory says. Raises CheckpointError if it is missing or damaged, or one of
    the files of these kinds is not what was written."""
    record = _read_record(directory)
    for name, entry in (item for kind in kinds for item in files_of(directory, kind).items()):
        try:
            whole = entry == _size_and_hash(directory / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {directory} is torn: {error!r:.100}.") from error
        if not whole:
            raise CheckpointError(f"checkpoint {directory} is torn: {name} is not what was written.")
    return Progress(record["step"], record["data"])


def weights_hash(run: Path) -> str | None:
    """BLAKE2b of the weights of the run in directory ``run``, by the checkpoint's record; None if it has none. Of
    weights in parts it is that of the parts' hashes.

    Tells whether something was measured on these weights. A copy has the same, which cannot be said of its times.
    """
    directory = find(run)
    try:
        hashes = [] if directory is None else [str(entry[1]) for entry in files_of(directory, "model").values()]
    except (CheckpointError, LookupError, TypeError):
        return None
    if len(hashes) < 2:
        return next(iter(hashes), None)
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def contents(directory: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a kind in a checkpoint's directory, in full and on the device "meta": shapes and dtypes.

    Raises CheckpointError if they cannot be read or the pieces of one do not make it up.
    """
    found = {}
    try:
        for name, stored in _reader(directory, kind).read_metadata().state_dict_metadata.items():
            if not _make_up(stored.chunks, stored.size):
                raise CheckpointError(f"the pieces of {name} in {directory} do not make up {list(stored.size)}.")
            found[name] = torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
    except CheckpointError:
        raise
    except Exception as error:  # whatever the libraries raise at a header that lies
        raise CheckpointError(f"the {kind} in {directory} cannot be read ({error!r:.160}).") from error
    return found


def _make_up(pieces: Sequence[Any], size: torch.Size) -> bool:
    """Whether pieces, each with its offsets and sizes, are at places of their own and as many elements as a tensor."""
    places = {tuple(piece.offsets) for piece in pieces}
    within = all(len(place) == len(size) and min(place, default=0) >= 0 for place in places)
    return within and len(places) == len(pieces) and sum(piece.sizes.numel() for piece in pieces) == size.numel()


def read_into(directory: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, or each process's share of a DTensor, with what a checkpoint's directory has under their names.

    Raises CheckpointError if it cannot be read.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    # Every process reads for itself, and needs no other.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
    try:
        checkpoint.load(dict(tensors), storage_reader=_reader(directory, kind), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):  # such as KeyboardInterrupt
            raise cause from error
        raise CheckpointError(f"the {kind} in {directory} cannot be read ({cause!r:.160}).") from error


def _reader(directory: Path, kind: str) -> Any:
    """PyTorch's reader of safetensors in pieces, of the files of one kind."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Listing(FileSystem):
        def ls(self, path: str | os.PathLike) -> list[str]:
            return [str(directory / name) for name in files_of(directory, kind)]

    reader = HuggingFaceStorageReader(str(directory))
    reader.fs = Listing()
    return reader


def read_weights(directory: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a checkpoint's directory, on the model's device (the CPU if that is meta) and sharded as the
    model's. Raises CheckpointError if they cannot be read or are not the model's, naming the first that differs."""
    stored, wanted = contents(directory, "model"), model.state_dict()
    here = {name: _shape(value) for name, value in wanted.items()}
    there = {name: _shape(value) for name, value in stored.items()}
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"checkpoint of another shape: {name} is {there.get(name, 'missing')} in the checkpoint and "
                f"{here.get(name, 'missing')} in the model."
            )
    weights = {
        name: torch.empty(value.shape, dtype=value.dtype) if value.is_meta else torch.empty_like(value)
        for name, value in wanted.items()
    }
    read_into(directory, "model", weights)
    return weights


def _shape(weight: Tensor) -> str:
    """The shape, and the dtype where that is not the usual one."""
    return f"{list(weight.shape)}" + ("" if weight.dtype == torch.float32 else f" {weight.dtype}")


def _size_and_hash(path: Path) -> list[object]:
    return [path.stat().st_size, digest_of(path)]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
