"""What changes when somebody changes the scale of the state: before the readout, before a loop, or at every loop."""

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
        """[K], nats: the largest cross-entropy over alpha minus the smallest. 0 if the readout cannot see the scale."""
        return [max(row) - min(row) for row in self.ce]


@dataclass(frozen=True)
class Clamped:
    """What a clamp does to the cross-entropy after loops 1..K.

    change: [K], in nats. error: [K], its standard error. It is taken from the differences of the windows' means, since
    the tokens of a window share their text; nan for a single window.
    """

    change: list[float]
    error: list[float]


@dataclass(frozen=True)
class RadialClamp:
    """The radial clamp, which stops the loops from changing the scale, in its parts and whole.

    free: [K], the cross-entropy of the model as it is, each loop read as the last.

    A loop from the second on takes the state `s u` and adds the update `b = a u + b_perp`, with `a = <u, b> / d`. s_1
    is the scale after loop 1. What the state becomes instead of `s u + b`:
    frozen: `s_1 v / rms(v)` with `v = s u + b`. The scale is held; updates keep their radial part.
    tangential: `s u + b_perp`. Updates lose their radial part; the scale still grows by what b_perp adds.
    both: `s_1 v / rms(v)` with `v = s u + b_perp`.
    """

    free: list[float]
    frozen: Clamped
    tangential: Clamped
    both: Clamped

    @property
    def forms(self) -> dict[str, Clamped]:
        """By the name that the page gives them."""
        return {"scale frozen": self.frozen, "radial part removed": self.tangential, "both": self.both}

    @property
    def change(self) -> float:
        """The change of the cross-entropy at K under `both`, in nats."""
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
    """Run the model without the clamp and under each of its forms (arXiv 2606.24898, section on the radial clamp)."""
    lengths = torch.cat([torch.full((len(tokens),), float(tokens.shape[1])) for tokens, _ in batches]).double()
    shares = lengths / lengths.sum()  # [windows], of all tokens
    free = _clamped_losses(model, batches, freeze=False, remove=False)

    def clamped(*, freeze: bool, remove: bool) -> Clamped:
        return _paired(_clamped_losses(model, batches, freeze=freeze, remove=remove) - free, shares)

    return RadialClamp(
        free=(free @ shares).tolist(),
        frozen=clamped(freeze=True, remove=False),
        tangential=clamped(freeze=False, remove=True),
        both=clamped(freeze=True, remove=True),
    )


def _paired(difference: Tensor, shares: Tensor) -> Clamped:
    """The mean over windows of a difference [K, windows], and its standard error. shares: [windows], of the tokens."""
    mean, count = difference @ shares, len(shares)
    spread = (shares * (difference - mean.unsqueeze(-1))).square().sum(-1)
    return Clamped(mean.tolist(), (spread * count / (count - 1) if count > 1 else spread * torch.nan).sqrt().tolist())


def _clamped_losses(model: LoopedModel, batches: Sequence[Batch], *, freeze: bool, remove: bool) -> Tensor:
    """The mean cross-entropy of every window after loops 1..K, [K, windows] float64."""
    windows = []
    for tokens, targets in batches:
        states = _clamped_states(model, tokens, freeze=freeze, remove=remove)
        loss = torch.stack([model.cross_entropy(state, targets, final=True) for state in states])
        windows.append(loss.double().mean(-1).cpu())
    return torch.cat(windows, dim=1)


def _clamped_states(model: LoopedModel, tokens: Tensor, *, freeze: bool, remove: bool) -> list[Tensor]:
    """H_1..H_K. freeze: keep the scale that is there after loop 1. remove: the radial part of every later update."""
    embedded = model.embed(tokens)
    state = model.loop(embedded, embedded, 0)
    first_scale = rms(state).unsqueeze(-1)
    states = [state]
    for done in range(1, model.n_loops):
        moved = model.loop(state, embedded, done)
        if remove:
            direction = state / rms(state).unsqueeze(-1)
            moved = moved - (direction * (moved - state)).mean(-1, keepdim=True) * direction
        if freeze:
            moved = first_scale * moved / rms(moved).unsqueeze(-1)
        state = moved.to(state.dtype)
        states.append(state)
    return states


@torch.no_grad()
def scale_response(model: LoopedModel, batches: Sequence[Batch]) -> list[float]:
    """How much of a state's scale the next loop F sees, [K-1].

    `rms(F(2 H_k) - F(H_k)) / rms(F(H_k))`, mean over tokens. It is about 1 for a residual stack, which passes on the
    state that it gets; it is 0 where a norm between loops removes the scale.
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
