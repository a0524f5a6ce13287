"""The Triton kernels of kernels/radial.py, which has their equations and is their only caller."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, radial_fraction
from .row_norm_triton import norm_tile, tile_warps


@triton.jit
def radial_forward_kernel(
    h_ptr, grad_ptr, dot_ptr, grad_square_ptr, state_square_ptr, fraction_ptr, n_rows, n_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_rows = row < n_rows
    inside = in_rows[:, None] & (column < n_columns)[None, :]
    at = row[:, None] * n_columns + column[None, :]

    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)

    tl.store(dot_ptr + row, tl.sum(grad * h, axis=1), mask=in_rows)
    tl.store(grad_square_ptr + row, tl.sum(grad * grad, axis=1), mask=in_rows)
    tl.store(state_square_ptr + row, tl.sum(h * h, axis=1), mask=in_rows)
    tl.store(fraction_ptr + row, radial_fraction(grad, h), mask=in_rows)


@triton.jit
def radial_backward_kernel(
    h_ptr, grad_ptr, ddot_ptr, dgrad_square_ptr, dstate_square_ptr, dh_ptr, dgrad_ptr, n_rows, n_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_rows = row < n_rows
    inside = in_rows[:, None] & (column < n_columns)[None, :]
    at = row[:, None] * n_columns + column[None, :]

    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    ddot = tl.load(ddot_ptr + row, mask=in_rows, other=0.0)[:, None]
    dgrad_square = tl.load(dgrad_square_ptr + row, mask=in_rows, other=0.0)[:, None]
    dstate_square = tl.load(dstate_square_ptr + row, mask=in_rows, other=0.0)[:, None]

    tl.store(dh_ptr + at, (ddot * grad + 2.0 * dstate_square * h).to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(dgrad_ptr + at, (ddot * h + 2.0 * dgrad_square * grad).to(dgrad_ptr.dtype.element_ty), mask=inside)


def radial_forward(h: Tensor, grad: Tensor, sums: Sequence[Tensor]) -> None:
    _launch(radial_forward_kernel, h, (h, grad, *sums))


def radial_backward(h: Tensor, grad: Tensor, upstream: Sequence[Tensor], dh: Tensor, dgrad: Tensor) -> None:
    _launch(radial_backward_kernel, h, (h, grad, *upstream, dh, dgrad))


def _launch(kernel: Any, h: Tensor, tensors: Sequence[Tensor]) -> None:
    rows, columns = norm_tile(h.shape[1])
    warps = tile_warps(h.shape[1])
    launch(kernel, (cdiv(h.shape[0], rows),), tensors, *h.shape, rows, columns, num_warps=warps)
