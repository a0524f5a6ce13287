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
class RadialClamp:
    """Mean cross-entropy in nats after loops 1..K, each read as the last, [K]: as the model is, and clamped."""

    free: list[float]
    clamped: list[float]

    @property
    def change(self) -> float:
        """Of the cross-entropy at K, nats."""
        return self.clamped[-1] - self.free[-1]


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
    """Freeze the scale of every token at what it is after loop 1, and take the radial part from each later update.

    From loop 2 on, with `s u` the state before and `b` its update, the state after becomes
    `s_1 v / rms(v)`, `v = s u + b - <u, b>/d u` (arXiv 2606.24898, section on the radial clamp).
    """
    total = torch.zeros(2, model.n_loops, dtype=torch.float64)
    for tokens, targets in batches:
        paths = (model.states(tokens, model.n_loops), _clamped_states(model, tokens))
        for row, path in enumerate(paths):
            for loop, state in enumerate(path):
                total[row, loop] += model.cross_entropy(state, targets, final=True).double().sum().cpu()
    return RadialClamp(*(total / _count(batches)).tolist())


def _clamped_states(model: LoopedModel, tokens: Tensor) -> list[Tensor]:
    embedded = model.embed(tokens)
    state = model.loop(embedded, embedded, 0)
    frozen = rms(state).unsqueeze(-1)
    states = [state]
    for done in range(1, model.n_loops):
        direction = state / rms(state).unsqueeze(-1)
        update = model.loop(state, embedded, done) - state
        moved = state + update - (direction * update).mean(-1, keepdim=True) * direction
        state = (frozen * moved / rms(moved).unsqueeze(-1)).to(state.dtype)
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
