"""The per-loop readout of K states through one head: norm, logits, cross-entropy, and every gradient, in chunks.

For the state h[k, t] [d] of loop k and token t, the head W [V, d] and coefficients c[k, t]:

    total = sum_{k, t} c[k, t] * CE(W norm(h[k, t]), target_t) + penalty * mean_{k, t, channels} h^2
    dL/dh = norm_backward(c * W^T g) + (2 penalty / (K N d)) h,   dL/dW = sum c * g y^T,   dL/dc = CE

with y = norm(h) and g = dCE/dlogits.  The K states share the head, so the normed rows of all loops form one matrix Y
[K N, d].  It is read out a chunk of rows at a time:

    logits = y W^T  ->  CE and g, in place  ->  dW += g^T (row_weight * y)  ->  dy = g W, written over y

The three products go to the vendor's library.  They take 6 K N d V FLOPs, as K separate readouts do.  Memory holds Y
and, whatever K, one chunk of logits and one dW.

These gradients are formed in the forward pass, where the logits are at hand.  The backward pass multiplies them by the
upstream gradient and takes dy through the norm, one launch a loop.  Where the caller wants the rows' losses themselves,
their upstream gradient is not known in advance; then the backward pass runs this same pass again.

dW and the loss are summed in float32.  g is of order one in every dtype.  A row's coefficient is `unit * row_weight`
(kernels/row_weights.py); both are applied in float32, or to y.  So neither a mean over many tokens, nor a loop with a
small weight, nor a float16 loss scale leaves the range of the dtype.

Chunked readouts: Liger-Kernel (arXiv 2410.10989), cut-cross-entropy (arXiv 2411.09009).  The norm penalty and the
per-loop supervision: arXiv 2606.24898.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_range
from .cross_entropy import LossOptions, RowResults, cross_entropy_
from .device import accumulator, product_dtype
from .out_of_memory import halve, within_memory
from .products import form_gradients, form_logits, head_accumulator, logits_space
from .readout_call import PARAMETERS, ReadoutCall, ReadoutResults, ReadoutTensors
from .registration import refuse_create_graph, register
from .row_norm import NormBackward, NormForward, norm_backward, norm_forward, partial_sums, summed
from .row_weights import LossScales, loss_sums, row_weights, scaled
from .sharded_readout import read_out_shard, weigh_all


class FormedGradients(NamedTuple):
    """What the backward op takes after the states, in the order of its schema.

    dy, dhead, dbias, factors, row_weight: of ReadoutResults.  upstream: the gradient of the total [], or None for 1.
    head_dtype, bias_dtype: in which dtypes the gradients of head and bias are given.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    dy: Tensor
    dhead: Tensor
    dbias: Tensor
    factors: Tensor
    row_weight: Tensor
    upstream: Tensor | None
    head_dtype: torch.dtype
    bias_dtype: torch.dtype

    @property
    def norm_parameters(self) -> dict[str, Tensor | None]:
        return {"norm_weight": self.norm_weight, "norm_bias": self.norm_bias}


def loops_of(states: list[Tensor]) -> list[Tensor]:
    """The states of all loops, each contiguous [N, d]; a copy only where the layout needs one."""
    loops = states[0].unbind(0) if states[0].dim() == 3 else states
    return [state.contiguous() for state in loops]


# Forward --------------------------------------------------------------------------------------------------------------


def _empty_results(states: list[Tensor], tensors: ReadoutTensors, call: ReadoutCall) -> ReadoutResults:
    """Space for the results, which have the same layout with values and without."""
    head, n_loops, (n_tokens, d) = tensors.head, len(call.active), states[0].shape[-2:]
    wide = accumulator(states[0].dtype)

    def empty(*shape: int, dtype: torch.dtype = wide, wanted: bool = True) -> Tensor:
        return head.new_empty(shape if wanted else (0,), dtype=dtype)

    need_head = "head" in call.needs
    return ReadoutResults(
        total=empty(),
        per_loop=empty(n_loops),
        ce=empty(n_loops, n_tokens),
        factors=empty(3),
        row_weight=empty(n_loops * n_tokens, wanted=tensors.weights is not None),
        dhead=head_accumulator(head, call.compute_dtype) if need_head else empty(0),
        dbias=empty(len(head), wanted="bias" in call.needs),
        statistics=empty(6, n_loops, n_tokens, wanted=call.statistics),
        top1=empty(n_loops, n_tokens, dtype=torch.int64, wanted=call.statistics),
        dy=empty(n_loops * n_tokens, d, dtype=product_dtype(head, call.compute_dtype), wanted=call.needs_dy),
    )


