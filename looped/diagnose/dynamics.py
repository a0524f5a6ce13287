"""How the state moves: the norm of every token's state after every loop, and what each update does to it.

A state is scale times direction: `h = s u` with `s = rms(h)`. The update is `b = H_{k+1} - H_k`. Its radial part lies
along the direction: `a = <u, b> / d`. Its tangential part is the rest: `b_perp = b - a u`.

The scale grows by `a` to first order and by `a + rms(b_perp)^2 / (2 s)` to second order. The direction moves by
`b_perp / s` to first order, so the angular motion `rms(u_{k+1} - u_k)` times `s` is about `rms(b_perp)`
(Sharma & Vu, arXiv 2606.24898).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch

from looped.diagnose.model import Batch, LoopedModel, rms
from looped.halting import wide

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Norms:
    """The norms ||H_k||_2 of all tokens, k = 1..n.

    mean: [n], over tokens. percentiles: [n][9], over tokens, those in PERCENTILES. scale: [n], mean of rms(H_k).
    entered: [n], mean norm of the state that loop k begins with. That is H_0 for loop 1. For a later loop it is
    H_{k-1}, or with a norm between loops what that norm makes of H_{k-1}.
    within: [n], ||H_k|| divided by the norm that loop k begins with, mean over tokens.
    """

    mean: list[float]
    percentiles: list[list[float]]
    scale: list[float]
    entered: list[float]
    within: list[float]


@dataclass(frozen=True)
class Updates:
    """Means over tokens of the update from H_k to H_{k+1}, k = 1..n-1, each [n-1], in the unit of a channel.

    increment: s_{k+1} - s_k, as measured.
    first_order, second_order: what is predicted for it, a_k and a_k + rms(b_perp)^2 / (2 s_k).
    first_error, second_error: the absolute errors of these predictions, taken for every token.
    tangential: rms(b_perp).
    angular: rms(u_{k+1} - u_k), without a unit; it is 2 sin(half the angle between the directions).
    angular_times_scale: s_k rms(u_{k+1} - u_k).
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
    scales, entered_scales = [], []
    updates: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Updates)}
    for tokens, _ in batches:
        embedded = model.embed(tokens)
        states = model.unroll(embedded, n_loops)
        d_model = states[0].shape[-1]
        scales.append(_scales(states))
        entered_scales.append(_scales(model.entered(embedded, states)))
        per_loop = [_update(before, after) for before, after in pairwise(states)]
        for name, batches_so_far in updates.items():
            batches_so_far.append(np.stack([update[name] for update in per_loop]))
    scale, entered_scale = np.concatenate(scales, axis=1), np.concatenate(entered_scales, axis=1)  # [n, tokens] each
    root_d = d_model**0.5
    norms = scale * root_d
    with np.errstate(divide="ignore", invalid="ignore"):  # of a state that begins as zeros
        within = scale / entered_scale
    return (
        Norms(
            mean=norms.mean(1).tolist(),
            percentiles=np.percentile(norms, PERCENTILES, axis=1).T.tolist(),
            scale=scale.mean(1).tolist(),
            entered=(entered_scale.mean(1) * root_d).tolist(),
            within=within.mean(1).tolist(),
        ),
        Updates(**{name: np.concatenate(parts, axis=1).mean(1).tolist() for name, parts in updates.items()}),
    )


def _scales(states: Sequence[torch.Tensor]) -> np.ndarray:
    """rms of every state and token, [n, tokens] float64."""
    return torch.stack([rms(state).flatten() for state in states]).double().cpu().numpy()


def _update(before: torch.Tensor, after: torch.Tensor) -> dict[str, np.ndarray]:
    """The fields of Updates for every token, [tokens] float64 each."""
    before, after = wide(before), wide(after)
    scale, next_scale = rms(before), rms(after)
    direction = before / scale.unsqueeze(-1)
    update = after - before
    radial = (direction * update).mean(-1)
    tangential = rms(update - radial.unsqueeze(-1) * direction)
    angular = rms(after / next_scale.unsqueeze(-1) - direction)
    increment = next_scale - scale
    second_order = radial + tangential.square() / (2 * scale)
    measured = {
        "increment": increment,
        "first_order": radial,
        "second_order": second_order,
        "first_error": (radial - increment).abs(),
        "second_error": (second_order - increment).abs(),
        "tangential": tangential,
        "angular": angular,
        "angular_times_scale": scale * angular,
    }
    return {name: values.flatten().double().cpu().numpy() for name, values in measured.items()}
