"""The per-loop readout of K states through one head: norm, logits, cross-entropy, and every gradient, in chunks.

For the state h[k, t] [d] of loop k and token t, the head W [V, d] and coefficients c[k, t]:

    total = sum_{k, t} c[k, t] * CE(W norm(h[k, t]), target_t) + penalty * mean_{k, t, channels} h^2
    dL/dh = norm_backward(c * W^T g) + (2 penalty / (K N d)) h,   dL/dW = sum c * g y^T,   dL/dc = CE

with y = norm(h) and g = dCE/dlogits.  The K states share the head, so the normed rows of all loops form one matrix Y
[K N, d], of which a chunk of rows at a time is read out: logits = y W^T -> softmax, CE and g in place -> dW += g^T y ->
dy = g W, written over y.  The three products go to the vendor's library: 6 K N d V FLOPs, the same as readout by
readout, while memory holds Y and, whatever K, one chunk of logits and one dW.  These gradients are formed in the
forward pass, where the logits are at hand; the backward pass multiplies them by the upstream gradient and takes dy
through the norm, one launch a loop.  Where the caller wants the rows' losses themselves (their upstream gradient is not
known in advance) the backward pass runs this same pass again.

dW and the loss are summed in float32.  g is kept in units of the largest |c|, so neither a mean over many tokens
nor a float16 loss scale leaves the range of the dtype, and the common factor is applied in float32.

Chunked readouts: Liger-Kernel (arXiv 2410.10989), cut-cross-entropy (arXiv 2411.09009).  The norm penalty and the
per-loop supervision: arXiv 2606.24898.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import triton
from torch import Tensor

from .cross_entropy import cross_entropy_
from .device import accumulator, product_dtype, uses_triton
from .row_loss import LossOptions, RowResults
from .row_norm import Norm, norm_forward

Readout = Literal["rmsnorm", "layernorm", "raw", "final-only"]
CUDA_CHUNK_ROWS = 4096
CPU_CHUNK_ROWS = {torch.bfloat16: 1376, torch.float16: 1376}  # oneDNN's g W is at half its rate below about 1340 rows
CPU_WIDE_CHUNK_ROWS = 512
HIP_HEAD_ROWS = (
    32768  # of dW, in one product where no product of low precision gives float32: fewer launches, more memory
)
HEAD_ROWS = 4096  # rows of the head in one product on a CPU: MKL and oneDNN keep a panel of 20,000 less well in cache


def loops_of(states: list[Tensor]) -> list[Tensor]:
    """The states of all loops [N, d], their last dimension contiguous."""
    loops = list(states[0].unbind(0)) if states[0].dim() == 3 else states
    return [state if state.stride(-1) == 1 else state.contiguous() for state in loops]


def norm_arguments(
    readout: str, loop: int, n_loops: int, weight: Tensor | None, bias: Tensor | None
) -> tuple[Norm, Tensor | None, Tensor | None]:
    """The norm that reads out `loop` (0-based) of `n_loops`, and its parameters, None where there is no norm."""
    if readout == "raw" or (readout == "final-only" and loop < n_loops - 1):
        return "none", None, None
    return "layernorm" if readout == "layernorm" else "rmsnorm", weight, bias


def default_chunk_rows(head: Tensor, compute_dtype: torch.dtype) -> int:
    """Rows of a chunk: as few as full-rate products need."""
    if head.device.type == "cuda":
        return CUDA_CHUNK_ROWS
    return CPU_CHUNK_ROWS.get(product_dtype(head, compute_dtype), CPU_WIDE_CHUNK_ROWS)


def head_accumulator(head: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Space [V, d] for dW's sum over the chunks; transposed in memory where AMX forms y^T g faster than g^T y."""
    dtype = accumulator(head.dtype)
    if head.is_cuda or product_dtype(head, compute_dtype) == dtype:
        return head.new_empty(head.shape, dtype=dtype)
    return head.new_empty(head.shape[::-1], dtype=dtype).t()


def _head_blocks(n_columns: int, size: int = HEAD_ROWS) -> Iterator[slice]:
    """The rows of the head that enter one product."""
    for first in range(0, n_columns, size):
        yield slice(first, min(first + size, n_columns))


