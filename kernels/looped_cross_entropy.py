"""`looped_cross_entropy`: the loss of K states through one head, its registration and its public function.

The equations stand in kernels/readout.py.  One op does the work.  Its output `total` carries gradients that were
formed in the forward pass; its output `ce`, the row losses, is differentiable too, by running the pass again with
the upstream gradient for weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import (
    as_rows,
    check_options,
    check_range,
    check_readout,
    check_tensors,
    check_vector,
    check_weights,
    gathered,
)
from .device import accumulator, autocast_dtype, cpu_blocks, product_dtype
from .readout import Readout, default_chunk_rows, head_accumulator, loops_of, normed_rows, read_out
from .readout_backward import (
    differentiated_loops,
    needs_dy,
    radial_sums,
    states_and_norm_backward,
)
from .row_loss import LossOptions, RowResults, cross_entropy_reference
from .row_norm import norm_forward
from .weighted_loss import loop_weights, loss_sums, loss_weights


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


def looped_cross_entropy_reference(
    states: Tensor | Sequence[Tensor],
    head: Tensor,
    targets: Tensor,
    *,
    readout: Readout = "rmsnorm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    penalty: float = 0.0,
    weights: Tensor | Sequence[float] | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """`looped_cross_entropy` in plain PyTorch, all logits in memory: the definition of `loss` and `per_loop`."""
    wide = accumulator(states[0].dtype)
    options = LossOptions(ignore_index, label_smoothing, softcap, z_loss)
    losses, squares = [], []
    for loop, state in enumerate(states):
        norm = readout if readout != "final-only" else "rmsnorm" if loop == len(states) - 1 else "raw"
        h = state.to(wide)
        squares.append(h.square().mean() if h.numel() else h.sum())
        if norm == "layernorm":
            h = h - h.mean(-1, keepdim=True)
        if norm != "raw":
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
            h = h if norm_weight is None else h * norm_weight
            h = h if norm_bias is None else h + norm_bias
        logits = (h.to(state.dtype) @ head.t()).flatten(0, -2)
        losses.append(cross_entropy_reference(logits, targets.flatten(), bias, options).loss.view(targets.shape))
    ce = torch.stack(losses)
    if weights is None:
        weights = [1 / len(ce)] * len(ce)
    weighting = torch.as_tensor(weights, dtype=wide)
    weighting = weighting.reshape(weighting.shape + (1,) * (ce.dim() - weighting.dim()))
    n = (targets != ignore_index).sum().clamp(min=1)
    per_loop = ce.flatten(1).sum(1) / n
    if reduction == "none":
        return weighting * ce, per_loop
    total = (weighting * ce).sum() / (n if reduction == "mean" else 1)
    return total + penalty * torch.stack(squares).mean(), per_loop


# The op ---------------------------------------------------------------------------------------------------------------
# Outputs: total [], per_loop [A] and ce [A, N], the scales' factors [3], the gradients of head and bias, the row
# statistics [6, A, N] (lse, entropy, margin, mean square, radial dot, radial fraction), top1 [A, N], and dy [A N, d],
# the gradient of the normed rows; A = len(active) loops are read.  What is not asked for is an empty vector.  The
# gradients are what was added up, in the scales' units: the backward pass multiplies upstream gradient and unit to
# them, rounds once, and takes dy through the norm.


def _of_loops(values: Tensor, active: list[int]) -> Tensor:
    """values [K, N] of the active loops; not by an index, whose copy to a GPU the host would wait for."""
    return values if len(active) == len(values) else torch.cat([values[:0], *(values[k : k + 1] for k in active)])


def _row_statistics(rows: RowResults, mean_square: Tensor, radial: Tensor, active: list[int], d: int) -> Tensor:
    """[6, A, N] of the op's outputs, from the row results and what was summed of all loops [K, N]."""
    shape = (len(active), mean_square.shape[1])
    (dot, grad_square), mean_square = (_of_loops(x, active) for x in radial), _of_loops(mean_square, active)
    norms = grad_square.sqrt() * (mean_square * d).sqrt()
    fraction = torch.where(norms == 0, 0.0, dot.abs() / norms)
    per_row = [column.view(shape) for column in (rows.lse, rows.entropy, rows.margin) if column is not None]
    return torch.stack([*per_row, mean_square, dot, fraction])


