"""Checkpoints that survive being killed at any moment.

``checkpoint/`` holds model.safetensors (the weights, under the model's own names), optimizer.safetensors
(``<parameter>.<state>``), rng.safetensors (the generators' states) and checkpoint.json (step, fingerprint of the data,
and size and BLAKE2b of the other files, by which a torn checkpoint is told). Nothing in it is executable.

``save`` writes ``checkpoint.new/``, syncs it, moves ``checkpoint/`` to ``checkpoint.old/``, renames the new one into
place and removes the old: at every moment one of ``checkpoint/`` and ``checkpoint.old/`` is complete.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


class CheckpointError(ValueError):
    """A checkpoint is missing, torn, or of another model."""


@dataclass(frozen=True)
class Progress:
    """step: optimisation steps done. fingerprint: the data that they were done on."""

    step: int
    fingerprint: str


def save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Replace the checkpoint of the run in directory ``run`` by the present state, random generators included.

    Raises OSError if it cannot be written, and CheckpointError if safetensors says so; the one before is in its place
    then, and nothing else is left.
    """
    new, current, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        _write(new, model, optimizer, progress)
        if current.exists():
            # checkpoint.old/ is removed only while checkpoint/ is in place.
            shutil.rmtree(old, ignore_errors=True)
            os.rename(current, old)
        os.rename(new, current)
        _sync(run)
    except (OSError, SafetensorError) as error:
        if old.exists() and not current.exists():
            os.rename(old, current)
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise CheckpointError(f"{new} could not be written ({error})") from error
    shutil.rmtree(old, ignore_errors=True)


def _write(new: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    contents = (dict(model.state_dict()), _optimizer_tensors(model, optimizer), _rng_tensors())
    for name, tensors in zip(FILES, contents, strict=True):
        path = new / name
        path.touch()
        mode = path.stat().st_mode  # what the umask makes of a new file; safetensors would have it be 0600
        safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        path.chmod(mode)
        _sync(path)
    record = {"step": progress.step, "data": progress.fingerprint, "files": {name: _seal(new / name) for name in FILES}}
    (new / "checkpoint.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    _sync(new / "checkpoint.json")
    _sync(new)


def find(run: Path) -> Path | None:
    """Where the checkpoint of the run in directory ``run`` is, None if it has none."""
    return next((path for path in (run / "checkpoint", run / "checkpoint.old") if path.is_dir()), None)


def step_of(run: Path) -> int | None:
    """Steps done in the checkpoint of the run in directory ``run``, None if it has no whole one."""
    directory = find(run)
    try:
        return None if directory is None else _check_whole(directory).step
    except CheckpointError:
        return None


def load(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Restore weights, and with ``optimizer`` also its state and the random generators, from the run in ``run``.

    Nothing is changed unless everything fits. Raises CheckpointError, in one line, if there is no checkpoint, it is
    torn, or its parameters are not the model's, naming the first that differs.
    """
    directory = find(run)
    if directory is None:
        raise CheckpointError(f"{run} holds no checkpoint.")
    progress = _check_whole(directory)
    device = next(model.parameters()).device
    weights = safetensors.torch.load_file(directory / "model.safetensors", device=str(device))
    _check_shapes(model, weights)
    if optimizer is not None:
        moments = safetensors.torch.load_file(directory / "optimizer.safetensors")
        generators = safetensors.torch.load_file(directory / "rng.safetensors")
        _check_moments(model, moments)
        _check_generators(generators)
        _restore_optimizer(model, optimizer, moments)
        _restore_rng(generators)
    model.load_state_dict(weights)
    return progress


def _check_whole(directory: Path) -> Progress:
    try:
        record = json.loads((directory / "checkpoint.json").read_text())
        torn = next((name for name in FILES if record["files"][name] != _seal(directory / name)), None)
        progress = Progress(int(record["step"]), str(record["data"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} is torn: {error!r:.100}.") from error
    if torn is not None:
        raise CheckpointError(f"checkpoint {directory} is torn: {torn} is not what was written.")
    return progress


def _check_shapes(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    here = {name: list(value.shape) for name, value in model.state_dict().items()}
    there = {name: list(value.shape) for name, value in weights.items()}
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"checkpoint of another shape: {name} is {there.get(name, 'missing')} in the checkpoint and "
                f"{here.get(name, 'missing')} in the model."
            )


def _check_moments(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    shapes = {name: list(value.shape) for name, value in model.named_parameters()}
    for name, value in tensors.items():
        parameter, _, state = name.rpartition(".")
        if parameter not in shapes:
            raise CheckpointError(
                f"checkpoint of another model: the optimizer has {name}, and the model no {parameter}."
            )
        if value.dim() > 0 and list(value.shape) != shapes[parameter]:
            raise CheckpointError(
                f"checkpoint of another shape: the optimizer's {state} of {parameter} is {list(value.shape)} in the "
                f"checkpoint and {shapes[parameter]} in the model."
            )


def _check_generators(tensors: dict[str, torch.Tensor]) -> None:
    here = _rng_tensors()
    if "cpu" not in tensors:
        raise CheckpointError("checkpoint must hold the state of the CPU's random generator. It has none.")
    for name in sorted(here.keys() & tensors.keys()):
        there = tensors[name]
        if (there.shape, there.dtype) != (here[name].shape, here[name].dtype):
            raise CheckpointError(
                f"checkpoint of another PyTorch: the state of random generator {name} is {list(there.shape)} "
                f"{there.dtype} in the checkpoint and {list(here[name].shape)} {here[name].dtype} here."
            )


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter = parameters[name.rpartition(".")[0]]
        # A step count keeps its device (the CPU, unless the optimiser is fused on a GPU); moments follow the weights.
        fused = optimizer.param_groups[0].get("fused")
        device = parameter.device if value.dim() or fused else torch.device("cpu")
        optimizer.state[parameter][name.rpartition(".")[2]] = value.to(device)


def _rng_tensors() -> dict[str, torch.Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state()} | {f"cuda.{index}": state for index, state in enumerate(cuda)}


def _restore_rng(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _seal(path: Path) -> list[object]:
    """Size and BLAKE2b of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()]


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
