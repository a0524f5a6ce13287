"""The matrix products of a readout: the vendor's library on a GPU; on a CPU the layouts in which it is fastest."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .device import accumulator, product_dtype, uses_triton
from .readout_call import ReadoutCall, ReadoutResults

CUDA_CHUNK_ROWS = 4096
CPU_CHUNK_ROWS = {torch.bfloat16: 1376, torch.float16: 1376}  # oneDNN's g W is at half its rate below about 1340 rows
CPU_WIDE_CHUNK_ROWS = 512
HEAD_ROWS = 4096  # rows of the head in one product on a CPU: MKL and oneDNN keep a panel of 20,000 less well in cache
# On ROCm no product of low precision gives float32. Rows of dW in one product there: fewer launches, more memory.
HIP_HEAD_ROWS = 32768


def default_chunk_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows of a chunk, whose products are of `dtype`: as few as full-rate products need."""
    return CUDA_CHUNK_ROWS if device.type == "cuda" else CPU_CHUNK_ROWS.get(dtype, CPU_WIDE_CHUNK_ROWS)


def head_accumulator(head: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Space [V, d] for dW's sum over the chunks; transposed in memory where AMX forms y^T g faster than g^T y."""
    dtype = accumulator(head.dtype)
    if head.is_cuda or product_dtype(head, compute_dtype) == dtype:
        return head.new_empty(head.shape, dtype=dtype)
    return head.new_empty(head.shape[::-1], dtype=dtype).t()


def _blocks(n_columns: int, size: int) -> Iterator[slice]:
    for first in range(0, n_columns, size):
        yield slice(first, min(first + size, n_columns))


def logits_space(head: Tensor, n_rows: int) -> Tensor:
    """Space for logits [n_rows, V]; on a GPU a row is as long in memory as accesses of 16 bytes need it."""
    n_columns = len(head)
    row_length = -(-n_columns // 16) * 16 if uses_triton(head) else n_columns
    return head.new_empty((n_rows, row_length))[:, :n_columns]


def form_logits(y: Tensor, head: Tensor, logits: Tensor) -> Tensor:
    """logits [R, V] = y W^T for y [R, d], W [V, d]."""
    if y.is_cuda:
        return torch.mm(y, head.t(), out=logits)
    for block in _blocks(len(head), HEAD_ROWS):
        torch.mm(y, head[block].t(), out=logits[:, block])
    return logits


def gives_float32(y: Tensor) -> bool:
    """Whether the library forms a float32 product of low-precision operands like y: on CUDA alone."""
    return y.is_cuda and torch.version.hip is None


def accumulate_head(total: Tensor, g: Tensor, y: Tensor, first: bool) -> None:
    """total [V, d] += g^T y for g [R, V], y [R, d], summed in total's float32; the first product is written over it."""
    if total.is_cuda and total.dtype == y.dtype:
        torch.mm(g.t(), y, out=total) if first else total.addmm_(g.t(), y)
    elif gives_float32(y):
        if first:
            torch.mm(g.t(), y, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, g.t(), y, out_dtype=total.dtype, out=total)
    else:
        _accumulate_blocks(total, g, y, first)


def _accumulate_blocks(total: Tensor, g: Tensor, y: Tensor, first: bool) -> None:
    """`accumulate_head` where no product of low precision gives float32: block by block, each rounded once."""
    y = y.float() if y.dtype == torch.float16 else y  # a sum may leave float16's range
    if not total.is_contiguous():  # see head_accumulator
        transposed = y.t().contiguous()
        low, wide = (like.new_empty(y.shape[1] * HEAD_ROWS) for like in (transposed, total))
    for block in _blocks(len(total), HIP_HEAD_ROWS if total.is_cuda else HEAD_ROWS):
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


def accumulate_bias(total: Tensor, g: Tensor, row_weight: Tensor | None, first: bool) -> None:
    """total [V] += g^T row_weight for g [R, V] and row_weight [R] (None: 1), in total's float32."""
    if first:
        total.zero_()
    if row_weight is None:
        total.add_(g.sum(0, dtype=total.dtype))
        return
    for block in _blocks(len(total), HEAD_ROWS):
        total[block].addmv_(g[:, block].to(total.dtype).t(), row_weight)


def form_gradients(
    g: Tensor, y: Tensor, head: Tensor, row_weight: Tensor | None, results: ReadoutResults, call: ReadoutCall,
    first: bool,
) -> None:  # fmt: skip
    """The gradients that `call` needs, from a chunk's g = dCE/dlogits [R, V] and y [R, d].

    dbias and dhead are added to those of `results`, each row weighed by row_weight [R] (None: 1).  dy is written over
    y, and weighed later.
    """
    if "bias" in call.needs:
        accumulate_bias(results.dbias, g, row_weight, first)
    if "head" in call.needs:
        if row_weight is not None:
            y.mul_(row_weight.unsqueeze(-1))
        accumulate_head(results.dhead, g, y, first)
    if call.needs_dy:
        torch.mm(g, head, out=y)
