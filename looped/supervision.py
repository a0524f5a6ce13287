"""From the states of all loops to logits, the training loss, and the evaluation losses.

Fused models make one call into `kernels`; others do the same in plain PyTorch, loop by loop.
"""

import contextlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.decoder import LoopedDecoder
from looped.kernels import LoopedStatistics, looped_cross_entropy, readout_statistics
from looped.kernels.device import product_autocast

Supervision = Literal["per-loop", "terminal"]
IGNORE_INDEX = -100  # targets that count nowhere


class LoopedLoss(NamedTuple):
    """What `looped_loss` returns.

    loss: scalar, fp32, differentiable. per_loop: [K] fp32, detached, the mean cross-entropy of each loop in nats, nan
    for loops that were not read. statistics: per (loop, token), or None if not asked for.
    """

    loss: Tensor
    per_loop: Tensor
    statistics: LoopedStatistics | None


def looped_loss(
    model: LoopedDecoder,
    states: Sequence[Tensor],
    targets: Tensor,
    *,
    supervision: Supervision = "per-loop",
    penalty: float | Tensor = 0.0,
    statistics: bool = False,
    n_targets: int | Tensor | None = None,
) -> LoopedLoss:
    """The training loss of the states of all loops, in nats.

    `L = sum_k w_k CE_k + penalty * mean over loops, tokens and channels of H_k^2`, where CE_k is the mean
    cross-entropy of loop k over the targets that are not -100 (0 if all are), and w_k = 1/K for `per-loop`
    supervision; for `terminal` w_K = 1, the others 0 and not read out. (Sharma & Vu, arXiv 2606.24898.)

    states: the model's K states, each [B, T, d]; the last one is the last loop of the `final-only` readout.
    targets: [B, T] int64. n_targets: by what the sums of cross-entropies are divided, in `per_loop` too, instead of the
    number of targets that are not -100; a number, or a tensor on the device. penalty: a number or such a tensor.
    Raises ValueError for states and targets that do not fit, a negative penalty or an unknown
    supervision, TypeError for targets that are not int64.
    """
    _check_arguments(states, targets, penalty)
    if supervision not in get_args(Supervision):
        raise ValueError(f"supervision must be one of {', '.join(get_args(Supervision))}. Got {supervision!r}.")
    n_loops = len(states)
    weights = [1 / n_loops] * n_loops if supervision == "per-loop" else [0.0] * (n_loops - 1) + [1.0]
    if not model.fused:
        return _plain_loss(model, states, targets, weights, penalty, statistics, n_targets)
    norm_weight, norm_bias = _norm_parameters(model)
    result = looped_cross_entropy(
        states,
        model.head_weight,
        targets,
        readout=model.config.readout,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=model.config.norm_eps,
        penalty=penalty,
        weights=weights,
        ignore_index=IGNORE_INDEX,
        n_targets=n_targets,
        statistics=statistics,
    )
    return LoopedLoss(result.loss, result.per_loop, result.statistics)


def readout_logits(model: LoopedDecoder, state: Tensor, *, final: bool = True) -> Tensor:
    """Logits [..., V] of one state [..., d]: the readout's norm, then the head.

    final: whether this is the last loop; the `final-only` readout normalises no other.
    """
    norm = model.readout_norm
    if norm is not None and (final or model.config.readout != "final-only"):
        state = norm(state)
    with product_autocast(state) if model.fused else contextlib.nullcontext():
        return F.linear(state, model.head_weight)


