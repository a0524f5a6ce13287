"""The processes of a run: who this one is, what only the first does, and what they tell each other.

torchrun starts several processes with the same command line and numbers them in environment variables, which alone
decide whether a run has several. One process is the first of one: every function here is then the identity, and no
process group is there.

Two groups: the default one, in which processes wait as long as it takes for what the first one does alone, such as
filling a cache; and the working one, in which a process that is silent for `collective_timeout` seconds is given up.
Both have gloo for tensors on the CPU, through which the hosts tell each other of signals without waiting for a device.
"""

import os
import pickle
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

PATIENCE = timedelta(days=30)  # with the first process, which may tokenise a large text
LAUNCH = "launch.txt"  # in the directory of a run that torchrun may start again
STREAM = 0x72616E6B  # sets the ranks' random numbers apart from those of batches and depths, which have the same seed

# What gloo, NCCL and PyTorch's store say when another process has ended or is silent.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed? ?out|broken pipe|socket", re.IGNORECASE)

_working: dist.ProcessGroup | None = None  # None: the default group

Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=BaseException)


def join() -> None:
    """Meet the other processes, if torchrun has started several. Raises ValueError if they are not there."""
    if dist.is_initialized() or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    try:
        store, rank, size = next(rendezvous("env://"))
        # torchrun may keep its store when it starts the processes again; the addresses there are of those that ended.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise ValueError(
            f"the processes must be able to meet as torchrun says. Got {given} ({error!s:.200})."
        ) from error


def work(device: torch.device, seconds: float) -> None:
    """Form the group in which this process trains on ``device`` and waits at most ``seconds`` for another."""
    global _working
    if world_size() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        _working = dist.new_group(backend=backend, timeout=timedelta(seconds=seconds))


def group() -> dist.ProcessGroup:
    """The group in which gradients and weights travel."""
    assert dist.group.WORLD is not None  # there are several processes
    return _working or dist.group.WORLD


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_later() -> bool:
    """Whether torchrun says that this process is not the first; before they have met."""
    alone = not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") == "1"  # whatever RANK says
    return not alone and os.environ.get("RANK", "0") != "0"


def is_first() -> bool:
    """Whether this process writes, prints and reports."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def from_first(function: Callable[[], Result], *, promptly: bool = False) -> Result:
    """What ``function`` gives in the first process, which alone calls it. What it raises there is raised in all.

    promptly: the others wait in the working group, so at most `collective_timeout` seconds; and a checkpoint may be
    written in the background meanwhile, for which processes meet in the default group.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None]
    if is_first():
        try:
            outcome = [(function(), None)]
        except (Exception, SystemExit) as error:
            outcome = [(None, _plain(error))]
    meeting = group() if promptly else None
    dist.broadcast_object_list(outcome, src=0, group=meeting, device=torch.device("cpu"))
    result, failure = outcome[0]
    if failure is not None:
        raise agreed(failure)
    return result


def first_then_others(function: Callable[[], Result]) -> Result:
    """What ``function`` gives, called in every process: first in the first one, for it may fill a cache."""
    of_first: list[Result] = []  # in the first process alone, and never sent
    from_first(lambda: of_first.append(function()))
    return of_first[0] if of_first else function()


def meet() -> None:
    """Wait for all processes. Raises RuntimeError if one has ended."""
    if world_size() > 1:
        dist.barrier()


def _plain(error: BaseException) -> BaseException:
    """The error, or one of its kind that can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def agreed(error: Failure) -> Failure:
    """The error, marked as one that all processes raise, so that only the first one prints it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def is_to_be_said(error: BaseException) -> bool:
    """Whether this process prints what went wrong."""
    return is_first() or not getattr(error, "agreed", False)


def largest(number: int) -> int:
    """The largest of the processes' numbers. Only the hosts wait, not their devices."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group())
    return int(tensor)


def any_of(flag: bool) -> bool:
    """Whether the flag is up in one of the processes."""
    return bool(largest(int(flag)))


def gather(value: Result) -> list[Result]:
    """The processes' values, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group())
    return values


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes."""
    if world_size() == 1:
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result, group=group())
    return result


def own_batches(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """This process's share of the indices, in batches. Every process has as many batches; its last may be empty.

    batch_size: of all processes together.
    """
    count, size = -(-len(indices) // world_size()), -(-batch_size // world_size())
    share = indices[rank() * count : (rank() + 1) * count]
    return [share[start : start + size] for start in range(0, count, size)]


def seed_step(seed: int, step: int) -> None:
    """Have each of several processes draw numbers of its own in step ``step``: a function of (seed, step, rank).

    So a run that is continued draws what the whole one does, without keeping the state of every process's generator.
    """
    if world_size() > 1:
        state = np.random.SeedSequence((seed, step, rank(), STREAM)).generate_state(2, np.uint32)
        torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def why_lost(error: BaseException) -> str | None:
    """In words, if the error says that another process has ended or is silent; else None."""
    text = " ".join(str(error).split())
    if world_size() == 1 or not (isinstance(error, dist.DistError) or _LOST.search(text)):
        return None
    return f"process {rank()} of {world_size()} stops: another process has ended or does not answer ({text[:160]})"


def _launch() -> str | None:
    """A name of the torchrun that has started this process, the same after a restart; None if it restarts none."""
    if not may_restart():
        return None
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun of process {os.getppid()}" if run_id == "none" else run_id


def may_restart() -> bool:
    """Whether torchrun has been told to start processes again that have ended."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def note_launch(out: Path) -> None:
    """Leave a note in a run's directory, by which processes that are started again know it."""
    launch = _launch()
    if launch is not None:
        (out / LAUNCH).write_text(launch, encoding="utf-8")


def forget_launch(out: Path) -> None:
    if is_first():
        (out / LAUNCH).unlink(missing_ok=True)


def was_begun_here(out: Path) -> bool:
    """Whether these processes replace others of the same torchrun, which have begun the run in ``out`` and ended."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    note = out / LAUNCH
    return again and note.is_file() and note.read_text(encoding="utf-8") == _launch()


def discard(out: Path) -> None:
    """Remove what a run has left in its directory, the note last."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == LAUNCH):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def end(program: Callable[[], int]) -> NoReturn:
    """Run the program and end this process with its exit code.

    One of several ends at once: PyTorch takes a group down in a race with the group's own threads, which it now and
    then loses, and the process waits for ever.
    """
    try:
        code = program()
    except BaseException as error:
        if world_size() == 1:
            raise
        code = 0 if isinstance(error, SystemExit) and not error.code else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    if world_size() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
