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

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .device import accumulator, cpu_blocks, implementation, uses_triton

Norm = Literal["none", "rmsnorm", "layernorm"]
CPU_ROW_TENSORS = 4  # float32 tensors of rows that a CPU pass works on at once


class NormForward(NamedTuple):
    """The tensors of a forward pass, in the order in which the Triton kernel has them.

    x [..., d] and what is added to it, the residual [..., d]; the norm's weight and bias [d].
    What is written, where it is given: y, the sum total = x + residual [..., d], mean_square [...].
    """

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    y: Tensor | None = None
    total: Tensor | None = None
    mean_square: Tensor | None = None


class NormBackward(NamedTuple):
    """The tensors of a backward pass, in the order in which the Triton kernel has them.

    dy [..., d], or None for 0; row_weight [rows] and scale []: dy is multiplied by both, in float32.
    dmean_square [...], which may be expanded from a scalar, and dtotal [..., d]: the other results' gradients.
    What is written, where it is given:
    dh and dx [..., d]: the gradient of h, in two dtypes.
    dweight, dbias [programs, d] float32, made by `partial_sums`, and added up by `summed`.
    radial_dot, radial_fraction [rows]: <g, h> and the radial fraction of the gradient g that comes through y alone.
    """

    dy: Tensor | None
    h: Tensor
    weight: Tensor | None = None
    row_weight: Tensor | None = None
    scale: Tensor | None = None
    dmean_square: Tensor | None = None
    dtotal: Tensor | None = None
    dh: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    radial_dot: Tensor | None = None
    radial_fraction: Tensor | None = None


NOT_ROWS = {"weight", "bias", "scale", "dweight", "dbias"}  # those tensors that all rows share
Pass = TypeVar("Pass", NormForward, NormBackward)


def radial_fraction(g: Tensor, h: Tensor) -> Tensor:
    """|<g, h>| / (|g| |h|) of rows [..., d]; 0 where g or h is 0, nan where either has a nan.

    Both are divided by their largest element first, so that no square leaves the dtype's range.
    """
    g, h = (x / torch.where(peak > 0, peak, 1.0) for x, peak in ((x, x.abs().amax(-1, keepdim=True)) for x in (g, h)))
    norms = g.square().sum(-1).sqrt() * h.square().sum(-1).sqrt()
    return torch.where(norms == 0, 0.0, (g * h).sum(-1).abs() / norms)


def _cpu_blocks(tensors: Pass, x: Tensor) -> Iterator[tuple[Pass, bool]]:
    """The tensors of a pass over x [..., d] a block of rows at a time, and whether it is the first block."""
    d, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    of_rows = {
        name: tensor.view(n_rows, d) if tensor.dim() == x.dim() else tensor.reshape(n_rows)
        for name, tensor in zip(tensors._fields, tensors, strict=True)
        if tensor is not None and name not in NOT_ROWS
    }
    for block in cpu_blocks(n_rows, CPU_ROW_TENSORS * 4 * d):
        whole = block == slice(0, n_rows)
        of_block = of_rows if whole else {name: tensor[block] for name, tensor in of_rows.items()}
        yield tensors._replace(**of_block), block.start == 0


def _forward_cpu(tensors: NormForward, eps: float, norm: Norm) -> None:
    h, y = tensors.x, tensors.y
    if tensors.residual is not None and tensors.total is not None:
        h = torch.add(tensors.residual, h, out=tensors.total)
    wide = accumulator(h.dtype)
    square = torch.linalg.vector_norm(h, dim=-1, dtype=wide).square_().div_(h.shape[-1])
    if tensors.mean_square is not None:
        tensors.mean_square.copy_(square)
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
    if tensors.weight is not None:
        normed *= tensors.weight
    if tensors.bias is not None:
        normed += tensors.bias
    if normed is not y:
        y.copy_(normed)


def _sum_rows(x: Tensor, out: Tensor, add: bool) -> None:
    total = x.sum(0, dtype=out.dtype)
    out.add_(total) if add else out.copy_(total)


