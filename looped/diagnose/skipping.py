"""Halting with later loops left out (looped/early_exit.py), measured: what is predicted then, and how fast."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from looped.diagnose.model import Batch, token_losses
from looped.early_exit import Exits
from looped.model import LoopedLM

NO_POLICY = "none"


@dataclass(frozen=True)
class Skipped:
    """One policy whose later loops are left out.

    loops: the mean number of loops until a token leaves. exits: [K], the share of tokens that leaves after each loop.
    ratio: the perplexity of what is predicted then, divided by that of K loops for every token.
    tokens_per_second: of the median round. speed: how many times as fast as K loops for every token, the median of the
    rounds' quotients. Both are nan if no round was timed.
    """

    loops: float
    exits: list[float]
    ratio: float
    tokens_per_second: float
    speed: float


Run = Callable[[Tensor], Exits]  # of tokens [B, T]


def with_all_loops(decoder: LoopedLM, n_loops: int) -> Run:
    """`n_loops` loops for every token, then one readout."""

    def run(tokens: Tensor) -> Exits:
        logits = decoder(tokens, n_loops=n_loops, logits=True).logits
        return Exits(torch.full_like(tokens, n_loops), logits)

    return run


@torch.no_grad()
def measure_skipping(
    runs: Mapping[str, Run], batches: Sequence[Batch], rounds: int, n_loops: int
) -> dict[str, Skipped]:
    """Measure every run, and compare it with the first. None takes more than n_loops loops.

    What is timed is the way from the tokens [B, T] of all batches, one batch after the other, to logits [B, T, V]. In
    every round each run has its turn: if the machine is busy for a while, it is so for all of them. The predictions
    for the perplexity are made before, which warms up.
    """
    predicted = {name: _predict(run, batches) for name, run in runs.items()}
    seconds = np.array([[_seconds(run, batches) for run in runs.values()] for _ in range(rounds)])
    loss_of_first = next(iter(predicted.values()))[1].mean()
    measured = {}
    for place, (name, (loops, loss)) in enumerate(predicted.items()):
        shares = torch.bincount(loops - 1, minlength=n_loops).double() / len(loops)
        measured[name] = Skipped(
            loops=loops.double().mean().item(),
            exits=shares.tolist(),
            ratio=math.exp(loss.mean() - loss_of_first),
            tokens_per_second=float(np.median(len(loops) / seconds[:, place])) if rounds else math.nan,
            speed=float(np.median(seconds[:, 0] / seconds[:, place])) if rounds else math.nan,
        )
    return measured


def _predict(run: Run, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """The exit loops and the cross-entropy in nats, float64, of every token [tokens], on the CPU."""
    loops, losses = [], []
    for tokens, targets in batches:
        exits = run(tokens)
        losses.append(token_losses(exits.logits, targets).flatten())
        loops.append(exits.loops.flatten())
    return torch.cat(loops).cpu(), torch.cat(losses).double().cpu()


def _seconds(run: Run, batches: Sequence[Batch]) -> float:
    _wait(batches)
    start = time.perf_counter()
    for tokens, _ in batches:
        run(tokens)
    _wait(batches)
    return time.perf_counter() - start


def _wait(batches: Sequence[Batch]) -> None:
    """Wait until the device has done its work."""
    device = batches[0][0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