def _normed_rows(
    loops: list[Tensor], tensors: ReadoutTensors, y: Tensor, mean_square: Tensor | None, call: ReadoutCall
) -> None:
    """y [A N, d], the normed rows of the active loops' states, and the mean_square [K, N] of all loops where given."""
    of_loop = dict(zip(call.active, y.view(len(call.active), *loops[0].shape), strict=True))
    for loop, h in enumerate(loops):
        rows, norm = of_loop.get(loop), call.norm(loop)
        square = None if mean_square is None else mean_square[loop]
        weight, bias = (None, None) if norm == "none" else (tensors.norm_weight, tensors.norm_bias)
        if rows is not None or square is not None:
            norm_forward(NormForward(h, weight=weight, bias=bias, y=rows, mean_square=square), call.eps, norm)


def _read_out(
    y: Tensor, head: Tensor, targets: Tensor, options: LossOptions, rows: RowResults, row_weight: Tensor | None,
    results: ReadoutResults, call: ReadoutCall,
) -> None:  # fmt: skip
    """Row results of y [R, d], and, where needed, dhead, dbias and dy, written over y; a chunk of rows at a time."""
    logits = logits_space(head, min(call.chunk_rows, len(y)))
    for first in range(0, len(y), call.chunk_rows):
        chunk = y[first : first + call.chunk_rows]
        weight = None if row_weight is None else row_weight[first : first + call.chunk_rows]
        g = form_logits(chunk, head, logits[: len(chunk)])
        cross_entropy_(g, targets, row_weight, options, rows, first, gradient=call.needs_dlogits)
        form_gradients(g, chunk, head, weight, results, call, first == 0)


def _measure_states(
    loops: list[Tensor], mean_square: Tensor, norm_weight: Tensor | None, scales: LossScales, results: ReadoutResults,
    call: ReadoutCall,
) -> None:  # fmt: skip
    """The statistics of the states: mean square, and the radial part of the gradient where one is formed."""
    n_tokens = len(loops[0])
    results.statistics[4:].fill_(torch.nan)
    for index, loop in enumerate(call.active):
        results.statistics[3, index] = mean_square[loop]
        if loop in call.differentiated and call.needs_dy:
            rows, norm = slice(index * n_tokens, (index + 1) * n_tokens), call.norm(loop)
            tensors = NormBackward(
                results.dy[rows], loops[loop], None if norm == "none" else norm_weight,
                row_weight=None if scales.row_weight is None else scales.row_weight[rows], scale=scales.unit,
                radial_dot=results.statistics[4, index], radial_fraction=results.statistics[5, index],
            )  # fmt: skip
            norm_backward(tensors, call.eps, norm)


def _in_chunks(states: list[Tensor], tensors: ReadoutTensors, call: ReadoutCall) -> ReadoutResults:
    loops = loops_of(states)
    head = tensors.head
    tensors = ReadoutTensors._make(t if t is None or t is head else t.contiguous() for t in tensors)
    results = _empty_results(states, tensors, call)
    penalty, n_rows, (n_tokens, d) = tensors.penalty, results.ce.numel(), loops[0].shape
    of_all = None
    if call.shard is None:
        space = LossScales(None if tensors.weights is None else results.row_weight, results.factors)
        scales = row_weights(tensors, call, space, n_columns=len(head), n_penalised=call.n_loops * n_tokens)
        check_range(tensors.targets, len(head), call.ignore_index, scales.in_range)
    else:
        scales, of_all = weigh_all(tensors, results, call)

    measured = call.statistics or penalty is not None
    mean_square = results.factors.new_empty((call.n_loops, n_tokens)) if measured else None
    dtype = product_dtype(head, call.compute_dtype)
    y = results.dy if call.needs_dy else head.new_empty((n_rows, d), dtype=dtype)
    _normed_rows(loops, tensors, y, mean_square, call)
    if n_rows == 0:
        results.dhead.zero_()
        results.dbias.zero_()
    else:
        rows = RowResults(results.ce.view(-1))
        if call.statistics:
            rows = RowResults(rows.loss, results.statistics.view(6, n_rows), results.top1.view(-1))
        options = LossOptions(call.ignore_index, call.label_smoothing, call.softcap, tensors.z_loss, tensors.bias)
        head = head.to(dtype).contiguous()
        if of_all is None:
            _read_out(y, head, tensors.targets, options, rows, scales.row_weight, results, call)
        else:
            read_out_shard(y, head, of_all, options, rows, results, call)
    if call.statistics and mean_square is not None:
        _measure_states(loops, mean_square, tensors.norm_weight, scales, results, call)
    loss_sums(results.ce, scales, None if penalty is None else mean_square, results.total, results.per_loop)
    return results