@torch.no_grad()
def evaluation_losses(model: LoopedDecoder, states: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every token at every loop, [K, B, T] fp32, 0 where the target is -100.

    Every loop is read as if it were the last (so `final-only` uses its norm): what a model that stops there loses.
    Raises as `looped_loss` does.
    """
    _check_arguments(states, targets)
    if not model.fused:
        return torch.stack([_cross_entropy(readout_logits(model, state), targets).float() for state in states])
    norm_weight, norm_bias = _norm_parameters(model)
    result = readout_statistics(
        states,
        model.head_weight,
        targets,
        readout="rmsnorm" if model.config.readout == "final-only" else model.config.readout,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=model.config.norm_eps,
        ignore_index=IGNORE_INDEX,
    )
    assert result.loss is not None  # targets were given
    return result.loss


def _check_arguments(states: Sequence[Tensor], targets: Tensor, penalty: float | Tensor = 0.0) -> None:
    if len(states) < 1:
        raise ValueError("states must hold the states of at least one loop. Got none.")
    shapes = {state.shape for state in states}
    if len(shapes) > 1 or targets.shape != states[0].shape[:-1]:
        raise ValueError(
            "states must have one shape [..., d] and targets the shape [...]. "
            f"Got states {[list(shape) for shape in shapes]}, targets {list(targets.shape)}."
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64. Got {targets.dtype}.")
    if not isinstance(penalty, Tensor) and not penalty >= 0:
        raise ValueError(f"penalty must be at least 0. Got penalty={penalty}.")


def _norm_parameters(model: LoopedDecoder) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the readout's norm, None where it has none."""
    norm = model.readout_norm
    if norm is None:
        return None, None
    return norm.weight, norm.bias if isinstance(norm, torch.nn.LayerNorm) else None


def _plain_loss(
    model: LoopedDecoder,
    states: Sequence[Tensor],
    targets: Tensor,
    weights: list[float],
    penalty: float | Tensor,
    statistics: bool,
    n_targets: int | Tensor | None,
) -> LoopedLoss:
    if n_targets is None:
        n_targets = _target_count(targets)
    loss = torch.zeros((), device=targets.device)
    per_loop = torch.full((len(states),), torch.nan, device=targets.device)
    for loop, (state, weight) in enumerate(zip(states, weights, strict=True)):
        if weight != 0:
            logits = readout_logits(model, state, final=loop == len(states) - 1)
            loop_loss = _cross_entropy(logits, targets).sum() / n_targets
            loss = loss + weight * loop_loss
            per_loop[loop] = loop_loss.detach()
    if isinstance(penalty, Tensor) or penalty > 0:
        loss = loss + penalty * torch.stack([_mean_square(state).mean() for state in states]).mean()
    return LoopedLoss(loss, per_loop, _plain_statistics(model, states, targets, weights) if statistics else None)


def _plain_statistics(
    model: LoopedDecoder, states: Sequence[Tensor], targets: Tensor, weights: list[float]
) -> LoopedStatistics:
    """What `looped_cross_entropy` measures, from all logits of one loop at a time; nan (top1: -1) for unread loops."""
    shape = (len(states), *targets.shape)
    measured = {name: torch.full(shape, torch.nan, device=targets.device) for name in LoopedStatistics._fields}
    measured["top1"] = torch.full(shape, -1, device=targets.device)
    need_radial = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    for loop, (state, weight) in enumerate(zip(states, weights, strict=True)):
        if weight == 0:
            continue
        with torch.set_grad_enabled(need_radial):
            state = state.detach().requires_grad_(need_radial)
            logits = readout_logits(model, state, final=loop == len(states) - 1)
            losses = _cross_entropy(logits, targets)
        of_loop = _row_statistics(_wide(logits.detach()), losses.detach(), state.detach())
        if need_radial:
            of_loop |= _radial(state, weight * losses.sum() / _target_count(targets))
        for name, values in of_loop.items():
            measured[name][loop] = values
    result = LoopedStatistics(**measured)
    return result if need_radial else result._replace(radial_dot=None, radial_fraction=None)


def _row_statistics(logits: Tensor, losses: Tensor, state: Tensor) -> dict[str, Tensor]:
    log_p = logits.log_softmax(-1)
    top = F.pad(logits, (0, 1), value=-torch.inf).topk(2)  # padded: the margin of a vocabulary of 1 is infinite
    return {
        "loss": losses,
        "lse": logits.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "margin": top.values[..., 0] - top.values[..., 1],
        "top1": top.indices[..., 0],
        "mean_square": _mean_square(state),
    }


def _radial(state: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """`<g, h>` and `|<g, h>| / (|g| |h|)` of every row h of the state, with `g = dloss/dh`; 0 where g or h is 0."""
    h, g = _wide(state.detach()), _wide(torch.autograd.grad(loss, state)[0])
    dot = (g * h).sum(-1)
    norms = g.norm(dim=-1) * h.norm(dim=-1)
    return {"radial_dot": dot, "radial_fraction": torch.where(norms == 0, 0.0, dot.abs() / norms)}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[...], at least fp32, 0 where ignored."""
    rows = _wide(logits).flatten(0, -2)
    return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(targets.shape)


def _target_count(targets: Tensor) -> Tensor:
    # At least 1, so that a batch of ignored targets has loss 0 and gradient 0, not nan.
    return (targets != IGNORE_INDEX).sum().clamp(min=1)


def _mean_square(state: Tensor) -> Tensor:
    return _wide(state).square().mean(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