def _form_logits(y: Tensor, head: Tensor, logits: Tensor) -> Tensor:
    """logits [R, V] = y W^T for y [R, d], W [V, d]."""
    if y.is_cuda:
        return torch.mm(y, head.t(), out=logits)
    for block in _head_blocks(len(head)):
        torch.mm(y, head[block].t(), out=logits[:, block])
    return logits


def _accumulate(total: Tensor, g: Tensor, y: Tensor, first: bool) -> None:
    """total [V, d] += g^T y for g [R, V], y [R, d], summed in total's float32; the first product is written over it."""
    if total.is_cuda and total.dtype == y.dtype:
        torch.mm(g.t(), y, out=total) if first else total.addmm_(g.t(), y)
    elif total.is_cuda and torch.version.hip is None:  # a float32 result of low-precision operands: CUDA only
        if first:
            torch.mm(g.t(), y, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, g.t(), y, out_dtype=total.dtype, out=total)
    else:
        _accumulate_blocks(total, g, y, first)


def _accumulate_blocks(total: Tensor, g: Tensor, y: Tensor, first: bool) -> None:
    """`_accumulate` where no product of low precision gives float32: block by block of the head, each rounded once."""
    y = y.float() if y.dtype == torch.float16 else y  # a sum may leave float16's range
    if not total.is_contiguous():  # see head_accumulator
        transposed = y.t().contiguous()
        low, wide = (like.new_empty(y.shape[1] * HEAD_ROWS) for like in (transposed, total))
    for block in _head_blocks(len(total), HIP_HEAD_ROWS if total.is_cuda else HEAD_ROWS):
        rows, g_block = total[block], g[:, block].to(y.dtype)
        if not total.is_contiguous():
            rows = rows.t()
            product = torch.mm(transposed, g_block, out=low[: rows.numel()].view(rows.shape))
            rows.copy_(product) if first else rows.add_(wide[: rows.numel()].view(rows.shape).copy_(product))
        elif total.dtype == y.dtype:
            torch.mm(g_block.t(), y, out=rows) if first else rows.addmm_(g_block.t(), y)
        else:
            product = torch.mm(g_block.t(), y)
            rows.copy_(product) if first else rows.add_(product)


def normed_rows(
    loops: list[Tensor],
    active: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    readout: str,
    eps: float,
    dtype: torch.dtype,
    mean_square: Tensor | None = None,
) -> Tensor:
    """y [A N, d], the normed rows of the active loops' states [N, d]; their mean_square [K, N] where given."""
    n_tokens, d = loops[0].shape
    y = loops[0].new_empty((len(active) * n_tokens, d), dtype=dtype)
    for loop, rows in zip(active, y.view(len(active), n_tokens, d), strict=True):
        norm, weight, norm_bias_ = norm_arguments(readout, loop, len(loops), norm_weight, norm_bias)
        square = None if mean_square is None else mean_square[loop]
        norm_forward(loops[loop], weight, norm_bias_, eps=eps, norm=norm, y=rows, mean_square=square)
    return y


def read_out(
    y: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    chunk_rows: int,
    results: RowResults,
    *,
    omega: Tensor | None = None,
    dhead: Tensor | None = None,
    dbias: Tensor | None = None,
    need_dy: bool = False,
) -> None:
    """Results of the rows y [R, d], which share W [V, d] and repeat the targets [N], a chunk of rows at a time.

    With omega [R], where they are given or needed: dhead and dbias, the sums of omega * dCE/dW and db, and omega *
    dCE/dy, written over y.
    """
    n_rows, n_columns = len(y), len(head)
    row_length = triton.cdiv(n_columns, 16) * 16 if uses_triton(head) else n_columns  # for 16-byte accesses
    logits = head.new_empty((min(chunk_rows, n_rows), row_length))[:, :n_columns]
    for first in range(0, n_rows, chunk_rows):
        chunk = y[first : first + chunk_rows]
        g = _form_logits(chunk, head, logits[: len(chunk)])
        cross_entropy_(g, targets, omega, bias, options, results, first)
        if dhead is not None:
            _accumulate(dhead, g, chunk, first == 0)
        if dbias is not None:
            chunk_dbias = g.sum(0, dtype=dbias.dtype)
            dbias.copy_(chunk_dbias) if first == 0 else dbias.add_(chunk_dbias)
        if need_dy:
            torch.mm(g, head, out=chunk)