def _backward_cpu(tensors: NormBackward, eps: float, norm: Norm, add: bool) -> None:
    dy, h, weight = tensors.dy, tensors.h, tensors.weight
    wide = accumulator(h.dtype)
    d = h.shape[-1]
    if dy is not None:
        dy = dy.to(wide, copy=norm == "none") if tensors.scale is None else dy * tensors.scale.to(wide)
        if tensors.row_weight is not None:
            dy = dy * tensors.row_weight.unsqueeze(-1)
    if dy is None:
        gradient = torch.zeros(h.shape, dtype=wide)
    elif norm == "none":
        gradient = dy
    else:
        xhat = h - h.mean(-1, keepdim=True, dtype=wide) if norm == "layernorm" else h.to(wide, copy=True)
        rstd = torch.rsqrt(torch.linalg.vector_norm(xhat, dim=-1, keepdim=True, dtype=wide).square_().div_(d) + eps)
        xhat *= rstd
        product = dy * xhat
        if tensors.dweight is not None:
            _sum_rows(product, tensors.dweight[0], add)
        gradient = dy.clone() if weight is None else dy * weight.to(wide)
        projection = product.sum(-1) if weight is None else torch.mv(product, weight.to(wide))
        if norm == "layernorm":
            gradient -= gradient.mean(-1, keepdim=True)
        gradient.addcmul_(xhat, projection.unsqueeze(-1), value=-1 / d).mul_(rstd)
    if dy is not None and tensors.dbias is not None:
        _sum_rows(dy, tensors.dbias[0], add)
    if tensors.radial_dot is not None and tensors.radial_fraction is not None:
        torch.sum(gradient * h, -1, out=tensors.radial_dot)
        tensors.radial_fraction.copy_(radial_fraction(gradient, h.to(wide)))
    if tensors.dmean_square is not None:
        gradient.addcmul_(h.to(wide), (tensors.dmean_square * (2.0 / d)).unsqueeze(-1))
    if tensors.dtotal is not None:
        gradient += tensors.dtotal
    for out in (tensors.dh, tensors.dx):
        if out is not None:
            out.copy_(gradient)


def norm_forward(tensors: NormForward, eps: float, norm: Norm) -> None:
    """Write those of `y`, `total` and `mean_square` that are given."""
    if tensors.x.numel() == 0:
        return
    if uses_triton(tensors.x):
        implementation("row_norm_triton").norm_forward(tensors, eps, norm)
        return
    for block, _ in _cpu_blocks(tensors, tensors.x):
        _forward_cpu(block, eps, norm)


def norm_backward(tensors: NormBackward, eps: float, norm: Norm, *, add: bool = False) -> None:
    """The gradient of `norm_forward`: write those of the gradients and radial sums that are given.

    add: add to `dweight` and `dbias` what would else be written over them.
    """
    if tensors.h.numel() == 0:
        return
    if uses_triton(tensors.h):
        implementation("row_norm_triton").norm_backward(tensors, eps, norm, add)
        return
    for block, first in _cpu_blocks(tensors, tensors.h):
        _backward_cpu(block, eps, norm, add or not first)


def partial_sums(h: Tensor) -> Tensor:
    """Space for the partial sums over the rows of h [..., d]: `norm_backward`'s `dweight` or `dbias`."""
    d = h.shape[-1]
    n_rows = h.numel() // d
    n_programs = min(1, n_rows)
    if uses_triton(h):
        n_programs = implementation("row_norm_triton").backward_programs(n_rows, d, h.device)
    return h.new_empty((n_programs, d), dtype=accumulator(h.dtype))


def summed(partial: Tensor, like: Tensor) -> Tensor:
    """The sum of partial sums [programs, d], in the dtype of the parameter [d] whose gradient it is."""
    if not uses_triton(partial):
        return partial.sum(0, dtype=like.dtype)
    out = torch.empty_like(like)
    implementation("row_norm_triton").sum_rows(partial, out)
    return out


def rows_of(x: Tensor) -> Tensor:
    """x [..., d] as contiguous [rows, d]; a copy only where the layout needs one."""
    return x.reshape(-1, x.shape[-1]).contiguous()
