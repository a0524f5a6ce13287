"""The Triton kernels of kernels/row_norm.py, which has their equations and is their only caller.

All matrices are contiguous [rows, d].  A tensor that is not there is None, which Triton compiles for.
"""

import functools

import torch
import triton
import triton.language as tl

from .device import multiprocessors
from .launch import Launch, cdiv, launch, power_of_2, radial_fraction, remembered
from .row_norm import NormBackward, NormForward

NORMS: dict[str, int] = {"none": 0, "rmsnorm": 1, "layernorm": 2}  # the kernels' constexpr NORM
TILE = 1024  # elements of rows that a program holds, where a row is no longer than that
WARP_ELEMENTS = 512  # of a tile: 16 a thread of NVIDIA's
RESIDENT_WARPS = 12  # of a backward pass: its programs stay on their multiprocessor and share its registers
REGISTERS = 65_536
ROWS_AHEAD_BYTES = 88 * 1024  # that all of them load ahead into shared memory; the L4 and its like have 100 KiB
SUMMED_ROWS, SUMMED_COLUMNS, SUMMING_WARPS = 256, 16, 8


@triton.jit
def standardise(h, in_rows, inside, n_columns, eps, NORM: tl.constexpr):
    """xhat [BLOCK_ROWS, BLOCK_COLUMNS] of rows h, and the factor [BLOCK_ROWS, 1] that gives them variance 1.

    h and xhat are 0 where not `inside`.
    """
    if NORM == 2:
        h = tl.where(inside, h - (tl.sum(h, axis=1) / n_columns)[:, None], 0.0)
    rstd = tl.math.rsqrt(tl.sum(h * h, axis=1) / n_columns + eps)
    rstd = tl.where(in_rows, rstd, 0.0)[:, None]  # inf without eps, off the rows
    return h * rstd, rstd


@triton.jit
def standardise_gradient(dxhat, xhat, rstd, inside, n_columns, NORM: tl.constexpr):
    """dL/dh [BLOCK_ROWS, BLOCK_COLUMNS] of `standardise`, from dL/dxhat."""
    along = (tl.sum(dxhat * xhat, axis=1) / n_columns)[:, None]
    if NORM == 2:
        dxhat -= (tl.sum(dxhat, axis=1) / n_columns)[:, None]
        return tl.where(inside, rstd * (dxhat - xhat * along), 0.0)
    return rstd * (dxhat - xhat * along)


@triton.jit
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_square_ptr, n_rows, n_columns, eps,
    NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_rows, in_columns = row < n_rows, column < n_columns
    inside = in_rows[:, None] & in_columns[None, :]
    at = row[:, None] * n_columns + column[None, :]

    h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = h.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, h, mask=inside)
        h = h.to(tl.float32)

    mean_square = tl.sum(h * h, axis=1) / n_columns  # [BLOCK_ROWS]
    y = h
    if NORM != 0:
        y, _ = standardise(h, in_rows, inside, n_columns, eps, NORM)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]

    if y_ptr is not None:
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if mean_square_ptr is not None:
        tl.store(mean_square_ptr + row, mean_square, mask=in_rows)


@triton.jit
def store_sum(rows, out_ptr, in_columns, ADD: tl.constexpr):
    """Write the sum of rows [BLOCK_ROWS, BLOCK_COLUMNS], or, with ADD, add it to what is there."""
    total = tl.sum(rows, axis=0)
    if ADD:
        total += tl.load(out_ptr, mask=in_columns, other=0.0)
    tl.store(out_ptr, total, mask=in_columns)


@triton.jit
def norm_backward_kernel(
    dy_ptr, h_ptr, weight_ptr, row_weight_ptr, scale_ptr, dmean_square_ptr, dsum_ptr,
    dh_ptr, dx_ptr, dweight_ptr, dbias_ptr, dot_ptr, fraction_ptr,
    n_rows, n_columns, eps, stride_dmean_square,
    NORM: tl.constexpr, ADD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_columns = column < n_columns
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    weight = tl.full((BLOCK_COLUMNS,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    # Sums over rows stay a tile until the end, so that no iteration waits for a reduction between warps.
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)

    for block in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        in_rows = row < n_rows
        inside = in_rows[:, None] & in_columns[None, :]
        at = row[:, None] * n_columns + column[None, :]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dh = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)

        if dy_ptr is not None:
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
            if row_weight_ptr is not None:
                dy *= tl.load(row_weight_ptr + row, mask=in_rows, other=0.0)[:, None]
            dxhat = dy * weight[None, :]
            dh = dxhat
            if NORM != 0:
                xhat, rstd = standardise(h, in_rows, inside, n_columns, eps, NORM)
                dh = standardise_gradient(dxhat, xhat, rstd, inside, n_columns, NORM)
            if dweight_ptr is not None:
                dweight += dy * xhat
            if dbias_ptr is not None:
                dbias += dy
        if dot_ptr is not None:
            tl.store(dot_ptr + row, tl.sum(dh * h, axis=1), mask=in_rows)
            tl.store(fraction_ptr + row, radial_fraction(dh, h), mask=in_rows)
        if dmean_square_ptr is not None:
            dmean_square = tl.load(dmean_square_ptr + row * stride_dmean_square, mask=in_rows, other=0.0)
            dh += (2.0 / n_columns) * dmean_square[:, None] * h
        if dsum_ptr is not None:
            dh += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)

        if dh_ptr is not None:
            tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            tl.store(dx_ptr + at, dh.to(dx_ptr.dtype.element_ty), mask=inside)

    partial = tl.program_id(0).to(tl.int64) * n_columns + column
    if dweight_ptr is not None:
        store_sum(dweight, dweight_ptr + partial, in_columns, ADD)
    if dbias_ptr is not None:
        store_sum(dbias, dbias_ptr + partial, in_columns, ADD)


