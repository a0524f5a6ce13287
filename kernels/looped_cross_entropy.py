"""`looped_cross_entropy`: the loss of K states through one head. Its definition and its public function.

The equations and the op stand in kernels/readout.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    Readout,
    States,
    as_rows,
    check_options,
    check_readout,
    check_tensors,
    check_vector,
    check_weights,
    gathered,
)
from .cross_entropy import LossOptions, loss_reference, statistics_reference
from .device import accumulator, autocast_dtype, product_dtype
from .products import default_chunk_rows
from .radial import radial_gradient_reference
from .readout import read_out
from .readout_call import PARAMETERS, ReadoutCall, ReadoutResults, ReadoutTensors
from .row_weights import loop_weights
from .vocabulary_shard import VocabularyShard, rows_here


class LoopedStatistics(NamedTuple):
    """What the readout saw of every loop and token, each [K, ...] float32 and detached; nan for unread loops.

    loss: cross-entropy; lse: log of the softmax's denominator; entropy: of the predicted distribution, in nats;
    margin: largest minus second largest logit; top1: the largest logit's id (int64; -1 for unread loops);
    mean_square: of the state before its norm; radial_dot, radial_fraction: <g, h> and |<g, h>| / (|g| |h|) of
    g = dL/dh, the immediate gradient of the cross-entropy part of the loss (None where no state needs a gradient and
    for reduction="none"; nan for detached states).
    """

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    margin: Tensor
    top1: Tensor
    mean_square: Tensor
    radial_dot: Tensor | None
    radial_fraction: Tensor | None


class LoopedCrossEntropy(NamedTuple):
    """The result of `looped_cross_entropy`."""

    loss: Tensor
    per_loop: Tensor
    statistics: LoopedStatistics | None


def normed(
    state: Tensor, readout: Readout, weight: Tensor | None, bias: Tensor | None, eps: float, *, final: bool = True
) -> Tensor:
    """norm(h) of a loop's state h [..., d] in plain PyTorch, at least in float32. final: it is the last loop's."""
    h, size = state.to(accumulator(state.dtype)), state.shape[-1:]
    weight, bias = (None if p is None else p.to(h.dtype) for p in (weight, bias))
    if readout == "layernorm":
        return F.layer_norm(h, size, weight, bias, eps)
    if readout == "rmsnorm" or (readout == "final-only" and final):
        return F.rms_norm(h, size, weight, eps)
    return h


def looped_cross_entropy_reference(
    states: States,
    head: Tensor,
    targets: Tensor,
    *,
    readout: Readout = "rmsnorm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    penalty: float | Tensor = 0.0,
    weights: Tensor | Sequence[float] | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float | Tensor = 0.0,
    reduction: str = "mean",
    n_targets: float | Tensor | None = None,
    statistics: bool = False,
) -> LoopedCrossEntropy:
    """`looped_cross_entropy` in plain PyTorch, all logits of a loop in memory: its definition. Checks no argument."""
    n_loops, wide, device = len(states), accumulator(states[0].dtype), head.device
    options = LossOptions(ignore_index, label_smoothing, softcap, _scalar(z_loss, head, wide), bias)
    weights = [1 / n_loops] * n_loops if weights is None else weights
    n = _target_count(targets, ignore_index, n_targets)

    def rows(state: Tensor, loop: int) -> tuple[Tensor, Tensor]:
        """CE [...] of a loop and its logits after bias and softcap, [..., V]."""
        y = normed(state, readout, norm_weight, norm_bias, eps, final=loop == n_loops - 1).to(state.dtype)
        logits = F.linear(y, head.to(state.dtype))
        ce, z = loss_reference(logits.flatten(0, -2), targets.flatten().long(), options)
        return ce.view(targets.shape), z.view(logits.shape)

    def share(ce: Tensor, loop: int) -> Tensor:
        """What a loop adds to the loss: [], or [...] for reduction="none"."""
        weight = weights[loop].to(wide) if isinstance(weights, Tensor) else weights[loop]
        if reduction == "none":
            return _weighted(weight, ce)
        divisor = n if reduction == "mean" else 1
        if isinstance(weight, Tensor) and weight.dim() > 0:
            return _weighted(weight, ce).sum() / divisor
        return _weighted(weight, ce.sum() / divisor)

    def gradient(loop: int) -> Tensor:
        """That of the loop's part of the loss with respect to its state."""
        h = states[loop].detach().requires_grad_()
        return torch.autograd.grad(share(rows(h, loop)[0], loop), h)[0]

    active = [k for k in range(n_loops) if isinstance(weights, Tensor) or weights[k] != 0]
    per_loop = torch.full((n_loops,), torch.nan, dtype=wide, device=device)
    shares = [torch.zeros(targets.shape if reduction == "none" else (), dtype=wide, device=device)] * n_loops
    radial = [reduction != "none" and torch.is_grad_enabled() and state.requires_grad for state in states]
    measured = _unread(states, radial=any(radial)) if statistics else None
    for k in active:
        ce, z = rows(states[k], k)
        per_loop[k] = ce.detach().sum() / n
        shares[k] = share(ce, k)
        if measured is not None:
            _see(measured, k, states[k].detach(), ce.detach(), z.detach(), gradient(k) if radial[k] else None)
    if reduction == "none":
        return LoopedCrossEntropy(torch.stack(shares), per_loop, measured)
    loss = sum(shares[1:], start=shares[0])
    penalty_ = _scalar(penalty, head, wide)
    if penalty_ is not None:
        loss = loss + penalty_ * mean_square(states)
    return LoopedCrossEntropy(loss, per_loop, measured)


