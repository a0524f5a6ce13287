"""What changes when the scale of the state is changed by hand: before the readout, before a loop, or at every loop."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.diagnose.model import Batch, LoopedModel, rms

ALPHAS = tuple(10 ** (exponent / 6) for exponent in range(-6, 7))  # 0.1 to 10, evenly in the logarithm


@dataclass(frozen=True)
class AlphaSweep:
    """ce: [K][alphas], mean cross-entropy in nats of alpha * H_k, read as training reads loop k."""

    alphas: list[float]
    ce: list[list[float]]

    @property
    def ranges(self) -> list[float]:
        """[K]: largest minus smallest cross-entropy over alpha, in nats; 0 for a readout that cannot see the scale."""
        return [max(row) - min(row) for row in self.ce]


@dataclass(frozen=True)
class Clamped:
    """change: [K], of the cross-entropy in nats after loops 1..K. error: [K], its standard error, from the differences
    of the windows' means, since the tokens of a window share their text; nan for a single window."""

    change: list[float]
    error: list[float]


@dataclass(frozen=True)
class RadialClamp:
    """The radial clamp in its parts. free: [K], cross-entropy of the model as it is, each loop read as the last.

    With `s u` the state before a loop, `b` its update, `a = <u, b> / d`, `b_perp = b - a u` and s_1 the scale after
    loop 1, the state after every loop from the second on becomes
    frozen: `s_1 v / rms(v)`, `v = s u + b`: the scale is held, updates are whole.
    tangential: `s u + b_perp`: updates lose their radial part, the scale grows by what b_perp adds.
    both: `s_1 v / rms(v)`, `v = s u + b_perp`.
    """

    free: list[float]
    frozen: Clamped
    tangential: Clamped
    both: Clamped

    @property
    def change(self) -> float:
        """Of the cross-entropy at K under both, nats."""
        return self.both.change[-1]


@torch.no_grad()
def sweep_alpha(model: LoopedModel, batches: Sequence[Batch], alphas: Sequence[float] = ALPHAS) -> AlphaSweep:
    """Scale the state by alpha before the readout of every trained loop; the state fed back is left alone."""
    total = torch.zeros(model.n_loops, len(alphas), dtype=torch.float64)
    for tokens, targets in batches:
        for loop, state in enumerate(model.states(tokens, model.n_loops)):
            for column, alpha in enumerate(alphas):
                losses = model.cross_entropy(alpha * state, targets, final=loop == model.n_loops - 1)
                total[loop, column] += losses.double().sum().cpu()
    return AlphaSweep(list(alphas), (total / _count(batches)).tolist())


@torch.no_grad()
def clamp_radially(model: LoopedModel, batches: Sequence[Batch]) -> RadialClamp:
    """Hold the scale of every token at what it is after loop 1, take the radial part from each later update, and both
    (arXiv 2606.24898, section on the radial clamp)."""
    forms = ((False, False), (True, False), (False, True), (True, True))
    windows: list[list[Tensor]] = [[] for _ in forms]
    for tokens, targets in batches:
        for freeze, remove in forms:
            path = _clamped_states(model, tokens, freeze=freeze, remove=remove)
            loss = torch.stack([model.cross_entropy(state, targets, final=True) for state in path])
            windows[2 * remove + freeze].append(loss.double().mean(-1).cpu())  # [K, B]
    free, *clamped = (torch.cat(parts, dim=1) for parts in windows)
    sizes = torch.cat([torch.full((len(tokens),), float(tokens.shape[1])) for tokens, _ in batches]).double()
    shares = sizes / sizes.sum()
    return RadialClamp((free @ shares).tolist(), *(_paired(one - free, shares) for one in clamped))


def _paired(difference: Tensor, shares: Tensor) -> Clamped:
    """Mean and standard error over windows of [K, windows]; `shares`: [windows], of the tokens."""
    mean, count = difference @ shares, len(shares)
    spread = (shares * (difference - mean.unsqueeze(-1))).square().sum(-1)
    return Clamped(mean.tolist(), (spread * count / (count - 1) if count > 1 else spread * torch.nan).sqrt().tolist())


def _clamped_states(model: LoopedModel, tokens: Tensor, *, freeze: bool, remove: bool) -> list[Tensor]:
    """H_1..H_K. freeze: at the scale after loop 1. remove: the radial part of every update."""
    embedded = model.embed(tokens)
    state = model.loop(embedded, embedded, 0)
    frozen = rms(state).unsqueeze(-1)
    states = [state]
    for done in range(1, model.n_loops):
        moved = model.loop(state, embedded, done)
        if remove:
            direction = state / rms(state).unsqueeze(-1)
            moved = moved - (direction * (moved - state)).mean(-1, keepdim=True) * direction
        if freeze:
            moved = frozen * moved / rms(moved).unsqueeze(-1)
        state = moved.to(state.dtype)
        states.append(state)
    return states


@torch.no_grad()
def scale_response(model: LoopedModel, batches: Sequence[Batch]) -> list[float]:
    """How much of a state's scale the next loop F sees, [K-1].

    `rms(F(2 H_k) - F(H_k)) / rms(F(H_k))`, mean over tokens. About 1 for a residual stack, which hands twice
    the state on; 0 where a norm between loops removes the scale.
    """
    total = torch.zeros(model.n_loops - 1, dtype=torch.float64)
    for tokens, _ in batches:
        embedded = model.embed(tokens)
        states = model.unroll(embedded, model.n_loops)
        for loop, state in enumerate(states[:-1], start=1):
            after = states[loop]
            change = model.loop(2 * state, embedded, loop) - after
            total[loop - 1] += (rms(change) / rms(after)).double().sum().cpu()
    return (total / _count(batches)).tolist()


def _count(batches: Sequence[Batch]) -> int:
    return sum(targets.numel() for _, targets in batches)
