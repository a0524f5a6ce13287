"""The norms of rows and their gradients, with the mean square that a norm penalty needs: one pass each way.

With `h = x + residual` (or `x`), d channels and a row's `mean_square = mean_c h_c^2`:

    y    = w * h * rstd,   rstd = (mean_square + eps)^(-1/2)
    dh   = rstd * (dy*w - xhat * mean_c(dy*w*xhat)) + (2/d) * dmean_square * h + dresidual,   xhat = h * rstd
    dw   = sum_rows dy * xhat

The readout needs two more forms of the same row operation, so they are here too: LayerNorm
(`xhat = (h - mean) * rstd`, with a bias) and none (`y = h`).  Whatever the form, `mean_square` is that of h before the
norm.  The loss behind a scale-invariant readout cannot see it (arXiv 2606.24898).  It is differentiable, so any
function of the state's scale can be built on it.

Shapes: all matrices [..., d], contiguous; mean_square [...] float32.  All arithmetic is in float32.  Only h and w are
saved: the backward pass has a row in registers anyway, and computes its statistics again.
Bytes a row: forward reads x (and the residual) and writes y (and the sum); backward reads h and dy (and the gradient
of the sum) and writes dh.  Each program leaves one partial row of dw; there are no atomics.
Range: a row whose root mean square leaves [1e-19, 1.8e19] has a mean square of 0 or inf, as in `F.rms_norm`.

RMSNorm: Zhang & Sennrich, arXiv 1910.07467.
"""

from typing import Literal

import torch
from torch import Tensor

from .device import accumulator, cpu_blocks, implementation, uses_triton

Norm = Literal["none", "rmsnorm", "layernorm"]
CPU_ROW_TENSORS = 4  # float32 tensors of rows that a CPU pass works on at once


def radial_fraction(g: Tensor, h: Tensor) -> Tensor:
    """|<g, h>| / (|g| |h|) of rows [..., d]; 0 where g or h is 0, nan where either has a nan.

    Both are divided by their largest element first, so that no square leaves the dtype's range.
    """
    g, h = (x / torch.where(peak > 0, peak, 1.0) for x, peak in ((x, x.abs().amax(-1, keepdim=True)) for x in (g, h)))
    norms = g.square().sum(-1).sqrt() * h.square().sum(-1).sqrt()
    return torch.where(norms == 0, 0.0, (g * h).sum(-1).abs() / norms)


def _forward_cpu(
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


def _backward_cpu(
    dy: Tensor | None, h: Tensor, weight: Tensor | None, eps: float, norm: Norm, row_weight: Tensor | None,
    scale: Tensor | None, dmean_square: Tensor | None, dtotal: Tensor | None, dh: Tensor | None, dx: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None, radial: tuple[Tensor, Tensor] | None, add: bool,
) -> None:  # fmt: skip
    wide = accumulator(h.dtype)
    d = h.shape[-1]
    if dy is not None:
        dy = dy.to(wide, copy=norm == "none") if scale is None else dy * scale.to(wide)
        if row_weight is not None:
            dy = dy * row_weight.unsqueeze(-1)
    if dy is None:
        gradient = torch.zeros(h.shape, dtype=wide)
    elif norm == "none":
        gradient = dy
    else:
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
        dot, fraction = radial
        torch.sum(gradient * h, -1, out=dot)
        fraction.copy_(radial_fraction(gradient, h.to(wide)))
    if dmean_square is not None:
        gradient.addcmul_(h.to(wide), (dmean_square * (2.0 / d)).unsqueeze(-1))
    if dtotal is not None:
        gradient += dtotal
    for out in (dh, dx):
        if out is not None:
            out.copy_(gradient)


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
    """Write `y`, the sum `total = x + residual` and `mean_square` (those that are given) of rows x [..., d]."""
    if x.numel() == 0:
        return
    if uses_triton(x):
        implementation("row_norm_triton").norm_forward(x, weight, bias, eps, norm, residual, y, total, mean_square)
        return
    d = x.shape[-1]
    x = x.view(-1, d)
    residual, y, total = (None if t is None else t.view(-1, d) for t in (residual, y, total))
    mean_square = None if mean_square is None else mean_square.view(-1)
    for block in cpu_blocks(x.shape[0], CPU_ROW_TENSORS * 4 * d):
        rows = (None if tensor is None else tensor[block] for tensor in (residual, y, total, mean_square))
        _forward_cpu(x[block], weight, bias, eps, norm, *rows)


def norm_backward(
    dy: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    norm: Norm,
    row_weight: Tensor | None = None,
    scale: Tensor | None = None,
    dmean_square: Tensor | None = None,
    dtotal: Tensor | None = None,
    dh: Tensor | None = None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    radial: tuple[Tensor, Tensor] | None = None,
    add: bool = False,
) -> None:
    """The gradient of `norm_forward`: writes those of `dh`, `dx` (the same values in another dtype) that are given.

    row_weight [rows] and scale []: dy is multiplied by both, in float32.
    dmean_square [...]: may be expanded from a scalar.
    radial: two [rows], which receive <g, h> and the radial fraction of the gradient g that comes through y alone.
    dweight, dbias: [programs, d] float32, made by `partial_sums`.  The caller sums them over their first dimension.
    They are written over, or, with `add`, added to.
    """
    if h.numel() == 0:
        return
    if uses_triton(h):
        implementation("row_norm_triton").norm_backward(
            dy, h, weight, eps, norm, row_weight, scale, dmean_square, dtotal, dh, dx, dweight, dbias, radial, add
        )
        return
    d = h.shape[-1]
    h = h.view(-1, d)
    dy, dtotal, dh, dx = (None if t is None else t.view(-1, d) for t in (dy, dtotal, dh, dx))
    dmean_square = None if dmean_square is None else dmean_square.reshape(-1)
    for block in cpu_blocks(h.shape[0], CPU_ROW_TENSORS * 4 * d):
        dy_, row_weight_, dmean_square_, dtotal_, dh_, dx_ = (
            None if tensor is None else tensor[block] for tensor in (dy, row_weight, dmean_square, dtotal, dh, dx)
        )
        _backward_cpu(
            dy_, h[block], weight, eps, norm, row_weight_, scale, dmean_square_, dtotal_, dh_, dx_, dweight, dbias,
            None if radial is None else (radial[0][block], radial[1][block]), add or block.start > 0,
        )  # fmt: skip


def partial_sums(h: Tensor) -> Tensor:
    """Space for the partial sums over the rows of h [..., d]: `norm_backward`'s `dweight` or `dbias`."""
    d = h.shape[-1]
    n_rows = h.numel() // d
    n_programs = min(1, n_rows)
    if uses_triton(h):
        n_programs = implementation("row_norm_triton").backward_programs(n_rows, d, h.device)
    return torch.empty((n_programs, d), dtype=accumulator(h.dtype), device=h.device)


def rows_of(x: Tensor) -> Tensor:
    """x [..., d] as contiguous [rows, d]; a copy only where the layout needs one."""
    return x.reshape(-1, x.shape[-1]).contiguous()
