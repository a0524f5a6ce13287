"""`looped_cross_entropy`: the loss of K states through one head, its registration and its public function.

The equations stand in kernels/readout.py.  One op does the work.  Its output `total` carries gradients that were
formed in the forward pass; its output `ce`, the row losses, is differentiable too, by running the pass again with
the upstream gradient for weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.arguments import (
    as_rows,
    check_options,
    check_range,
    check_readout,
    check_tensors,
    check_vector,
    check_weights,
    gathered,
)
from kernels.cross_entropy import LossOptions, RowResults, cross_entropy_reference
from kernels.device import accumulator, autocast_dtype, cpu_blocks, product_dtype
from kernels.readout import Readout, default_chunk_rows, head_accumulator, norm_arguments, normed_rows, read_out
from kernels.row_norm import norm_backward, norm_forward, partial_sums
from kernels.weighted_loss import loop_weights, loss_sums, loss_weights


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


def _loops(states: list[Tensor]) -> list[Tensor]:
    """The states of all loops [N, d], their last dimension contiguous."""
    loops = list(states[0].unbind(0)) if states[0].dim() == 3 else states
    return [state if state.stride(-1) == 1 else state.contiguous() for state in loops]


def _differentiated(states: list[Tensor], need_states: list[bool], active: list[int], penalty: float) -> list[int]:
    """The loops whose states' gradients are formed: of a stack all, of a sequence those that have one."""
    if states[0].dim() == 3:
        return list(range(len(states[0]))) if need_states[0] else []
    return [k for k, need in enumerate(need_states) if need and (penalty > 0 or k in active)]


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


def _norms(readout: str, n_loops: int, loops: Sequence[int]) -> bool:
    """Whether any of the loops is read out through a norm."""
    return any(norm_arguments(readout, loop, n_loops, None, None)[0] != "none" for loop in loops)


