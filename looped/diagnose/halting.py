"""Calibrated halting, measured: calibrated on the first half of the windows, reported on the second."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.diagnose.model import Batch, LoopedModel, wide
from looped.halting import calibrate, exit_loops

TOLERANCE = 1.01  # times the perplexity at K


@dataclass(frozen=True)
class Halt:
    """Halting with one way of reading the loops. tau: None if no token may leave before K.

    loops: mean number of loops until a token leaves. ratio: perplexity over that at K. exits: [K], the share of tokens
    that leaves after each loop. All three on the report slice; the first two on the calibration slice as well.
    """

    tau: float | None
    calibration_loops: float
    calibration_ratio: float
    loops: float
    ratio: float
    exits: list[float]


@dataclass(frozen=True)
class Halting:
    """as_trained: each loop read as training reads it. as_last: each as if it were the last; the same unless training
    normalises the last loop only. windows and tokens: of the two slices, which share none."""

    tolerance: float
    calibration_windows: int
    calibration_tokens: int
    report_windows: int
    report_tokens: int
    as_trained: Halt
    as_last: Halt


def measure_halting(model: LoopedModel, batches: Sequence[Batch], tolerance: float = TOLERANCE) -> Halting:
    """Calibrate on the first half of the windows [T] of `batches`, report on the others.

    Raises ValueError if there are fewer than two windows.
    """
    n_windows = sum(len(tokens) for tokens, _ in batches)
    if n_windows < 2:
        raise ValueError(f"batches must hold two windows, to calibrate halting and to report it. Got {n_windows}.")
    half = n_windows // 2
    trained = _windows(model, batches, as_last=False)
    last = trained if model.norm_every_loop else _windows(model, batches, as_last=True)
    as_trained = _halt(trained[:half], trained[half:], tolerance)
    return Halting(
        tolerance,
        half,
        sum(window.shape[-1] for window in trained[:half]),
        n_windows - half,
        sum(window.shape[-1] for window in trained[half:]),
        as_trained,
        as_trained if model.norm_every_loop else _halt(last[:half], last[half:], tolerance),
    )


@torch.no_grad()
def _windows(model: LoopedModel, batches: Sequence[Batch], *, as_last: bool) -> list[Tensor]:
    """Cross-entropy and margin of every loop and token, [2, K, T] for each window."""
    windows: list[Tensor] = []
    for tokens, targets in batches:
        loops = []
        for loop, state in enumerate(model.states(tokens, model.n_loops)):
            logits = wide(model.head(model.normalised(state, final=as_last or loop == model.n_loops - 1)))
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
            best, second = logits.topk(2).values.unbind(-1)
            loops.append(torch.stack([loss, best - second]))
        windows += torch.stack(loops, dim=1).double().cpu().unbind(2)
    return windows


def _halt(calibration: Sequence[Tensor], report: Sequence[Tensor], tolerance: float) -> Halt:
    loss, margin = torch.cat(list(calibration), dim=-1)
    tau = calibrate(loss, margin, tolerance)
    calibration_loops, calibration_ratio, _ = _outcome(loss, margin, tau)
    loss, margin = torch.cat(list(report), dim=-1)
    loops, ratio, exits = _outcome(loss, margin, tau)
    return Halt(tau if math.isfinite(tau) else None, calibration_loops, calibration_ratio, loops, ratio, exits)


def _outcome(loss: Tensor, margin: Tensor, tau: float) -> tuple[float, float, list[float]]:
    """Mean loops, perplexity over that at K, and the share of tokens at each loop, of [K, tokens] each."""
    exits = exit_loops(margin, tau)
    halted = loss.gather(0, exits.unsqueeze(0) - 1).mean()
    shares = torch.bincount(exits - 1, minlength=len(loss)).double() / exits.numel()
    return exits.double().mean().item(), math.exp(halted - loss[-1].mean()), shares.tolist()