def _forward(states: list[Tensor], *others: Any) -> ReadoutResults:
    tensors, call = ReadoutTensors(*others[:-1]), others[-1]
    device = tensors.head.device
    try:
        return _in_chunks(states, tensors, within_memory(call, device))
    except RuntimeError as error:
        halve(error, call, device, n_rows=len(call.active) * states[0].shape[-2])
    # Not in the handler, where the error would keep what the first attempt has allocated.
    return _in_chunks(states, tensors, within_memory(call, device))


def _forward_fake(states, *others):
    return tuple(_empty_results(states, ReadoutTensors(*others[:-1]), others[-1]))


# Backward -------------------------------------------------------------------------------------------------------------


def _backward(states: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
    """The gradients of the states [S, N, d] that have one, and of PARAMETERS."""
    formed, call = FormedGradients(*others[:-1]), others[-1]
    loops, dy, factors, parameters = loops_of(states), formed.dy, formed.factors, formed.norm_parameters
    n_tokens, d = loops[0].shape
    row_weight = formed.row_weight if formed.row_weight.numel() else None
    scales = LossScales(row_weight, factors if formed.upstream is None else factors * formed.upstream)
    dstates = loops[0].new_empty((len(call.differentiated), n_tokens, d))
    weight = None if formed.norm_weight is None else formed.norm_weight.contiguous()
    partials = [
        partial_sums(loops[0]) if name in call.needs and parameter is not None else None
        for name, parameter in parameters.items()
    ]
    unit = scales.unit
    dmean_square = scales.dmean_square.expand(n_tokens) if call.penalised else None
    needs_dy, used = call.needs_dy, False  # used: whether anything was added to the partial sums
    for loop, h in enumerate(loops):
        dh = dstates[call.differentiated.index(loop)] if loop in call.differentiated else None
        read = loop in call.active and needs_dy
        first = call.active.index(loop) * n_tokens if read else 0
        rows, norm = slice(first, first + n_tokens), call.norm(loop)
        dweight, dbias_ = partials if read and norm != "none" else (None, None)
        if dh is None and dweight is None and dbias_ is None:
            continue
        tensors = NormBackward(
            dy[rows] if read else None, h, None if norm == "none" else weight,
            row_weight=None if row_weight is None else row_weight[rows], scale=unit, dmean_square=dmean_square,
            dh=dh, dweight=dweight, dbias=dbias_,
        )  # fmt: skip
        norm_backward(tensors, call.eps, norm, add=used)
        used = used or (n_tokens > 0 and (dweight is not None or dbias_ is not None))
    of_norm = (
        dy.new_empty(0) if partial is None or like is None
        else summed(partial, like) if used
        else torch.zeros_like(like)
        for partial, like in zip(partials, parameters.values(), strict=True)
    )  # fmt: skip
    if call.shard is not None:
        unit = unit * call.shard.share
    of_head = scaled(formed.dhead, unit, formed.head_dtype) if "head" in call.needs else dy.new_empty(0)
    of_bias = scaled(formed.dbias, unit, formed.bias_dtype) if "bias" in call.needs else dy.new_empty(0)
    return dstates, of_head, *of_norm, of_bias


def _backward_fake(states, *others):
    formed, call = FormedGradients(*others[:-1]), others[-1]

    def empty(name: str, like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if like is None or name not in call.needs:
            return formed.dy.new_empty(0)
        return like.new_empty(like.shape, dtype=dtype)

    of_head = empty("head", formed.dhead, formed.head_dtype)
    of_norm = (empty(name, parameter) for name, parameter in formed.norm_parameters.items())
    of_bias = empty("bias", formed.dbias, formed.bias_dtype)
    return states[0].new_empty((len(call.differentiated), *states[0].shape[-2:])), of_head, *of_norm, of_bias


# Registration ---------------------------------------------------------------------------------------------------------


def _call_again(ctx, call: ReadoutCall) -> ReadoutCall:
    """The call that forms the gradients which autograd asks for, of the row losses."""
    of_states, of_tensors = ctx.needs_input_grad[2 : 2 + ctx.n_states], ctx.needs_input_grad[2 + ctx.n_states :]
    if ctx.is_stack:
        differentiated = tuple(range(call.n_loops)) if of_states[0] else ()
    else:
        differentiated = tuple(loop for loop in call.active if of_states[loop])
    of_tensors = ReadoutTensors(*of_tensors)._asdict()
    needs = tuple(name for name, needed in of_tensors.items() if needed and name in PARAMETERS)
    return call._replace(needs=needs, differentiated=differentiated, mean=False, weight=1.0, statistics=False)


class _Readout(torch.autograd.Function):
    """`total` is differentiated where the forward pass has formed its gradients, or where there are weights.

    Elsewhere the rows' losses `ce` are.  Their upstream gradient is not known in the forward pass, so the backward pass
    runs that again, with the upstream gradient as the weights.
    """

    @staticmethod
    def forward(ctx, call, n_states, *tensors):
        states, others = tensors[:n_states], ReadoutTensors(*tensors[n_states:])
        results = ReadoutResults(*_readout.below_autograd(list(states), *others, call))
        ctx.set_materialize_grads(False)
        ctx.call, ctx.n_states, ctx.is_stack = call, n_states, states[0].dim() == 3
        ctx.dtypes = others.head.dtype, states[0].dtype if others.bias is None else others.bias.dtype
        ctx.weights_shape = None if others.weights is None else others.weights.shape
        ctx.formed = call.needs_dlogits or bool(call.differentiated) or others.weights is not None
        differentiable = results.total if ctx.formed else results.ce
        ctx.mark_non_differentiable(*(result for result in results if result is not differentiable))
        ctx.save_for_backward(*states, others.norm_weight, others.norm_bias, *(results[2:] if ctx.formed else others))
        return tuple(results)

    @staticmethod
    def backward(ctx, dtotal, _, dce, *__):
        refuse_create_graph()
        if dtotal is None and dce is None:
            return (None,) * len(ctx.needs_input_grad)
        states = list(ctx.saved_tensors[: ctx.n_states])
        norm_weight, norm_bias, *saved = ctx.saved_tensors[ctx.n_states :]
        call, gradients = ctx.call, {}
        if ctx.formed:
            results = ReadoutResults(dtotal, dtotal, *saved)
            if ctx.weights_shape is not None and ReadoutTensors(*ctx.needs_input_grad[2 + ctx.n_states :]).weights:
                share = LossScales(None, results.factors).share if call.mean else 1.0
                gradients["weights"] = (results.ce * (share * dtotal)).sum_to_size(ctx.weights_shape)
        else:
            call, weights = _call_again(ctx, call), dce.to(accumulator(states[0].dtype))
            tensors = ReadoutTensors(*saved)._replace(weights=weights, penalty=None, n_targets=None)
            results = ReadoutResults(*_readout(states, *tensors, call))
        dstates, *of_parameters = _readout_backward(
            states, norm_weight, norm_bias, results.dy, results.dhead, results.dbias, results.factors,
            results.row_weight, dtotal if ctx.formed else None, *ctx.dtypes, call,
        )  # fmt: skip
        gradients |= {name: of for name, of in zip(PARAMETERS, of_parameters, strict=True) if name in call.needs}
        of_states: list[Tensor | None] = [None] * ctx.n_states
        if ctx.is_stack:
            of_states = [dstates] if call.differentiated else [None]
        else:
            for index, loop in enumerate(call.differentiated):
                of_states[loop] = dstates[index]
        return None, None, *of_states, *(gradients.get(name) for name in ReadoutTensors._fields)


def _differentiated(states, *others):
    *tensors, call = others
    return _Readout.apply(call, len(states), *states, *tensors)


_readout = register(
    "readout(Tensor[] states, Tensor head, Tensor targets, Tensor? weights, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor? bias, Tensor? penalty, Tensor? z_loss, Tensor? n_targets, str call, float[] numbers)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _differentiated,
    ReadoutCall,
)
_readout_backward = register(
    "readout_backward(Tensor[] states, Tensor? norm_weight, Tensor? norm_bias, Tensor dy, Tensor dhead, Tensor dbias,"
    " Tensor factors, Tensor row_weight, Tensor? upstream, ScalarType head_dtype, ScalarType bias_dtype, str call,"
    " float[] numbers) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    carrier=ReadoutCall,
)


def read_out(states: list[Tensor], tensors: ReadoutTensors, call: ReadoutCall) -> ReadoutResults:
    """The op: states as one [K, N, d] or K times [N, d]."""
    return ReadoutResults(*_readout(states, *tensors, call))