def _head_gradients(head: Tensor, needs: list[bool], compute_dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Space for the gradients of head and bias that are needed; the first chunk writes over it."""
    dhead = head_accumulator(head, compute_dtype) if needs[0] else None
    return dhead, head.new_empty(head.shape[0], dtype=accumulator(head.dtype)) if needs[3] else None


def _needs_dy(readout: str, n_loops: int, active: list[int], differentiated: list[int], needs: list[bool]) -> bool:
    """Whether the gradient of the normed rows is needed: for a state that is read, or the norm's parameters."""
    read = not set(active).isdisjoint(differentiated)
    return read or (any(needs[1:3]) and _norms(readout, n_loops, active))


def _radial_sums(
    dy: Tensor, loops: list[Tensor], differentiated: list[int], active: list[int], norm_weight: Tensor | None,
    norm_bias: Tensor | None, readout: str, eps: float, reference: Tensor,
) -> Tensor:  # fmt: skip
    """<g, h> and |g|^2 [2, K, N] of the cross-entropy's gradient g in every state; nan where it is not formed."""
    n_tokens = len(loops[0])
    radial = loops[0].new_full((2, len(loops), n_tokens), torch.nan, dtype=accumulator(dy.dtype))
    for row, loop in enumerate(active):
        if loop in differentiated:
            norm, weight, _ = norm_arguments(readout, loop, len(loops), norm_weight, norm_bias)
            norm_backward(
                dy[row * n_tokens : (row + 1) * n_tokens], loops[loop], weight, eps=eps, norm=norm, scale=reference,
                radial=radial[:, loop],
            )  # fmt: skip
    return radial


@torch.library.custom_op("looped::cross_entropy", mutates_args=())
def _cross_entropy(
    states: list[Tensor], head: Tensor, targets: Tensor, weights: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, bias: Tensor | None, active: list[int], need_states: list[bool], needs: list[bool],
    statistics: bool, readout: str, eps: float, penalty: float, mean: bool, ignore_index: int, label_smoothing: float,
    softcap: float | None, z_loss: float, chunk_rows: int, compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    targets, loops = targets.contiguous(), _loops(states)
    norm_weight, norm_bias, bias = (None if v is None else v.contiguous() for v in (norm_weight, norm_bias, bias))
    n_loops, (n_tokens, d) = len(loops), loops[0].shape
    n_rows = len(active) * n_tokens
    wide = accumulator(head.dtype)

    def buffer(*shape: int, fill: float | None = None) -> Tensor:
        return head.new_empty(shape, dtype=wide) if fill is None else head.new_full(shape, fill, dtype=wide)

    scales = loss_weights(
        targets, weights, head.shape[0], ignore_index=ignore_index, mean=mean,
        dmean_square=penalty / max(1, n_loops * n_tokens),
    )  # fmt: skip
    check_range(targets, head.shape[0], ignore_index, scales.in_range)
    dhead, dbias = _head_gradients(head, needs, compute_dtype)
    formed = weights is not None and n_rows > 0
    if not formed:
        for gradient in (dhead, dbias):
            if gradient is not None:
                gradient.zero_()
    differentiated = _differentiated(states, need_states, active, penalty)
    need_dy = formed and _needs_dy(readout, n_loops, active, differentiated, needs)
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
        for loop in set(range(n_loops)) - set(active) if mean_square is not None else ():  # penalised, not read
            norm_forward(loops[loop], None, None, eps=0.0, norm="none", mean_square=mean_square[loop])
        read_out(
            y, head.to(dtype), targets, bias, LossOptions(ignore_index, label_smoothing, softcap, z_loss), chunk_rows,
            rows, omega=scales.omega if need_dy or (formed and (needs[0] or needs[3])) else None,
            dhead=dhead if formed else None, dbias=dbias if formed else None, need_dy=need_dy,
        )  # fmt: skip
    dy = y if need_dy else y.new_empty(0)

    ce = rows.loss.view(len(active), n_tokens)
    total, per_loop = loss_sums(ce, scales, mean_square if penalty > 0 else None, penalty)
    stats, top1 = head.new_empty(0, dtype=wide), head.new_empty(0, dtype=torch.int64)
    if statistics and mean_square is not None and rows.top1 is not None:
        read = differentiated if need_dy else []
        radial = _radial_sums(dy, loops, read, active, norm_weight, norm_bias, readout, eps, scales.reference)
        stats, top1 = _row_statistics(rows, mean_square, radial, active, d), rows.top1.view(len(active), n_tokens)
    dhead, dbias = (head.new_empty(0) if gradient is None else gradient for gradient in (dhead, dbias))
    return total, per_loop, ce, scales.factors, dhead, dbias, stats, top1, dy


@_cross_entropy.register_fake
def _(
    states, head, targets, weights, norm_weight, norm_bias, bias, active, need_states, needs, statistics, readout,
    eps, penalty, mean, ignore_index, label_smoothing, softcap, z_loss, chunk_rows, compute_dtype,
):  # fmt: skip
    wide = accumulator(head.dtype)
    shape = (len(active), targets.shape[0])
    dhead, dbias = (
        head.new_empty(0) if gradient is None else gradient for gradient in _head_gradients(head, needs, compute_dtype)
    )
    differentiated = _differentiated(states, need_states, active, penalty)
    n_loops, (n_tokens, d) = len(states), states[0].shape[-2:]
    n_loops = len(states[0]) if states[0].dim() == 3 else n_loops
    need_dy = weights is not None and _needs_dy(readout, n_loops, active, differentiated, needs)
    dtype = product_dtype(head, compute_dtype)
    dy = states[0].new_empty((len(active) * n_tokens, d) if need_dy else 0, dtype=dtype)
    stats = head.new_empty((6, *shape) if statistics else 0, dtype=wide)
    top1 = head.new_empty(shape if statistics else 0, dtype=torch.int64)
    return *(head.new_empty(size, dtype=wide) for size in ((), shape[:1], shape, 3)), dhead, dbias, stats, top1, dy


@torch.library.custom_op("looped::cross_entropy_backward", mutates_args=())
def _states_and_norm_backward(
    states: list[Tensor], dy: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, factors: Tensor,
    active: list[int], need_states: list[bool], needs: list[bool], readout: str, eps: float, penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the norm's weight and bias, and of the states [S, N, d], from dy [A N, d].

    factors [3]: the scales' factors times the upstream gradient.
    """
    loops = _loops(states)
    n_tokens, d = loops[0].shape
    weight = None if norm_weight is None else norm_weight.contiguous()
    differentiated = _differentiated(states, need_states, active, penalty)
    dstates = loops[0].new_empty((len(differentiated), n_tokens, d))
    sums = [partial_sums(loops[0]) if need and dy.numel() else None for need in needs[1:3]]
    added = False
    for loop, h in enumerate(loops):
        norm, loop_weight, _ = norm_arguments(readout, loop, len(loops), weight, None)
        dloop = dstates[differentiated.index(loop)] if loop in differentiated else None
        dy_loop = dy.view(len(active), n_tokens, d)[active.index(loop)] if dy.numel() and loop in active else None
        of_norm = [partial if dy_loop is not None and norm != "none" else None for partial in sums]
        if dloop is None and of_norm == [None, None]:
            continue
        norm_backward(
            dy_loop, h, loop_weight, eps=eps, norm=norm, scale=factors[0],
            dmean_square=factors[2].expand(n_tokens) if penalty > 0 else None,
            dh=dloop, dweight=of_norm[0], dbias=of_norm[1], add=added,
        )  # fmt: skip
        added = added or of_norm != [None, None]
    dweight, dbias = (
        loops[0].new_empty(0) if not need or like is None
        else like.new_zeros(like.shape) if partial is None or not added
        else partial.sum(0).to(like.dtype)
        for need, like, partial in zip(needs[1:3], (norm_weight, norm_bias), sums, strict=True)
    )  # fmt: skip
    return dweight, dbias, dstates


@_states_and_norm_backward.register_fake
def _(states, dy, norm_weight, norm_bias, factors, active, need_states, needs, readout, eps, penalty):
    dweight, dbias = (
        like.new_empty(like.shape) if need and like is not None else dy.new_empty(0, dtype=states[0].dtype)
        for need, like in zip(needs[1:3], (norm_weight, norm_bias), strict=True)
    )
    n_differentiated = len(_differentiated(states, need_states, active, penalty))
    return dweight, dbias, states[0].new_empty((n_differentiated, *states[0].shape[-2:]))


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
    dnorm_weight, dnorm_bias, dstates = _states_and_norm_backward(
        states, dy, norm_weight, norm_bias, factors, active, need_states, needs, readout, eps, penalty
    )
    dhead, dbias = (
        _scaled(gradient, factors[0], dtype) if need else None
        for gradient, dtype, need in zip((dhead, dbias), ctx.dtypes, (needs[0], needs[3]), strict=True)
    )
    differentiated = _differentiated(states, need_states, active, penalty)
    of_states: list[Tensor | None] = [None] * ctx.n_states
    if states[0].dim() == 3:
        of_states = [dstates] if differentiated else [None]
    else:
        for row, loop in enumerate(differentiated):
            of_states[loop] = dstates[row]
    return (
        of_states, dhead, None, dweights, dnorm_weight if needs[1] else None, dnorm_bias if needs[2] else None, dbias,
        *none,
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

    Memory beyond inputs and outputs is one chunk of logits and one float32 dW, whatever K; all gradients that somebody
    needs are formed in the forward pass.  kernels/README.md has the derivations.

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
