"""Calibrated halting, measured: calibrated on the first half of the windows, reported on the second."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from looped.config import at_least
from looped.diagnose.model import Batch, LoopedModel, token_losses
from looped.diagnose.skipping import NO_POLICY, Run, Skipped, measure_skipping, with_all_loops
from looped.early_exit import run_with_exits
from looped.halting import MARGIN, WITHOUT_A_GATE, Policy, Seen, calibrate, exit_loops, gate_policy

TOLERANCE = 1.01  # times the perplexity at K


@dataclass(frozen=True)
class Halt:
    """Halting by one policy, with the loops read in one way. All loops are computed, whether a token stops or not.

    tau: the score at which a token leaves; None if no token may leave before K.
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

    @property
    def threshold(self) -> float:
        """tau, or inf."""
        return math.inf if self.tau is None else self.tau


@dataclass(frozen=True)
class Halting:
    """as_trained: halting by the margin with each loop read as training reads it.

    as_last: halting by the margin with each loop read as if it were the last. The two differ only where training
    normalises the last loop alone. The windows and tokens are those of the two slices, which do not overlap.

    Of each loop as training reads it: policies, halting by every policy; skipped, the same taus with later loops left
    out, and K loops for every token as `NO_POLICY`, empty for a model that is not a LoopedLM; exit_gap, CE(1) - CE(K)
    on the report slice, in nats: where the loops do nothing, every policy halts at once.
    """

    tolerance: float
    calibration_windows: int
    calibration_tokens: int
    report_windows: int
    report_tokens: int
    as_trained: Halt
    as_last: Halt
    exit_gap: float
    policies: dict[str, Halt]
    skipped: dict[str, Skipped]


def measure_halting(
    model: LoopedModel, batches: Sequence[Batch], tolerance: float = TOLERANCE, *, rounds: int = 0
) -> Halting:
    """Calibrate on the first half of the windows [T] of `batches`, report on the others.

    rounds: how often the speed with later loops left out is timed. Raises ValueError if there are fewer than two
    windows, and for a tolerance below 1 or rounds below 0.
    """
    at_least(1, tolerance=tolerance)
    at_least(0, rounds=rounds)
    n_windows = check_windows(batches)
    half = n_windows // 2
    policies: tuple[Policy, ...] = WITHOUT_A_GATE
    if model.decoder is not None and model.decoder.exit_gate is not None:
        policies = (*policies, gate_policy(model.decoder.exit_logit))
    calibration, report = _slices(model, batches, half, policies, as_last=False)
    halts = {
        policy.name: _halt(calibration[[0, place]], report[[0, place]], tolerance)
        for place, policy in enumerate(policies, start=1)
    }
    as_last = halts[MARGIN.name]
    if not model.norm_every_loop:
        as_last = _halt(*_slices(model, batches, half, (MARGIN,), as_last=True), tolerance)
    skipped = {}
    if model.decoder is not None:
        runs: dict[str, Run] = {NO_POLICY: with_all_loops(model.decoder, model.n_loops)}
        for policy in policies:
            tau = halts[policy.name].threshold
            runs[policy.name] = partial(run_with_exits, model.decoder, policy=policy, tau=tau, n_loops=model.n_loops)
        skipped = measure_skipping(runs, _from_window(batches, half), rounds, model.n_loops)
    return Halting(
        tolerance=tolerance,
        calibration_windows=half,
        calibration_tokens=calibration.shape[-1],
        report_windows=n_windows - half,
        report_tokens=report.shape[-1],
        as_trained=halts[MARGIN.name],
        as_last=as_last,
        exit_gap=(report[0, 0].mean() - report[0, -1].mean()).item(),
        policies=halts,
        skipped=skipped,
    )


def check_windows(batches: Sequence[Batch]) -> int:
    """How many windows there are. Raises ValueError for fewer than two."""
    n_windows = sum(len(tokens) for tokens, _ in batches)
    if n_windows < 2:
        raise ValueError(
            f"batches must hold two windows: halting is calibrated on one and reported on the other. Got {n_windows}."
        )
    return n_windows


def _from_window(batches: Sequence[Batch], first: int) -> list[Batch]:
    """The batches without their first windows."""
    later = []
    for tokens, targets in batches:
        if len(tokens) > first:
            later.append((tokens[first:], targets[first:]))
        first = max(0, first - len(tokens))
    return later


@torch.no_grad()
def _slices(
    model: LoopedModel, batches: Sequence[Batch], half: int, policies: Sequence[Policy], *, as_last: bool
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of every loop and token, and its score by each policy, [1 + policies, K, tokens].

    Of the first `half` windows, and of the others.
    """
    windows: list[Tensor] = []
    for tokens, targets in batches:
        embedded = model.embed(tokens)
        before = embedded if model.decoder is None else model.decoder.start(embedded)
        scores: list[Tensor] = []
        loops = []
        for loop, state in enumerate(model.unroll(embedded, model.n_loops)):
            logits = model.head(model.normalised(state, final=as_last or loop == model.n_loops - 1))
            loss = token_losses(logits, targets)
            read = model.decoder.read(state) if model.decoder is not None and policies[-1].reads else None
            seen = Seen(before, state, logits, read=read)
            scores = [
                policy.score(seen._replace(score=scores[place] if scores else None))
                for place, policy in enumerate(policies)
            ]
            loops.append(torch.stack([loss, *scores]))
            before = state
        windows += torch.stack(loops, dim=1).double().cpu().unbind(2)
    return torch.cat(windows[:half], dim=-1), torch.cat(windows[half:], dim=-1)


def _halt(calibration: Tensor, report: Tensor, tolerance: float) -> Halt:
    """Of the loss and the score of every loop and token, [2, K, tokens] each."""
    loss, score = calibration
    tau = calibrate(loss, score, tolerance)
    calibration_loops, calibration_ratio, _ = _outcome(loss, score, tau)
    loss, score = report
    loops, ratio, exits = _outcome(loss, score, tau)
    return Halt(
        tau=tau if math.isfinite(tau) else None,
        calibration_loops=calibration_loops,
        calibration_ratio=calibration_ratio,
        loops=loops,
        ratio=ratio,
        exits=exits,
    )


def _outcome(loss: Tensor, score: Tensor, tau: float) -> tuple[float, float, list[float]]:
    """What stopping by `tau` gives: mean loops, perplexity over that at K, and the share of tokens at each loop.

    loss and score: [K, tokens].
    """
    exits = exit_loops(score, tau)
    loss_at_exit = loss.gather(0, exits.unsqueeze(0) - 1).mean()
    shares = torch.bincount(exits - 1, minlength=len(loss)).double() / exits.numel()
    return exits.double().mean().item(), math.exp(loss_at_exit - loss[-1].mean()), shares.tolist()
