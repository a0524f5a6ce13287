"""How a checkpoint is written by all processes, as train/checkpoint.py says.

A module of its own, so that torch.distributed.checkpoint is imported only where a checkpoint is written.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from looped.checkpoint import KINDS, CheckpointError, Progress, file_name, seal, sync
from train import processes


class Writer(StorageWriter):
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


class Saving:
    """A checkpoint that is being written."""

    def __init__(self, writer: Writer) -> None:
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
