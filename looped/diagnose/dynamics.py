"""How the state moves: its norm after every loop, token by token, and each update split into radial and tangential.

With `h = s u`, `s = rms(h)`, and the update `b = H_{k+1} - H_k`: `a = <u, b> / d` is its radial and `b_perp = b - a u`
its tangential part. To first order the scale grows by `a`, to second by `a + rms(b_perp)^2 / (2 s)`; the direction
moves by `b_perp / s`, so that the angular motion `rms(u_{k+1} - u_k)` times `s` is `rms(b_perp)` to first order
(Sharma & Vu, arXiv 2606.24898).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from looped.diagnose.model import Batch, LoopedModel, rms, wide

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Norms:
    """||H_k||_2 over tokens, k = 1..n. mean: [n]. percentiles: [n][9], those in PERCENTILES. scale: [n], mean rms.

    entered: [n], mean norm of what loop k begins with: H_0, then H_{k-1} or, with a norm between loops, what that makes
    of it. within: [n], mean over tokens of ||H_k|| over that norm: how much one loop makes of the scale.
    """

    mean: list[float]
    percentiles: list[list[float]]
    scale: list[float]
    entered: list[float]
    within: list[float]


@dataclass(frozen=True)
class Updates:
    """Means over tokens of the update from H_k to H_{k+1}, k = 1..n-1, each [n-1], in units of a channel.

    increment: s_{k+1} - s_k, measured. first_order: a_k, second_order: a_k + rms(b_perp)^2 / (2 s_k), its
    predictions; first_error and second_error: mean absolute error of each, token by token. tangential: rms(b_perp).
    angular: rms(u_{k+1} - u_k), no unit, = 2 sin(half the angle). angular_times_scale: s_k rms(u_{k+1} - u_k).
    """

    increment: list[float]
    first_order: list[float]
    second_order: list[float]
    first_error: list[float]
    second_error: list[float]
    tangential: list[float]
    angular: list[float]
    angular_times_scale: list[float]


@torch.no_grad()
def measure_dynamics(model: LoopedModel, batches: Sequence[Batch], n_loops: int) -> tuple[Norms, Updates]:
    """Norms of H_1..H_n and the n-1 updates between them, n = `n_loops` >= 2."""
    scales: list[np.ndarray] = []
    entered: list[np.ndarray] = []
    updates: list[np.ndarray] = []
    for tokens, _ in batches:
        embedded = model.embed(tokens)
        states = model.unroll(embedded, n_loops)
        d_model = states[0].shape[-1]
        scales.append(_scales(states))
        entered.append(_scales(model.entered(embedded, states)))
        updates.append(np.stack([_update(before, after) for before, after in pairwise(states)], axis=1))
    scale, start = np.concatenate(scales, axis=1), np.concatenate(entered, axis=1)  # [n, tokens] each
    norms = scale * d_model**0.5
    with np.errstate(divide="ignore", invalid="ignore"):  # of a state that begins as zeros
        within = scale / start
    percentiles = np.percentile(norms, PERCENTILES, axis=1).T
    return (
        Norms(
            norms.mean(1).tolist(),
            percentiles.tolist(),
            scale.mean(1).tolist(),
            (start.mean(1) * d_model**0.5).tolist(),
            within.mean(1).tolist(),
        ),
        Updates(*np.concatenate(updates, axis=2).mean(2).tolist()),
    )


def _scales(states: Sequence[torch.Tensor]) -> np.ndarray:
    """rms of every state and token, [n, tokens] float64."""
    return torch.stack([rms(state).flatten() for state in states]).double().cpu().numpy()


def _update(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """The eight measurements of Updates for every token, [8, tokens] float64."""
    before, after = wide(before), wide(after)
    scale, next_scale = rms(before), rms(after)
    direction = before / scale.unsqueeze(-1)
    update = after - before
    radial = (direction * update).mean(-1)
    tangential = rms(update - radial.unsqueeze(-1) * direction)
    angular = rms(after / next_scale.unsqueeze(-1) - direction)
    increment = next_scale - scale
    second = radial + tangential.square() / (2 * scale)
    rows = (
        increment, radial, second, (radial - increment).abs(), (second - increment).abs(),
        tangential, angular, scale * angular,
    )  # fmt: skip
    return torch.stack([row.flatten() for row in rows]).double().cpu().numpy()
