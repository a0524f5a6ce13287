"""The norms of rows and their gradients, with the mean square that a norm penalty needs: one pass each way.

With `h = x + residual` (or `x`), d channels and a row's `mean_square = mean_c h_c^2`:

    y    = w * h * rstd,   rstd = (mean_square + eps)^(-1/2)
    dh   = rstd * (dy*w - xhat * mean_c(dy*w*xhat)) + (2/d) * dmean_square * h + dresidual,   xhat = h * rstd
    dw   = sum_rows dy * xhat

The readout needs two more forms of the same row operation, so the kernels have them too: LayerNorm
(`xhat = (h - mean) * rstd`, a bias) and none (`y = h`).  Whichever the form, `mean_square` is that of h before
the norm, which the loss behind a scale-invariant readout cannot see (arXiv 2606.24898); any function of the
state's scale can be built on it, since it is differentiable.

Shapes: h, y [rows, d]; mean_square [rows] float32.  All arithmetic is in float32.  Nothing but h and w is saved:
a row is in registers when its gradient is formed, so its statistics are recomputed there, at no traffic.
Bytes a row: forward reads x (and the residual) and writes y (and the sum); backward reads h and dy (and the
gradient of the sum) and writes dh.  Sums over rows go through one partial row a program: no atomics.

RMSNorm: Zhang & Sennrich, arXiv 1910.07467.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import accumulator, cpu_blocks, launch, multiprocessors, uses_triton

Norm = Literal["none", "rmsnorm", "layernorm"]
CPU_ROW_TENSORS = 4  # float32 tensors of rows that a CPU pass works on at once
NORMS: dict[str, int] = {"none": 0, "rmsnorm": 1, "layernorm": 2}  # the kernels' constexpr NORM


# Triton ---------------------------------------------------------------------------------------------------------------


@triton.jit
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_square_ptr,
    n_rows, n_columns, eps,
    stride_x_row, stride_residual_row, stride_y_row, stride_sum_row,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_MEAN_SQUARE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_rows = row < n_rows
    in_columns = column < n_columns
    inside = in_rows[:, None] & in_columns[None, :]

    h = tl.load(x_ptr + row[:, None] * stride_x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = residual_ptr + row[:, None] * stride_residual_row + column[None, :]
        h += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
        h = h.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row[:, None] * stride_sum_row + column[None, :], h, mask=inside)
        h = h.to(tl.float32)
    mean_square = tl.sum(h * h, axis=1) / n_columns  # [BLOCK_ROWS]
    y = h
    if NORM == 1:
        y = h * tl.math.rsqrt(mean_square + eps)[:, None]
    if NORM == 2:
        centred = tl.where(inside, h - (tl.sum(h, axis=1) / n_columns)[:, None], 0.0)
        y = centred * tl.math.rsqrt(tl.sum(centred * centred, axis=1) / n_columns + eps)[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]

    if HAS_Y:
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row[:, None] * stride_y_row + column[None, :], y, mask=inside)
    if HAS_MEAN_SQUARE:
        tl.store(mean_square_ptr + row, mean_square, mask=in_rows)


@triton.jit
def norm_backward_kernel(
    dy_ptr, h_ptr, weight_ptr, dmean_square_ptr, dsum_ptr, scale_ptr,
    dh_ptr, dx_ptr, dweight_ptr, dbias_ptr, radial_ptr,
    n_rows, n_columns, eps,
    stride_dy_row, stride_h_row, stride_dmean_square, stride_dsum_row, stride_dh_row, stride_dx_row, stride_radial,
    NORM: tl.constexpr, HAS_DY: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DMEAN_SQUARE: tl.constexpr,
    HAS_DSUM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_DH: tl.constexpr, HAS_DX: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr, HAS_DBIAS: tl.constexpr, HAS_RADIAL: tl.constexpr, ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_columns = column < n_columns
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr)
    weight = tl.full((BLOCK_COLUMNS,), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    dbias = tl.zeros((BLOCK_COLUMNS,), tl.float32)

    for block in range(program, tl.cdiv(n_rows, BLOCK_ROWS), n_programs):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        in_rows = row < n_rows
        inside = in_rows[:, None] & in_columns[None, :]
        h = tl.load(h_ptr + row[:, None] * stride_h_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dh = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)

        if HAS_DY:
            dy = tl.load(dy_ptr + row[:, None] * stride_dy_row + column[None, :], mask=inside, other=0.0)
            dy = dy.to(tl.float32) * scale
            dxhat = dy * weight[None, :]
            if NORM == 0:
                dh = dxhat
            if NORM == 1:
                rstd = tl.math.rsqrt(tl.sum(h * h, axis=1) / n_columns + eps)[:, None]
                xhat = h * rstd
                dh = rstd * (dxhat - xhat * (tl.sum(dxhat * xhat, axis=1) / n_columns)[:, None])
            if NORM == 2:
                centred = tl.where(inside, h - (tl.sum(h, axis=1) / n_columns)[:, None], 0.0)
                rstd = tl.math.rsqrt(tl.sum(centred * centred, axis=1) / n_columns + eps)[:, None]
                xhat = centred * rstd
                mean_dxhat = (tl.sum(dxhat, axis=1) / n_columns)[:, None]
                dh = rstd * (dxhat - mean_dxhat - xhat * (tl.sum(dxhat * xhat, axis=1) / n_columns)[:, None])
                dh = tl.where(inside, dh, 0.0)
            if HAS_DWEIGHT:
                dweight += tl.sum(dy * xhat, axis=0)
            if HAS_DBIAS:
                dbias += tl.sum(dy, axis=0)
        if HAS_RADIAL:
            tl.store(radial_ptr + row, tl.sum(dh * h, axis=1), mask=in_rows)
            tl.store(radial_ptr + stride_radial + row, tl.sum(dh * dh, axis=1), mask=in_rows)
        if HAS_DMEAN_SQUARE:
            dmean_square = tl.load(dmean_square_ptr + row * stride_dmean_square, mask=in_rows, other=0.0)
            dh += (2.0 / n_columns) * dmean_square[:, None] * h
        if HAS_DSUM:
            dsum = tl.load(dsum_ptr + row[:, None] * stride_dsum_row + column[None, :], mask=inside, other=0.0)
            dh += dsum.to(tl.float32)

        if HAS_DH:
            dh_at = dh_ptr + row[:, None] * stride_dh_row + column[None, :]
            tl.store(dh_at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        if HAS_DX:
            dx_at = dx_ptr + row[:, None] * stride_dx_row + column[None, :]
            tl.store(dx_at, dh.to(dx_ptr.dtype.element_ty), mask=inside)

    partial = program.to(tl.int64) * n_columns + column
    if HAS_DWEIGHT:
        if ADD:
            dweight += tl.load(dweight_ptr + partial, mask=in_columns, other=0.0)
        tl.store(dweight_ptr + partial, dweight, mask=in_columns)
    if HAS_DBIAS:
        if ADD:
            dbias += tl.load(dbias_ptr + partial, mask=in_columns, other=0.0)
        tl.store(dbias_ptr + partial, dbias, mask=in_columns)


def norm_blocks(n_columns: int) -> dict[str, int]:
    """Rows and columns of a program's tile, and its warps, for rows of `n_columns`."""
    block_columns = max(16, triton.next_power_of_2(n_columns))
    block_rows = max(1, min(16, 2048 // block_columns))
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "num_warps": min(16, max(4, block_rows * block_columns // 512)),
    }


def norm_backward_programs(n_rows: int, block_rows: int, device: torch.device) -> int:
    """How many programs share the rows of a backward pass: four a multiprocessor keep its loads in flight."""
    return min(triton.cdiv(n_rows, block_rows), 4 * multiprocessors(device))


def _norm_forward_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: Norm,
    residual: Tensor | None, y: Tensor | None, total: Tensor | None, mean_square: Tensor | None,
) -> None:  # fmt: skip
    n_rows, n_columns = x.shape
    blocks = norm_blocks(n_columns)
    launch(
        norm_forward_kernel, (triton.cdiv(n_rows, blocks["BLOCK_ROWS"]),), x,
        x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias,
        y_ptr=y, sum_ptr=total, mean_square_ptr=mean_square,
        n_rows=n_rows, n_columns=n_columns, eps=eps,
        stride_x_row=x.stride(0), stride_residual_row=0 if residual is None else residual.stride(0),
        stride_y_row=0 if y is None else y.stride(0), stride_sum_row=0 if total is None else total.stride(0),
        NORM=NORMS[norm], HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, HAS_Y=y is not None, HAS_MEAN_SQUARE=mean_square is not None, **blocks,
    )  # fmt: skip


def _norm_backward_triton(
    dy: Tensor | None, h: Tensor, weight: Tensor | None, eps: float, norm: Norm,
    dmean_square: Tensor | None, dtotal: Tensor | None, scale: Tensor | None,
    dh: Tensor | None, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, radial: Tensor | None,
    add: bool,
) -> None:  # fmt: skip
    n_rows, n_columns = h.shape
    blocks = norm_blocks(n_columns)
    if dh is None and not torch.version.hip:  # sums alone: at half as many warps sm_90 puts 8 bytes on the stack
        blocks["num_warps"] = min(16, 2 * blocks["num_warps"])
    partials = dweight if dweight is not None else dbias
    n_programs = triton.cdiv(n_rows, blocks["BLOCK_ROWS"])
    if partials is not None:
        n_programs = min(n_programs, partials.shape[0])
    launch(
        norm_backward_kernel, (n_programs,), h,
        dy_ptr=dy, h_ptr=h, weight_ptr=weight, dmean_square_ptr=dmean_square, dsum_ptr=dtotal, scale_ptr=scale,
        dh_ptr=dh, dx_ptr=dx, dweight_ptr=dweight, dbias_ptr=dbias, radial_ptr=radial,
        n_rows=n_rows, n_columns=n_columns, eps=eps,
        stride_dy_row=0 if dy is None else dy.stride(0), stride_h_row=h.stride(0),
        stride_dmean_square=0 if dmean_square is None else dmean_square.stride(0),
        stride_dsum_row=0 if dtotal is None else dtotal.stride(0),
        stride_dh_row=0 if dh is None else dh.stride(0), stride_dx_row=0 if dx is None else dx.stride(0),
        stride_radial=0 if radial is None else radial.stride(0),
        NORM=NORMS[norm], HAS_DY=dy is not None, HAS_WEIGHT=weight is not None,
        HAS_DMEAN_SQUARE=dmean_square is not None, HAS_DSUM=dtotal is not None, HAS_SCALE=scale is not None,
        HAS_DH=dh is not None, HAS_DX=dx is not None, HAS_DWEIGHT=dweight is not None, HAS_DBIAS=dbias is not None,
        HAS_RADIAL=radial is not None, ADD=add, **blocks,
    )  # fmt: skip


# CPU ------------------------------------------------------------------------------------------------------------------


def _norm_forward_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: Norm,
    residual: Tensor | None, y: Tensor | None, total: Tensor | None, mean_square: Tensor | None,
) -> None:  # fmt: skip
    h = x
    if residual is not None and total is not None:
        h = torch.add(residual, x, out=total)
    wide = accumulator(h.dtype)
    square = torch.linalg.vector_norm(h, dim=-1, dtype=wide).square_().div_(h.shape[-1])
    if mean_square is not None:
        mean_square.copy_(square)
    if y is None:
        return
    if norm == "layernorm":
        normed = h.to(wide) - h.mean(-1, keepdim=True, dtype=wide)
        normed *= torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    elif norm == "rmsnorm":
        normed = torch.mul(h, torch.rsqrt(square + eps).unsqueeze(-1), out=y if y.dtype == wide else None)
    else:
        y.copy_(h)
        return
    if weight is not None:
        normed *= weight
    if bias is not None:
        normed += bias
    if normed is not y:
        y.copy_(normed)


def _sum_rows(x: Tensor, out: Tensor, add: bool) -> None:
    total = x.sum(0, dtype=out.dtype)
    out.add_(total) if add else out.copy_(total)


def _norm_backward_cpu(
    dy: Tensor | None, h: Tensor, weight: Tensor | None, eps: float, norm: Norm,
    dmean_square: Tensor | None, dtotal: Tensor | None, scale: Tensor | None,
    dh: Tensor | None, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, radial: Tensor | None,
    add: bool,
) -> None:  # fmt: skip
    wide = accumulator(h.dtype)
    d = h.shape[-1]
    if dy is None:
        gradient = torch.zeros(h.shape, dtype=wide)
    elif norm == "none":
        gradient = dy.to(wide, copy=True) if scale is None else dy * scale.to(wide)
    else:
        dy = dy.to(wide) if scale is None else dy * scale.to(wide)
        xhat = h - h.mean(-1, keepdim=True, dtype=wide) if norm == "layernorm" else h.to(wide, copy=True)
        rstd = torch.rsqrt(torch.linalg.vector_norm(xhat, dim=-1, keepdim=True, dtype=wide).square_().div_(d) + eps)
        xhat *= rstd
        product = dy * xhat
        if dweight is not None:
            _sum_rows(product, dweight[0], add)
        gradient = dy.clone() if weight is None else dy * weight.to(wide)
        projection = product.sum(-1) if weight is None else torch.mv(product, weight.to(wide))
        if norm == "layernorm":
            gradient -= gradient.mean(-1, keepdim=True)
        gradient.addcmul_(xhat, projection.unsqueeze(-1), value=-1 / d).mul_(rstd)
    if dy is not None and dbias is not None:
        _sum_rows(dy, dbias[0], add)
    if radial is not None:
        torch.sum(gradient * h, -1, out=radial[0])
        torch.sum(gradient.square(), -1, out=radial[1])
    if dmean_square is not None:
        gradient.addcmul_(h.to(wide), (dmean_square * (2.0 / d)).unsqueeze(-1))
    if dtotal is not None:
        gradient += dtotal
    for out in (dh, dx):
        if out is not None:
            out.copy_(gradient)


# The row operation, for `rms_norm_penalty` and for the readout --------------------------------------------------------


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    norm: Norm,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    total: Tensor | None = None,
    mean_square: Tensor | None = None,
) -> None:
    """Write `y`, the sum `total = x + residual` and `mean_square` (those that are given) of rows x [rows, d].

    The last dimension of every matrix is contiguous; rows may have any stride.
    """
    if x.shape[0] == 0:
        return
    if uses_triton(x):
        _norm_forward_triton(x, weight, bias, eps, norm, residual, y, total, mean_square)
        return
    for block in cpu_blocks(x.shape[0], CPU_ROW_TENSORS * 4 * x.shape[1]):
        rows = (None if tensor is None else tensor[block] for tensor in (residual, y, total, mean_square))
        _norm_forward_cpu(x[block], weight, bias, eps, norm, *rows)