def _head_gradients(head: Tensor, needs: list[bool], compute_dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Space for the gradients of head and bias that are needed; the first chunk writes over it."""
    dhead = head_accumulator(head, compute_dtype) if needs[0] else None
    return dhead, head.new_empty(head.shape[0], dtype=accumulator(head.dtype)) if needs[3] else None


@torch.library.custom_op("looped::cross_entropy", mutates_args=())
def _cross_entropy(
    states: list[Tensor], head: Tensor, targets: Tensor, weights: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, bias: Tensor | None, active: list[int], need_states: list[bool], needs: list[bool],
    statistics: bool, readout: str, eps: float, penalty: float, mean: bool, ignore_index: int, label_smoothing: float,
    softcap: float | None, z_loss: float, chunk_rows: int, compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    targets, loops = targets.contiguous(), loops_of(states)
    norm_weight, norm_bias, bias = (None if v is None else v.contiguous() for v in (norm_weight, norm_bias, bias))
    n_loops, (n_tokens, d) = len(loops), loops[0].shape
    n_rows = len(active) * n_tokens
    wide = accumulator(head.dtype)

    def buffer(*shape: int) -> Tensor:
        return head.new_empty(shape, dtype=wide)

    scales = loss_weights(
        targets, weights, head.shape[0], ignore_index=ignore_index, mean=mean,
        dmean_square=penalty / max(1, n_loops * n_tokens),
    )  # fmt: skip
    check_range(targets, head.shape[0], ignore_index, scales.in_range)
    dhead, dbias = _head_gradients(head, needs, compute_dtype)
    if weights is None or n_rows == 0:  # no chunk will write over them
        dhead, dbias = (None if gradient is None else gradient.zero_() for gradient in (dhead, dbias))
    differentiated = differentiated_loops(states, need_states, active, penalty)
    need_dy = weights is not None and needs_dy(readout, n_loops, active, differentiated, needs)
    rows = RowResults(buffer(n_rows))
    if statistics:
        top1 = head.new_empty(n_rows, dtype=torch.int64)
        rows = RowResults(rows.loss, buffer(n_rows), buffer(n_rows), buffer(n_rows), top1)
    mean_square = buffer(n_loops, n_tokens) if statistics or penalty > 0 else None

    dtype = product_dtype(head, compute_dtype)
    with torch.autocast(head.device.type, enabled=False):
        y = normed_rows(
            loops, active, norm_weight, norm_bias, readout=readout, eps=eps, dtype=dtype, mean_square=mean_square
        )
        if mean_square is not None:
            for loop in set(range(n_loops)) - set(active):  # not read, but penalised
                norm_forward(loops[loop], None, None, eps=0.0, norm="none", mean_square=mean_square[loop])
        read_out(
            y, head.to(dtype), targets, bias, LossOptions(ignore_index, label_smoothing, softcap, z_loss), chunk_rows,
            rows, omega=scales.omega if need_dy or needs[0] or needs[3] else None, dhead=dhead, dbias=dbias,
            need_dy=need_dy,
        )  # fmt: skip
    dy = y if need_dy else y.new_empty(0)

    ce = rows.loss.view(len(active), n_tokens)
    total, per_loop = loss_sums(ce, scales, mean_square if penalty > 0 else None, penalty)
    stats, top1 = head.new_empty(0, dtype=wide), head.new_empty(0, dtype=torch.int64)
    if statistics and mean_square is not None and rows.top1 is not None:
        read = differentiated if need_dy else []
        radial = radial_sums(dy, loops, read, active, norm_weight, norm_bias, readout, eps, scales.reference)
        stats, top1 = _row_statistics(rows, mean_square, radial, active, d), rows.top1.view(len(active), n_tokens)
    dhead = head.new_empty(0) if dhead is None else dhead
    dbias = head.new_empty(0) if dbias is None else dbias
    return total, per_loop, ce, scales.factors, dhead, dbias, stats, top1, dy


@_cross_entropy.register_fake
def _(
    states, head, targets, weights, norm_weight, norm_bias, bias, active, need_states, needs, statistics, readout,
    eps, penalty, mean, ignore_index, label_smoothing, softcap, z_loss, chunk_rows, compute_dtype,
):  # fmt: skip
    wide = accumulator(head.dtype)
    shape = (len(active), targets.shape[0])
    formed = [head.new_empty(0) if g is None else g for g in _head_gradients(head, needs, compute_dtype)]
    differentiated = differentiated_loops(states, need_states, active, penalty)
    n_loops, (n_tokens, d) = len(states[0] if states[0].dim() == 3 else states), states[0].shape[-2:]
    need_dy = weights is not None and needs_dy(readout, n_loops, active, differentiated, needs)
    dtype = product_dtype(head, compute_dtype)
    dy = states[0].new_empty((len(active) * n_tokens, d) if need_dy else 0, dtype=dtype)
    stats = head.new_empty((6, *shape) if statistics else 0, dtype=wide)
    top1 = head.new_empty(shape if statistics else 0, dtype=torch.int64)
    return *(head.new_empty(size, dtype=wide) for size in ((), shape[:1], shape, 3)), *formed, stats, top1, dy


@torch.library.custom_op("looped::scaled", mutates_args=())
def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale [], the product formed in float32 and rounded once; a new tensor, whatever the scale."""
    if scale.is_cuda:  # one element, not a scalar: a scalar tensor would be rounded to the gradient's dtype first
        out = torch.empty_like(gradient, dtype=dtype)
        return torch.mul(gradient, scale.view((1,) * gradient.dim()), out=out)
    out = torch.empty(gradient.shape, dtype=dtype)
    for rows in cpu_blocks(gradient.shape[0], 2 * gradient.nbytes // max(1, gradient.shape[0])):
        torch.mul(gradient[rows], scale.item(), out=out[rows])  # in float32, whatever the dtype of `out`
    return out


@_scaled.register_fake
def _(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    states, head, targets, weights, norm_weight, norm_bias, bias, *ctx.options = inputs
    total, per_loop, ce, factors, dhead, dbias, statistics, top1, dy = output
    ctx.set_materialize_grads(False)
    ctx.n_states, ctx.dtypes = len(states), (head.dtype, None if bias is None else bias.dtype)
    ctx.weights_shape = None if weights is None else weights.shape  # with weights `total` is differentiated, else ce
    other = total if weights is None else ce
    ctx.mark_non_differentiable(other, per_loop, factors, dhead, dbias, statistics, top1, dy)
    ctx.save_for_backward(
        norm_weight,
        norm_bias,
        *((head, targets, bias) if weights is None else (ce, factors, dhead, dbias, dy)),
        *states,
    )


def _again(
    ctx,
    dce: Tensor,
    states: list[Tensor],
    head: Tensor,
    targets: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
) -> tuple[list[Tensor], list[bool], list[bool]]:
    """The gradients of sum dce * ce, by the same pass with dce for weights; which states and parameters need them."""
    active, _, _, _, readout, eps, _, _, *loss_options, chunk_rows, compute_dtype = ctx.options
    wanted = ctx.needs_input_grad
    need_states = [bool(w) for w in wanted[0]] if isinstance(wanted[0], (list, tuple)) else [wanted[0]] * len(states)
    needs = [bool(wanted[i]) for i in (1, 4, 5, 6)]
    _, _, ce, factors, dhead, dbias, _, _, dy = _cross_entropy(
        states, head, targets, dce.to(accumulator(head.dtype)), norm_weight, norm_bias, bias, active, need_states,
        needs, False, readout, eps, 0.0, False, *loss_options, chunk_rows, compute_dtype,
    )  # fmt: skip
    return [ce, factors, dhead, dbias, dy], need_states, needs


def _backward(ctx, dtotal, _, dce, *__):
    none = (None,) * len(ctx.options)
    if dtotal is None and dce is None:
        return [None] * ctx.n_states, *((None,) * 6), *none
    active, need_states, needs, _, readout, eps, penalty, mean, *_ = ctx.options
    norm_weight, norm_bias, *saved = ctx.saved_tensors
    if ctx.weights_shape is None:
        head, targets, bias, *states = saved
        formed, need_states, needs = _again(ctx, dce, states, head, targets, norm_weight, norm_bias, bias)
        (ce, factors, dhead, dbias, dy), penalty = formed, 0.0
    else:
        ce, factors, dhead, dbias, dy, *states = saved
        factors = factors * dtotal
    dweights = None
    if ctx.needs_input_grad[3]:
        dweights = (ce * (factors[1] if mean else dtotal)).sum_to_size(ctx.weights_shape)
    dnorm_weight, dnorm_bias, dstates = states_and_norm_backward(
        states, dy, norm_weight, norm_bias, factors, active, need_states, needs, readout, eps, penalty
    )
    of_head, of_bias = (
        _scaled(gradient, factors[0], dtype) if need else None
        for gradient, dtype, need in zip((dhead, dbias), ctx.dtypes, (needs[0], needs[3]), strict=True)
    )
    differentiated = differentiated_loops(states, need_states, active, penalty)
    of_states: list[Tensor | None] = [None] * ctx.n_states
    if states[0].dim() == 3:
        of_states = [dstates] if differentiated else [None]
    else:
        for row, loop in enumerate(differentiated):
            of_states[loop] = dstates[row]
    return (
        of_states, of_head, None, dweights, dnorm_weight if needs[1] else None, dnorm_bias if needs[2] else None,
        of_bias, *none,
    )  # fmt: skip


torch.library.register_autograd("looped::cross_entropy", _backward, setup_context=_setup_context)


# The public function --------------------------------------------------------------------------------------------------


def _spread(values: Tensor, active: list[int], n_loops: int, shape: torch.Size, fill: float) -> Tensor:
    """Row results [A, N] as [K, ...], `fill` for the loops that were not read."""
    if len(active) < n_loops:
        spread = values.new_full((n_loops, values.shape[-1]), fill)
        for row, loop in enumerate(active):  # not by an index, whose copy to a GPU the host would wait for
            spread[loop] = values[row]
        values = spread
    return values.view(n_loops, *shape)


def looped_cross_entropy(
    states: Tensor | Sequence[Tensor],
    head: Tensor,
    targets: Tensor,
    *,
    readout: Readout = "rmsnorm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    penalty: float = 0.0,
    weights: Tensor | Sequence[float] | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    statistics: bool = False,
    chunk_rows: int | None = None,
) -> LoopedCrossEntropy:
    """The whole per-loop readout of a looped language model, fused: norm, norm penalty, logits, cross-entropy.

        CE[k, t] = cross_entropy(softcap(norm(h[k, t]) @ head.T + bias), targets[t])
        mean:  sum_{k, t} w[k, t] CE[k, t] / n + penalty * mean_{k, t, channels} h^2     (n: tokens not ignored)
        sum:   the same without / n;    none: w * CE, [K, ...], 0 where ignored

    Memory beyond inputs and outputs is one chunk of logits, one float32 dW, both whatever K, and the normed rows, whose
    place their gradient takes; the products of all gradients that somebody needs are formed in the forward pass.
    kernels/README.md has the derivations.

    Args:
        states: the hidden states H_1..H_K before the readout norm: one tensor [K, ..., d] or a sequence of K tensors
            [..., d] (not copied into one).  float32, bfloat16, float16; under autocast the products run in its dtype.
        head: [V, d], of the states' dtype outside autocast; sharded parameters (DTensor, FSDP2) are gathered.
        targets: [...] int64, shared by all loops.
        readout: "rmsnorm"; "layernorm"; "raw" (no norm); "final-only" (no norm before loop K, RMSNorm at K).
        norm_weight, norm_bias: [d], the norm's parameters; the bias is LayerNorm's.
        eps: the norm's.
        penalty: lambda >= 0 of the norm penalty, on the states before the norm, all K loops and all tokens.
        weights: None: 1/K for every loop. A tensor [K] or [K, ...], differentiable: dL/dw[k, t] = CE[k, t] / n. A
            sequence of K numbers: a loop whose number is 0 is not read at all, so terminal supervision,
            `weights=[0, ..., 0, 1]`, costs one readout.
        bias: [V], added to the logits.
        ignore_index: tokens with this target have CE = 0 and no gradient (but their states are penalised).
            All ignored: loss 0 and gradients 0, up to the penalty's.
        label_smoothing, z_loss: CE = (1 - s) nll + s * mean_j(-log p_j) + z_loss * lse^2.
        softcap: c > 0: logits become c * tanh(logits / c).
        reduction: "mean", "sum" or "none" (which takes any upstream gradient, at the price of a second forward pass
            in the backward).
        statistics: return LoopedStatistics from the same pass, at no extra product.
        chunk_rows: rows (tokens x loops) whose logits are in memory at once; None: chosen from the shapes.

    Returns:
        `loss`: [] (or [K, ...] for "none") float32; `per_loop`: [K] float32, detached, mean CE of every loop over the
        tokens that are not ignored, nan for loops that were not read; `statistics`: LoopedStatistics or None.

    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape, device or range than stated; a target
            outside [0, V) (on a GPU an assertion on the device, which does not wait).
    """
    head, norm_weight, norm_bias, bias = gathered(head), gathered(norm_weight), gathered(norm_bias), gathered(bias)
    rows, shape = as_rows(states)
    compute_dtype = autocast_dtype(rows[0])
    check_tensors(rows, shape, head, targets)
    check_readout(readout, norm_weight, norm_bias, eps, rows[0])
    check_options(penalty, label_smoothing, softcap, z_loss, reduction, chunk_rows, ignore_index)
    n_loops = len(rows) if rows[0].dim() == 2 else rows[0].shape[0]
    check_weights(weights, n_loops, shape, rows[0])
    check_vector("bias", bias, rows[0], head.shape[0])

    by_hand = weights is not None and not isinstance(weights, Tensor)
    active = [k for k in range(n_loops) if not (by_hand and weights[k] == 0)]  # type: ignore[index]
    targets = targets.reshape(-1).long()
    wide = accumulator(head.dtype)
    weighting = loop_weights(weights, active, n_loops, head, wide)
    eager = reduction != "none"

    def needed(tensor: Tensor | None) -> bool:
        return eager and torch.is_grad_enabled() and tensor is not None and tensor.requires_grad

    total, mean_ce, ce, _, _, _, row_statistics, top1, _ = _cross_entropy(
        rows, head, targets, weighting if eager else None, norm_weight, norm_bias, bias, active,
        [needed(state) for state in rows], [needed(t) for t in (head, norm_weight, norm_bias, bias)], statistics,
        readout, eps, penalty, reduction == "mean", ignore_index, label_smoothing, softcap, z_loss,
        chunk_rows or default_chunk_rows(head, compute_dtype), compute_dtype,
    )  # fmt: skip
    detached = ce.detach()
    per_loop = _spread(mean_ce.unsqueeze(1), active, n_loops, torch.Size(()), torch.nan).view(n_loops)
    loss = total if eager else _spread(weighting * ce, active, n_loops, shape, 0.0)
    if not statistics:
        return LoopedCrossEntropy(loss, per_loop, None)
    measured = (detached, *row_statistics.detach().unbind(0))
    columns = [_spread(column, active, n_loops, shape, torch.nan) for column in measured]
    cross_entropy, lse, entropy, margin, mean_square, dot, fraction = columns
    radial = (dot, fraction) if any(needed(state) for state in rows) else (None, None)
    best = _spread(top1, active, n_loops, shape, -1)
    return LoopedCrossEntropy(
        loss, per_loop, LoopedStatistics(cross_entropy, lse, entropy, margin, best, mean_square, *radial)
    )