@triton.jit
def sum_rows_kernel(x_ptr, out_ptr, n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_columns = column < n_columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        inside = (row < n_rows)[:, None] & in_columns[None, :]
        total += tl.load(x_ptr + row[:, None] * n_columns + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=in_columns)


@functools.cache
def norm_tile(n_columns: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, for rows of `n_columns`."""
    block_columns = max(16, power_of_2(n_columns))
    return max(1, min(16, TILE // block_columns)), block_columns


@functools.cache
def tile_warps(n_columns: int) -> int:
    """Warps of a program, for rows of `n_columns`."""
    rows, columns = norm_tile(n_columns)
    return min(16, max(1, rows * columns // WARP_ELEMENTS))


@functools.cache
def resident_programs(n_columns: int) -> int:
    """Programs of a backward pass on a multiprocessor: two at least, unless one is as large as can be."""
    warps = tile_warps(n_columns)
    return max(RESIDENT_WARPS // warps, 2 if warps < 16 else 1)


def backward_programs(n_rows: int, n_columns: int, device: torch.device) -> int:
    """How many programs share the rows of a backward pass: as many as are resident at once."""
    return min(cdiv(n_rows, norm_tile(n_columns)[0]), resident_programs(n_columns) * multiprocessors(device))


@functools.cache
def backward_options(n_columns: int, column_bytes: int) -> tuple[int, dict[str, int]]:
    """Triton's num_stages (one more than the tiles loaded ahead, two at most); and how NVIDIA's kernel is compiled.

    column_bytes: of a row's column, in all that is loaded.  A thread has the registers that let all programs be
    resident.  The assembler, left alone, takes more.
    """
    rows, columns = norm_tile(n_columns)
    resident = resident_programs(n_columns)
    registers = REGISTERS // (resident * tile_warps(n_columns) * 32) // 8 * 8
    stages = 1 + min(2, ROWS_AHEAD_BYTES // (resident * rows * columns * column_bytes))
    return stages, {"maxnreg": min(255, registers)}


@remembered
def _forward_launch(n_rows: int, n_columns: int, eps: float, norm: str) -> Launch:
    rows, columns = norm_tile(n_columns)
    numbers = n_rows, n_columns, eps, NORMS[norm], rows, columns
    return Launch(norm_forward_kernel, (cdiv(n_rows, rows),), *numbers, num_warps=tile_warps(n_columns))


def norm_forward(tensors: NormForward, eps: float, norm: str) -> None:
    n_columns = tensors.x.shape[-1]
    _forward_launch(tensors.x.numel() // n_columns, n_columns, eps, norm)(tensors)


@remembered
def _backward_launch(
    n_rows: int, n_columns: int, n_programs: int, column_bytes: int, stride: int, eps: float, norm: str, add: bool,
    hip: bool, compiled: bool,
) -> Launch:  # fmt: skip
    stages, options = (1, {}) if hip else backward_options(n_columns, column_bytes)
    numbers = n_rows, n_columns, eps, stride, NORMS[norm], add, *norm_tile(n_columns), stages
    options = options if compiled else {}
    return Launch(norm_backward_kernel, (n_programs,), *numbers, num_warps=tile_warps(n_columns), **options)


def norm_backward(tensors: NormBackward, eps: float, norm: str, add: bool) -> None:
    dy, h, dmean_square, dtotal = tensors.dy, tensors.h, tensors.dmean_square, tensors.dtotal
    n_columns = h.shape[-1]
    n_rows = h.numel() // n_columns
    stride = 0 if dmean_square is None or dmean_square.dim() == 0 else dmean_square.stride(-1)
    partial = tensors.dweight if tensors.dbias is None else tensors.dbias
    n_programs = backward_programs(n_rows, n_columns, h.device) if partial is None else partial.shape[0]
    column_bytes = sum([0 if t is None else t.element_size() for t in (dy, h, dtotal)])
    hip = torch.version.hip is not None
    _backward_launch(n_rows, n_columns, n_programs, column_bytes, stride, eps, norm, add, hip, h.is_cuda)(tensors)


def sum_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    n_rows, n_columns = x.shape
    launch(
        sum_rows_kernel, (cdiv(n_columns, SUMMED_COLUMNS),), (x, out), n_rows, n_columns, SUMMED_ROWS, SUMMED_COLUMNS,
        num_warps=SUMMING_WARPS,
    )  # fmt: skip
