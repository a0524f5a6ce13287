"""Checkpoints that survive being killed at any moment.

``checkpoint/`` holds the weights, the optimizer's state (``<parameter>.<state>``) and the random generators' states,
in the files and under the seal of `looped.checkpoint`. Each process writes its share, by
torch.distributed.checkpoint: its pieces of what is sharded, and some of what every process has.

``save`` writes ``checkpoint.new/``, syncs it, moves ``checkpoint/`` to ``checkpoint.old/``, renames the new one into
place and removes the old: at every moment one of ``checkpoint/`` and ``checkpoint.old/`` is complete. The first process
does so when all have written.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from looped.checkpoint import (
    KINDS,
    CheckpointError,
    Progress,
    check_whole,
    contents,
    find,
    found,
    read_into,
    read_weights,
)
from train import processes

if TYPE_CHECKING:
    from train.checkpoint_writer import Saving

ADAMW = ("exp_avg", "exp_avg_sq", "step")  # its state of a parameter


def save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    in_background: bool = False,
) -> "Saving":
    """Replace the checkpoint of the run in directory ``run`` by the present state, random generators included.

    Every process calls it. Raises as `Saving.wait`. in_background: only copy the state, which a thread then writes;
    what is returned has to be waited for before the next. The processes' default group is the thread's until then.
    """
    from train.checkpoint_writer import Saving, Writer

    state = {
        "model": dict(model.state_dict()),
        "optimizer": {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state[parameter].items()
        },
        "rng": _rng_tensors(model),
    }
    kinds = {name: kind for kind, tensors in state.items() for name in tensors}
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
    saving = Saving(Writer(run, kinds, progress))
    saving.begin(state["model"] | state["optimizer"] | state["rng"], in_background)
    return saving


def step_of(run: Path) -> int | None:
    """Steps done in the checkpoint of the run in directory ``run``, None if it has no whole one."""
    directory = find(run)
    try:
        return None if directory is None else check_whole(directory, KINDS).step
    except CheckpointError:
        return None


def load(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore weights, the optimizer's state and the random generators from the run in directory ``run``.

    Every process calls it. Nothing is changed unless everything fits. Raises CheckpointError, in one line, if there is
    no checkpoint, it is torn, or its parameters are not the model's, naming the first that differs.
    """
    progress = processes.from_first(lambda: check_whole(found(run), KINDS))  # reads and hashes every byte
    directory = found(run)
    weights = read_weights(directory, model)
    stored_moments, stored_generators = contents(directory, "optimizer"), contents(directory, "rng")
    _check_moments(model, stored_moments)
    _check_generators(_rng_tensors(model), stored_generators)
    moments = _empty_moments(model, stored_moments)
    generators = {name: value for name, value in _rng_tensors(model).items() if name in stored_generators}
    read_into(directory, "optimizer", moments)
    read_into(directory, "rng", generators)
    for name, value in moments.items():
        parameter, _, state = name.rpartition(".")
        optimizer.state[model.get_parameter(parameter)][state] = value
    _restore_rng(model, generators)
    model.load_state_dict(weights)
    return progress


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


def _check_generators(present: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    if "cpu" not in stored:
        raise CheckpointError("checkpoint must hold the state of the CPU's random generator. It has none.")
    for name, here in present.items():
        there = stored.get(name, here)
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise CheckpointError(
                f"checkpoint of another PyTorch: the state of random generator {name} is {list(there.shape)} "
                f"{there.dtype} in the checkpoint and {list(here.shape)} {here.dtype} here."
            )


def _empty_moments(model: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where each tensor of the optimizer's state is to be read to: with its parameter, and sharded as it is."""
    moments = {}
    for name, value in stored.items():
        parameter = model.get_parameter(name.rpartition(".")[0])
        if value.dim():
            moments[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        else:  # a step count, which a fused optimizer has there too
            moments[name] = torch.empty_like(value, device=parameter.device)
    return moments


def _rng_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The generators' states. Of several processes, one's: each sets its own anew for every step."""
    device = next(model.parameters()).device
    return {"cpu": torch.get_rng_state()} | (
        {"cuda.0": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )


def _restore_rng(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, state in tensors.items():
        if name == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, next(model.parameters()).device)
