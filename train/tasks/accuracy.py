"""How many answers of a task are right when the model stops after K loops."""

from collections.abc import Sequence

import numpy as np
import torch

from looped.model import LoopedLM
from looped.supervision import IGNORE_INDEX
from train import processes
from train.source import Sequences
from train.step import LoopResult, autocast, to_device
from train.tasks.task import Task


@torch.no_grad()
def with_accuracy(
    results: Sequence[LoopResult],
    task: Task,
    model: LoopedLM,
    sequences: Sequences,
    indices: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[LoopResult]:
    """``results`` with the accuracy of the likeliest tokens on the sequences ``indices``, at the K of each."""
    model.eval()
    depths = [result.n_loops for result in results]
    right: list[torch.Tensor] = []  # each [depths, B, A] bool
    for group in processes.own_batches(indices, batch_size):
        inputs, targets = sequences.gather(group if len(group) else indices[:1])
        n_answers = int((targets[0] != IGNORE_INDEX).sum())
        with autocast(device, dtype):
            states = model(to_device(inputs, device), n_loops=max(depths)).states
            logits = [model.readout_logits(states[n_loops - 1])[:, -n_answers:] for n_loops in depths]
        answers = torch.stack([each.argmax(-1) for each in logits])
        right.append((answers.cpu() == targets[:, -n_answers:])[:, : len(group)])
    of_all = torch.cat(processes.gather(torch.cat(right, dim=1)), dim=1)
    shares = [task.accuracy(each) for each in of_all.numpy()]
    return [result._replace(accuracy=share) for result, share in zip(results, shares, strict=True)]