def norm_backward(
    dy: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    norm: Norm,
    dmean_square: Tensor | None = None,
    dtotal: Tensor | None = None,
    scale: Tensor | None = None,
    dh: Tensor | None = None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    radial: Tensor | None = None,
    add: bool = False,
) -> None:
    """The gradient of `norm_forward`: writes those of `dh`, `dx` (the same values in another dtype) that are given.

    `dmean_square` [rows] may be expanded from a scalar; `scale` [] multiplies dy; `radial` [2, rows] receives <g, h>
    and |g|^2 of what comes through y alone; `dweight` and `dbias` [programs, d] float32 are partial sums, which the
    caller sums over their first dimension.  They are written over, or, with `add`, added to.
    """
    if h.shape[0] == 0:
        return
    if uses_triton(h):
        _norm_backward_triton(
            dy, h, weight, eps, norm, dmean_square, dtotal, scale, dh, dx, dweight, dbias, radial, add
        )
        return
    for block in cpu_blocks(h.shape[0], CPU_ROW_TENSORS * 4 * h.shape[1]):
        rows = [None if tensor is None else tensor[block] for tensor in (dy, dmean_square, dtotal, dh, dx)]
        _norm_backward_cpu(
            rows[0], h[block], weight, eps, norm, rows[1], rows[2], scale, rows[3], rows[4], dweight, dbias,
            None if radial is None else radial[:, block], add or block.start > 0,
        )  # fmt: skip


def partial_sums(h: Tensor) -> Tensor:
    """Space for the partial sums over the rows of h [rows, d]: `norm_backward`'s `dweight` or `dbias`."""
    n_rows, d = h.shape
    n_programs = min(1, n_rows)
    if uses_triton(h):
        n_programs = norm_backward_programs(n_rows, norm_blocks(d)["BLOCK_ROWS"], h.device)
    return torch.empty((n_programs, d), dtype=accumulator(h.dtype), device=h.device)


def rows_of(x: Tensor) -> Tensor:
    """x [..., d] as [rows, d] with a contiguous last dimension; a copy only where the layout needs one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
