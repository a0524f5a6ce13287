"""Tasks: sequences made on the fly from a seed, whose answers take steps of computation and no knowledge of a text.

Training never sees a sequence twice by design: batch ``step`` is drawn from a generator of (seed, step), and the
validation sequences, the same for every run of a task and length, from a generator that no training step has. Nothing
is read from a disk or kept there, except the validation sequences in the run's directory.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from looped.run_directory import write_validation
from looped.supervision import IGNORE_INDEX
from train.source import Source
from train.tasks.addition import Addition
from train.tasks.p_hop import PHop
from train.text.batches import share, spread

TRAINING, VALIDATION = 0, 1  # branches of the random generators, which have no seed in common
N_VALIDATION = 4096  # sequences
TASKS: dict[str, Callable[[int], "Task"]] = {"p-hop": PHop, "addition": Addition}


class Task(Protocol):
    """What a sequence is, how it is answered, and how answers are counted."""

    name: str
    vocab_size: int

    @property
    def description(self) -> str: ...

    def sequences(self, generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [n, T] and the answers [n, A] to their last A places, both int64."""
        ...

    def asked(self, step: int) -> int:
        """How many of the answers, from the first on, step ``step`` of training asks for: the curriculum."""
        ...

    def accuracy(self, right: np.ndarray) -> dict[str, float]:
        """Shares of right answers by name, that of all "answers" first. right: [n, A] bool."""
        ...


def make_task(name: str, seq_len: int) -> Task:
    """The task ``name`` of `TASKS`. Raises ValueError if sequences of ``seq_len`` tokens do not fit it."""
    return TASKS[name](seq_len)


@dataclass(frozen=True)
class MadeSequences:
    """inputs, targets: [N, T] int64, -100 where there is no answer."""

    inputs: Tensor
    targets: Tensor

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


class TaskSource(Source):
    """A task as a source of training and validation sequences."""

    task: Task

    def __init__(self, task: Task) -> None:
        self.task, self.vocab_size = task, task.vocab_size
        self.description = f"{task.name}, made on the fly ({task.description})"
        made = self._validation = self._make(np.random.SeedSequence(0, spawn_key=(VALIDATION,)), N_VALIDATION, None)
        # Of the validation sequences: it changes with how sequences are made, and with the generator.
        content = made.inputs.numpy().tobytes() + made.targets.numpy().tobytes()
        self.fingerprint = hashlib.blake2b(f"{task.name} ".encode() + content, digest_size=16).hexdigest()

    def batch(self, step: int, *, seed: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        made = self._make(np.random.SeedSequence(seed, spawn_key=(TRAINING, step)), batch_size, self.task.asked(step))
        rows = share(batch_size, rank=rank, world=world)
        return made.inputs[rows], made.targets[rows]

    def validation(self, limit: int | None) -> tuple[MadeSequences, np.ndarray]:
        """``limit``: tokens, of which each sequence has T."""
        n, length = self._validation.inputs.shape
        return self._validation, spread(n, n if limit is None else max(1, limit // length))

    def write(self, out: Path) -> None:
        """The validation sequences, as documents; there is no tokenizer."""
        inputs, targets = self._validation.inputs.numpy(), self._validation.targets.numpy()
        bounds = np.arange(len(inputs) + 1) * inputs.shape[1]
        write_validation(out, inputs.ravel(), bounds, targets=targets.ravel())

    def _make(self, seed: np.random.SeedSequence, n: int, asked: int | None) -> MadeSequences:
        """``asked``: how many answers are targets, from the first on; None: all."""
        inputs, answers = self.task.sequences(np.random.default_rng(seed), n)
        targets = np.full_like(inputs, IGNORE_INDEX)
        targets[:, inputs.shape[1] - answers.shape[1] :][:, :asked] = answers[:, :asked]
        return MadeSequences(torch.from_numpy(inputs), torch.from_numpy(targets))
