"""The Triton kernels of kernels/swiglu.py, which has their equations and is their only caller.

gate and up are [rows, columns] of one row stride, their columns contiguous; so are their gradients; y and dy are
contiguous.  A gradient that is not needed is None, which Triton compiles for.  A program's start is 64 bits wide and
its offsets from there are 32: sums of both in every element take up to 200 registers where a tensor's size is odd.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, remembered

BLOCK = 2048  # elements of a program, or half as many: 16 a thread, which are two accesses of 16 bytes in 16 bits
WARPS = 4  # of a whole block


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, n_columns, stride_row, BLOCK: tl.constexpr):
    blocks_of_a_row = tl.cdiv(n_columns, BLOCK)
    row = (tl.program_id(0) // blocks_of_a_row).to(tl.int64)
    first = (tl.program_id(0) % blocks_of_a_row).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < n_columns - first
    start, given_start = row * n_columns + first, row * stride_row + first  # of contiguous tensors; of gate and up

    gate = tl.load(gate_ptr + given_start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + given_start + column, mask=inside, other=0.0).to(tl.float32)

    y = gate * tl.sigmoid(gate) * up

    tl.store(y_ptr + start + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n_columns, stride_row, stride_gradient, BLOCK: tl.constexpr
):  # fmt: skip
    blocks_of_a_row = tl.cdiv(n_columns, BLOCK)
    row = (tl.program_id(0) // blocks_of_a_row).to(tl.int64)
    first = (tl.program_id(0) % blocks_of_a_row).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < n_columns - first
    start, given_start = row * n_columns + first, row * stride_row + first  # of dy; of gate and up
    gradient_start = row * stride_gradient + first

    dy = tl.load(dy_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + given_start + column, mask=inside, other=0.0).to(tl.float32)

    sigmoid = tl.sigmoid(gate)
    if dup_ptr is not None:
        tl.store(dup_ptr + gradient_start + column, (dy * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=inside)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + given_start + column, mask=inside, other=0.0).to(tl.float32)
        dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dgate_ptr + gradient_start + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)


@remembered
def _launch(backward: bool, n_elements: int, n_columns: int, *strides: int) -> Launch:
    """In blocks of a half where whole ones would not fill a row."""
    block = BLOCK if n_columns == n_elements or n_columns % BLOCK == 0 else BLOCK // 2
    kernel = swiglu_backward_kernel if backward else swiglu_forward_kernel
    grid = (n_elements // n_columns * cdiv(n_columns, block),)
    return Launch(kernel, grid, n_columns, *strides, block, num_warps=WARPS * block // BLOCK)


def swiglu_forward(tensors: Sequence[Tensor], n_columns: int, stride: int) -> None:
    """tensors: gate and up, rows of `n_columns` at a stride; y."""
    _launch(False, tensors[0].numel(), n_columns, stride)(tensors)


def swiglu_backward(tensors: Sequence[Tensor | None], n_columns: int, stride: int, stride_gradient: int) -> None:
    """tensors: dy; gate and up, as in the forward pass; dgate and dup, or None, rows at a stride of their own."""
    assert tensors[0] is not None
    _launch(True, tensors[0].numel(), n_columns, stride, stride_gradient)(tensors)
