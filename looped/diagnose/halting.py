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
    """Halting with one way of reading the loops.

    tau: the margin at which a token leaves; None if no token may leave before K.
    loops: the mean number of loops until a token leaves, on the report slice.
    ratio: the perplexity of what is predicted so, divided by that of K loops, on the report slice.
    exits: [K], the share of the report slice's tokens that leaves after each loop.
    calibration_loops, calibration_ratio: the first two on the calibration slice.
    """

    tau: float | None
    calibration_loops: float
    calibration_ratio: float
    loops: float
    ratio: float
    exits: list[float]


@dataclass(frozen=True)
class Halting:
    """as_trained: halting with each loop read as training reads it.

    as_last: halting with each loop read as if it were the last. The two differ only where training normalises the last
    loop alone. The windows and tokens are those of the two slices, which do not overlap.
    """

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
        raise ValueError(
            f"batches must hold two windows: halting is calibrated on one and reported on the other. Got {n_windows}."
        )
    half = n_windows // 2
    windows = _windows(model, batches, as_last=False)
    as_trained = as_last = _halt(windows[:half], windows[half:], tolerance)
    if not model.norm_every_loop:
        read_as_last = _windows(model, batches, as_last=True)
        as_last = _halt(read_as_last[:half], read_as_last[half:], tolerance)
    return Halting(
        tolerance=tolerance,
        calibration_windows=half,
        calibration_tokens=sum(window.shape[-1] for window in windows[:half]),
        report_windows=n_windows - half,
        report_tokens=sum(window.shape[-1] for window in windows[half:]),
        as_trained=as_trained,
        as_last=as_last,
    )


@torch.no_grad()
def _windows(model: LoopedModel, batches: Sequence[Batch], *, as_last: bool) -> list[Tensor]:
    """For each window [2, K, T]: the cross-entropy of every loop and token, and the margin."""
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
    return Halt(
        tau=tau if math.isfinite(tau) else None,
        calibration_loops=calibration_loops,
        calibration_ratio=calibration_ratio,
        loops=loops,
        ratio=ratio,
        exits=exits,
    )


def _outcome(loss: Tensor, margin: Tensor, tau: float) -> tuple[float, float, list[float]]:
    """What stopping by `tau` gives: mean loops, perplexity over that at K, and the share of tokens at each loop.

    loss and margin: [K, tokens].
    """
    exits = exit_loops(margin, tau)
    loss_at_exit = loss.gather(0, exits.unsqueeze(0) - 1).mean()
    shares = torch.bincount(exits - 1, minlength=len(loss)).double() / exits.numel()
    return exits.double().mean().item(), math.exp(loss_at_exit - loss[-1].mean()), shares.tolist()