def _target_count(targets: Tensor, ignore_index: int, n_targets: float | Tensor | None) -> Tensor:
    """By what a mean divides, []: at least 1, so that a batch of ignored targets has loss 0 and not nan."""
    n = (targets != ignore_index).sum() if n_targets is None else torch.as_tensor(n_targets, device=targets.device)
    return torch.where(n > 0, n, 1)


def mean_square(states: States) -> Tensor:
    """The mean over loops, tokens and channels of h^2, [], at least float32; 0 for no token."""
    squares = [state.to(accumulator(state.dtype)).square() for state in states]
    return torch.stack([square.mean() if square.numel() else square.sum() for square in squares]).mean()


def _unread(states: States, *, radial: bool) -> LoopedStatistics:
    """The statistics [K, ...] of loops that are not read.  radial: with those of a gradient."""
    shape, dtype, device = (len(states), *states[0].shape[:-1]), accumulator(states[0].dtype), states[0].device
    loss, lse, entropy, margin, square, dot, fraction = torch.full((7, *shape), torch.nan, dtype=dtype, device=device)
    top1 = torch.full(shape, -1, device=device)
    return LoopedStatistics(loss, lse, entropy, margin, top1, square, *((dot, fraction) if radial else (None, None)))


def _see(measured: LoopedStatistics, loop: int, h: Tensor, ce: Tensor, z: Tensor, gradient: Tensor | None) -> None:
    """Write what the readout of a loop saw: of its states h, losses ce, logits z and, where it is given, gradient."""
    seen = [ce, *statistics_reference(z), h.to(accumulator(h.dtype)).square().mean(-1)]
    if gradient is not None:
        radial = radial_gradient_reference(h, gradient)
        seen += [radial.dot, radial.fraction]
    for column, value in zip(measured, seen, strict=False):
        if column is not None:
            column[loop] = value


def _weighted(row_weight: Tensor | float, ce: Tensor) -> Tensor:
    """row_weight * ce, and 0 where a row of weight 0 has a loss that is not finite."""
    product = row_weight * ce
    if not isinstance(row_weight, Tensor):
        return product
    return torch.where((row_weight == 0) & ~ce.isfinite(), 0.0, product)


# The public function --------------------------------------------------------------------------------------------------


def _spread(values: Tensor, active: Sequence[int], n_loops: int, shape: torch.Size, fill: float) -> Tensor:
    """Row results [A, N] as [K, ...], `fill` for the loops that were not read."""
    if len(active) < n_loops:
        spread = values.new_full((n_loops, values.shape[-1]), fill)
        for row, loop in enumerate(active):  # not by an index, whose copy to a GPU the host would wait for
            spread[loop] = values[row]
        values = spread
    return values.view(n_loops, *shape)


