"""Checkpoints that survive being killed at any moment.

``checkpoint/`` holds model.safetensors (the weights), optimizer.safetensors (``<parameter>.<state>``) and
rng.safetensors (the generators' states), under the seal of `looped.checkpoint`.

``save`` writes ``checkpoint.new/``, syncs it, moves ``checkpoint/`` to ``checkpoint.old/``, renames the new one into
place and removes the old: at every moment one of ``checkpoint/`` and ``checkpoint.old/`` is complete.
"""

import contextlib
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from looped.checkpoint import WEIGHTS, CheckpointError, Progress, check_whole, find, found, read_weights, seal, sync

ADAMW = ("exp_avg", "exp_avg_sq", "step")  # its state of a parameter
FILES = (WEIGHTS, "optimizer.safetensors", "rng.safetensors")


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
        sync(run)
    except (OSError, SafetensorError) as error:
        if old.exists() and not current.exists():
            with contextlib.suppress(OSError):  # then `find` sees checkpoint.old/
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
        sync(path)
    seal(new, progress)
    sync(new)


def step_of(run: Path) -> int | None:
    """Steps done in the checkpoint of the run in directory ``run``, None if it has no whole one."""
    directory = find(run)
    try:
        return None if directory is None else check_whole(directory, FILES).step
    except CheckpointError:
        return None


def load(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Restore weights, and with ``optimizer`` also its state and the random generators, from the run in ``run``.

    Nothing is changed unless everything fits. Raises CheckpointError, in one line, if there is no checkpoint, it is
    torn, or its parameters are not the model's, naming the first that differs.
    """
    directory = found(run)
    progress = check_whole(directory, FILES)
    weights = read_weights(directory, model)
    if optimizer is not None:
        moments, generators = (_read(directory / name) for name in FILES[1:])
        _check_moments(model, moments)
        _check_generators(generators)
        _restore_optimizer(model, optimizer, moments)
        _restore_rng(generators)
    model.load_state_dict(weights)
    return progress


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error


def _check_moments(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, _, state = name.rpartition(".")
        if parameter not in parameters:
            raise CheckpointError(
                f"checkpoint of another model: the optimizer has {name}, and the model no {parameter}."
            )
        weight = parameters[parameter]
        expected = ([] if state == "step" else list(weight.shape), weight.dtype)
        if (list(value.shape), value.dtype) != expected:
            raise CheckpointError(
                f"checkpoint of another shape: the optimizer's {state} of {parameter} is {list(value.shape)} "
                f"{value.dtype} in the checkpoint and {expected[0]} {expected[1]} in the model."
            )
        missing = [other for other in ADAMW if f"{parameter}.{other}" not in tensors]
        if missing or state not in ADAMW:
            raise CheckpointError(
                f"checkpoint must hold {', '.join(ADAMW)} of AdamW for {parameter}. Got {state} without "
                f"{', '.join(missing) or 'a use'}."
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
