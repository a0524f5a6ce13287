"""Checkpoints that survive being killed at any moment.

``checkpoint/`` holds the weights, the optimizer's state (``<parameter>.<state>``) and the random generators' states,
in the files and under the seal of `looped.checkpoint`. Each process writes its share, by
torch.distributed.checkpoint: its pieces of what is sharded, and some of what every process has.

``save`` writes ``checkpoint.new/``, syncs it, moves ``checkpoint/`` to ``checkpoint.old/``, renames the new one into
place and removes the old: at every moment one of ``checkpoint/`` and ``checkpoint.old/`` is complete. The first process
does so when all have written.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from looped.checkpoint import (
    KINDS,
    CheckpointError,
    Progress,
    check_whole,
    contents,
    file_name,
    find,
    found,
    read_into,
    read_weights,
    seal,
    sync,
)
from train import processes

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
    saving = Saving(_Writer(run, kinds, progress))
    saving.begin(state["model"] | state["optimizer"] | state["rng"], in_background)
    return saving


class Saving:
    """A checkpoint that is being written."""

    def __init__(self, writer: "_Writer") -> None:
        self._writer = writer
        self._written: concurrent.futures.Future[Metadata] | None = None

    def begin(self, tensors: dict[str, Any], in_background: bool) -> None:
        with self._errors_of_one_process():
            if in_background:
                written = distributed_checkpoint.async_save(tensors, storage_writer=self._writer)
                assert isinstance(written, concurrent.futures.Future)
                self._written = written
            else:
                distributed_checkpoint.save(tensors, storage_writer=self._writer)

    def wait(self) -> None:
        """Wait until it is in its place.

        Raises, in every process, OSError or CheckpointError, which names the file, if it cannot be written. The one
        before stays then; or the new one is in its place, if only the last wait for the disk failed.
        """
        if self._written is not None:
            with self._errors_of_one_process():
                self._written.result()

    def settle(self, seconds: float | None) -> None:
        """Wait until it is written or has failed, at most ``seconds``; None: as long as it takes. Raises nothing."""
        if self._written is not None:
            concurrent.futures.wait([self._written], seconds)

    @contextlib.contextmanager
    def _errors_of_one_process(self) -> Iterator[None]:
        """Raise what the first process that failed raised, in all of them."""
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, Exception) and processes.is_first():
                self._writer.give_up()
            if isinstance(cause, SafetensorError) or (isinstance(cause, OSError) and cause.filename is None):
                cause = CheckpointError(f"{self._writer.new} could not be written ({cause})")
            raise processes.agreed(cause) from error


class _Writer(StorageWriter):
    """Writes safetensors files as PyTorch's HuggingFaceStorageWriter does: one of a kind for each process."""

    def __init__(self, run: Path, kinds: dict[str, str], progress: Progress) -> None:
        self.run, self.new, self.current, self.old = (
            run / name for name in ("", "checkpoint.new", "checkpoint", "checkpoint.old")
        )
        self.kinds = kinds
        self.progress = progress

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """In the first process, before any writes."""
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir()
        return [dataclasses.replace(plan, storage_data=(part, len(plans))) for part, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """In every process: what the plan gives it to write."""
        written: Future[list[WriteResult]] = Future()
        results = []
        for kind in KINDS:
            tensors, begins = {}, {}
            for item in plan.items:
                name = item.index.fqn
                if self.kinds[name] == kind:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)
                    assert item.tensor_data is not None
                    tensors[name] = tensor.detach().cpu().contiguous()
                    begins[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
                    results.append(WriteResult(item.index, tensors[name].nbytes, None))
            if tensors:
                self._write_file(self.new / file_name(kind, *plan.storage_data), tensors, begins)
        written.set_result(results)
        return written

    def _write_file(self, path: Path, tensors: dict[str, Tensor], begins: dict[str, dict[str, list[int]]]) -> None:
        path.touch()
        mode = path.stat().st_mode  # what the umask makes of a new file; safetensors would have it be 0600
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(begins)}
        safetensors.torch.save_file(tensors, path, metadata)
        path.chmod(mode)
        sync(path)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """In the first process, when all have written."""
        seal(self.new, self.progress)
        sync(self.new)
        if self.current.exists():
            # checkpoint.old/ is removed only while checkpoint/ is in place.
            shutil.rmtree(self.old, ignore_errors=True)
            os.rename(self.current, self.old)
        os.rename(self.new, self.current)
        sync(self.run)
        shutil.rmtree(self.old, ignore_errors=True)

    def give_up(self) -> None:
        """Leave the checkpoint before, in its place, and nothing else."""
        if self.old.exists() and not self.current.exists():
            with contextlib.suppress(OSError):  # then `find` sees checkpoint.old/
                os.rename(self.old, self.current)
        shutil.rmtree(self.new, ignore_errors=True)


def step_of(run: Path) -> int | None:
    """Steps done in the checkpoint of the run in directory ``run``, None if it has no whole one."""
    directory = find(run)
    try:
        return None if directory is None else check_whole(directory, KINDS).step
    except CheckpointError:
        return None


def load(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Restore weights, and with ``optimizer`` also its state and the random generators, from the run in ``run``.

    Nothing is changed unless everything fits. Raises CheckpointError, in one line, if there is no checkpoint, it is
    torn, or its parameters are not the model's, naming the first that differs.
    """
    directory = found(run)
    progress = processes.from_first(lambda: check_whole(directory, KINDS))  # reads and hashes every byte
    weights = read_weights(directory, model)
    if optimizer is not None:
        stored_moments, stored_generators = contents(directory, "optimizer"), contents(directory, "rng")
        _check_moments(model, stored_moments)
        _check_generators(_rng_tensors(model), stored_generators)
        moments = _empty_moments(model, optimizer, stored_moments)
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


def _empty_moments(model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where each tensor of the optimizer's state is to be read to."""
    fused = optimizer.param_groups[0].get("fused")
    moments = {}
    for name, value in stored.items():
        parameter = model.get_parameter(name.rpartition(".")[0])
        if value.dim():  # with the parameter, and sharded as it is
            moments[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        else:  # a step count is on the CPU, unless the optimiser is fused on a GPU
            moments[name] = torch.empty_like(value, device=parameter.device if fused else "cpu")
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