def _scalar(value: float | Tensor, like: Tensor, wide: torch.dtype, zero: bool = False) -> Tensor | None:
    """The option `value` as a detached tensor [] on the device of `like`; None for the number 0, unless `zero`."""
    if isinstance(value, Tensor):
        return value.detach().to(wide)
    return None if value == 0 and not zero else torch.full((), value, dtype=wide, device=like.device)


def _statistics_of(
    results: ReadoutResults, active: Sequence[int], n_loops: int, shape: torch.Size, *, radial: bool
) -> LoopedStatistics:
    measured = [_spread(c, active, n_loops, shape, torch.nan) for c in (results.ce.detach(), *results.statistics)]
    cross_entropy, lse, entropy, margin, mean_square, dot, fraction = measured
    best = _spread(results.top1, active, n_loops, shape, -1)
    of_gradient = (dot, fraction) if radial else (None, None)
    return LoopedStatistics(cross_entropy, lse, entropy, margin, best, mean_square, *of_gradient)


def looped_cross_entropy(
    states: States,
    head: Tensor,
    targets: Tensor,
    *,
    readout: Readout = "rmsnorm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    penalty: float | Tensor = 0.0,
    weights: Tensor | Sequence[float] | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float | Tensor = 0.0,
    reduction: str = "mean",
    n_targets: float | Tensor | None = None,
    statistics: bool = False,
    chunk_rows: int | None = None,
    shard: VocabularyShard | None = None,
) -> LoopedCrossEntropy:
    """The whole per-loop readout of a looped language model, fused: norm, norm penalty, logits, cross-entropy.

        CE[k, t] = cross_entropy(softcap(norm(h[k, t]) @ head.T + bias), targets[t])
        mean:  sum_{k, t} w[k, t] CE[k, t] / n + penalty * mean_{k, t, channels} h^2
        sum:   the same without / n;    none: w * CE, [K, ...], 0 where ignored

    Memory beyond inputs and outputs is one chunk of logits, one float32 dW, both whatever K, and the normed rows, whose
    place their gradient takes; the products of all gradients that somebody needs are formed in the forward pass.
    kernels/README.md has the derivations.

    Args:
        states: the hidden states H_1..H_K before the readout norm: one tensor [K, ..., d] or a sequence of K tensors
            [..., d] (not copied into one).  float32, bfloat16, float16; under autocast the products run in its dtype.
        head: [V, d], of any floating dtype. Outside autocast the products run in the states' dtype; the head's gradient
            has the head's. Sharded parameters (DTensor, FSDP2) are gathered.
        targets: [...] int64, shared by all loops.
        readout: "rmsnorm"; "layernorm"; "raw" (no norm); "final-only" (no norm before loop K, RMSNorm at K).
        norm_weight, norm_bias: [d], the norm's parameters; the bias is LayerNorm's.
        eps: the norm's.
        penalty: lambda >= 0 of the norm penalty, on the states before the norm, all K loops and all tokens. A number,
            or a tensor [], whose value may change without a new compiled graph; it gets no gradient.
        weights: None: 1/K for every loop. A tensor [K] or [K, ...], differentiable: dL/dw[k, t] = CE[k, t] / n. A
            sequence of K numbers: a loop whose number is 0 is not read at all, so terminal supervision,
            `weights=[0, ..., 0, 1]`, costs one readout.
        bias: [V], added to the logits.
        ignore_index: tokens with this target have CE = 0 and no gradient (but their states are penalised).
            All ignored: loss 0 and gradients 0, up to the penalty's.
            A token whose weight is exactly 0 adds 0, even if its loss is inf or nan.
        label_smoothing, z_loss: CE = (1 - s) nll + s * mean_j(-log p_j) + z_loss * lse^2. z_loss: as `penalty`.
        softcap: c > 0: logits become c * tanh(logits / c).
        reduction: "mean", "sum" or "none" (which takes any upstream gradient, at the price of a second forward pass
            in the backward).
        n_targets: n, a number or a tensor []; None: the number of tokens that are not ignored; at least 1 either way if
            that is 0. With gradient accumulation or several processes, give the count over all of them: then the losses
            and gradients of the parts add up to those of the whole. (The penalty does not depend on n: give each part
            its share of the tokens.)
        statistics: return LoopedStatistics from the same pass, at no extra product.
        chunk_rows: rows (tokens x loops) whose logits are in memory at once; None: chosen from the shapes.
        shard: head and bias are the rows of them that this process holds (`VocabularyShard.of(V)`), the others' being
            with the other processes of a group: no process ever has the whole head, its gradient or all logits of a
            row. All must call alike, with tokens of one number, the same options, n_targets and upstream gradient.
            Each gets the loss and statistics of its own tokens, and the gradients that data-parallel training would
            have: those of its states, and for its rows of head and bias the mean over the processes. n_targets None is
            the mean over the processes of their number of targets that are not ignored. A DTensor sharded by rows
            gives its local ones.

    Returns:
        `loss`: [] (or [K, ...] for "none") float32; `per_loop`: [K] float32, detached, sum of every loop's CE over n,
        nan for loops that were not read; `statistics`: LoopedStatistics or None.

    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape, device or range than stated; a target
            outside [0, V) (on a GPU an assertion on the device, which does not wait).
    """
    head, bias = rows_here("head", head, shard), rows_here("bias", bias, shard)
    norm_weight, norm_bias = gathered(norm_weight), gathered(norm_bias)
    rows, shape = as_rows(states)
    h = rows[0]
    check_tensors(rows, shape, head, targets)
    check_readout(readout, norm_weight, norm_bias, eps, h)
    check_options(
        h, penalty=penalty, label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss, reduction=reduction,
        n_targets=n_targets, chunk_rows=chunk_rows, ignore_index=ignore_index,
    )  # fmt: skip
    n_loops = len(rows) if h.dim() == 2 else h.shape[0]
    check_weights(weights, n_loops, shape, h)
    check_vector("bias", bias, h, head.shape[0])

    wide, compute_dtype = accumulator(h.dtype), autocast_dtype(h)
    by_hand = weights is not None and not isinstance(weights, Tensor)
    loops = tuple(range(n_loops))  # numbers even where a compiled graph has a symbol for K
    active = tuple(k for k in loops if not (by_hand and weights[k] == 0))  # type: ignore[index]
    row_weight, weight = loop_weights(weights, active, n_loops, h, wide)
    penalty_ = _scalar(penalty, h, wide)
    formed = reduction != "none" and torch.is_grad_enabled()
    wanted = [formed and state.requires_grad for state in rows] * (1 if h.dim() == 2 else n_loops)
    tensors = ReadoutTensors(
        head, targets.reshape(-1).long(), None if reduction == "none" else row_weight, norm_weight, norm_bias, bias,
        penalty=penalty_, z_loss=_scalar(z_loss, h, wide),
        n_targets=None if n_targets is None else _scalar(n_targets, h, wide, True),
    )  # fmt: skip
    parameters = ((name, getattr(tensors, name)) for name in PARAMETERS)
    call = ReadoutCall(
        readout=readout, eps=eps, n_loops=len(loops), active=active,
        differentiated=tuple(
            k for k in loops if wanted[k] and (h.dim() == 3 or penalty_ is not None or k in active)
        ),
        needs=tuple(name for name, p in parameters if formed and p is not None and p.requires_grad),
        penalised=penalty_ is not None, weight=weight, mean=reduction == "mean", ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap, statistics=statistics,
        chunk_rows=chunk_rows or default_chunk_rows(head.device, product_dtype(head, compute_dtype)),
        dtype=str(compute_dtype).removeprefix("torch."), shard=shard,
    )  # fmt: skip
    results = read_out(rows, tensors, call)
    per_loop = _spread(results.per_loop.unsqueeze(1), active, n_loops, torch.Size(()), torch.nan).view(n_loops)
    loss = results.total
    if reduction == "none":
        loss = _spread(_weighted(weight if row_weight is None else row_weight, results.ce), active, n_loops, shape, 0.0)
    measured = _statistics_of(results, active, n_loops, shape, radial=any(wanted)) if statistics else None
    return LoopedCrossEntropy(loss, per_loop, measured)
