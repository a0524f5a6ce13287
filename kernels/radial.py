"""The radial part of a gradient: how much of dL/dh points along h itself.

    dot = <g, h>,   grad_square = |g|^2,   state_square = |h|^2,   fraction = |dot| / (|g| |h|)

A loss that reads h through a scale-invariant map has <g, h> = 0 (Euler): its gradient cannot change the scale of
h.  Behind RMSNorm with eps the exact value is `eps * rstd^3 * <dL/dy * w, h>` (kernels/README.md).  The fraction
is about 1e-8 behind a norm and 1e-2 behind a raw readout (arXiv 2606.24898, Table 3).

Shapes: h, g [..., d]; results [...] float32.  h and g are read once each, in one pass; nothing is saved but them.
Gradients: dh = ddot * g + 2 dstate_square * h;  dg = ddot * h + 2 dgrad_square * g.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import check_rows
from .device import accumulator, cpu_blocks, launch, uses_triton
from .row_norm import CPU_ROW_TENSORS, norm_blocks, rows_of


class RadialGradient(NamedTuple):
    """The result of `radial_gradient`: `dot` = <g, h>, `grad_square` = |g|^2, `state_square` = |h|^2 of every row."""

    dot: Tensor
    grad_square: Tensor
    state_square: Tensor

    @property
    def fraction(self) -> Tensor:
        """|<g, h>| / (|g| |h|) of every row; 0 where g or h is 0."""
        # a product of roots: the product of the squares would leave float32's range for small gradients
        norms = self.grad_square.sqrt() * self.state_square.sqrt()
        return torch.where(norms > 0, self.dot.abs() / norms, 0.0)


def radial_gradient_reference(h: Tensor, grad: Tensor) -> RadialGradient:
    """`radial_gradient` in plain PyTorch: its definition."""
    wide = accumulator(h.dtype)
    h, grad = h.to(wide), grad.to(wide)
    return RadialGradient((grad * h).sum(-1), grad.square().sum(-1), h.square().sum(-1))


# Triton ---------------------------------------------------------------------------------------------------------------


@triton.jit
def radial_forward_kernel(
    h_ptr, grad_ptr, dot_ptr, grad_square_ptr, state_square_ptr,
    n_rows, n_columns, stride_h_row, stride_grad_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_rows = row < n_rows
    inside = in_rows[:, None] & (column < n_columns)[None, :]

    h = tl.load(h_ptr + row[:, None] * stride_h_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row[:, None] * stride_grad_row + column[None, :], mask=inside, other=0.0)
    grad = grad.to(tl.float32)

    tl.store(dot_ptr + row, tl.sum(grad * h, axis=1), mask=in_rows)
    tl.store(grad_square_ptr + row, tl.sum(grad * grad, axis=1), mask=in_rows)
    tl.store(state_square_ptr + row, tl.sum(h * h, axis=1), mask=in_rows)


@triton.jit
def radial_backward_kernel(
    h_ptr, grad_ptr, ddot_ptr, dgrad_square_ptr, dstate_square_ptr, dh_ptr, dgrad_ptr,
    n_rows, n_columns, stride_h_row, stride_grad_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    in_rows = row < n_rows
    inside = in_rows[:, None] & (column < n_columns)[None, :]

    h = tl.load(h_ptr + row[:, None] * stride_h_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row[:, None] * stride_grad_row + column[None, :], mask=inside, other=0.0)
    grad = grad.to(tl.float32)
    ddot = tl.load(ddot_ptr + row, mask=in_rows, other=0.0)[:, None]
    dgrad_square = tl.load(dgrad_square_ptr + row, mask=in_rows, other=0.0)[:, None]
    dstate_square = tl.load(dstate_square_ptr + row, mask=in_rows, other=0.0)[:, None]

    out = row[:, None] * n_columns + column[None, :]
    tl.store(dh_ptr + out, (ddot * grad + 2.0 * dstate_square * h).to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(dgrad_ptr + out, (ddot * h + 2.0 * dgrad_square * grad).to(dgrad_ptr.dtype.element_ty), mask=inside)


# Registration ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("looped::radial_gradient", mutates_args=())
def _radial_gradient(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h_rows, grad_rows = rows_of(h), rows_of(grad)
    dot, grad_square, state_square = sums = [h.new_empty(h.shape[:-1], dtype=accumulator(h.dtype)) for _ in range(3)]
    if not uses_triton(h):
        for rows in cpu_blocks(h_rows.shape[0], CPU_ROW_TENSORS * 4 * h.shape[-1]):
            for out, block in zip(sums, radial_gradient_reference(h_rows[rows], grad_rows[rows]), strict=True):
                out.view(-1)[rows] = block
    elif h_rows.shape[0] > 0:
        blocks = norm_blocks(h.shape[-1])
        launch(
            radial_forward_kernel, (triton.cdiv(h_rows.shape[0], blocks["BLOCK_ROWS"]),), h_rows,
            h_ptr=h_rows, grad_ptr=grad_rows, dot_ptr=dot, grad_square_ptr=grad_square, state_square_ptr=state_square,
            n_rows=h_rows.shape[0], n_columns=h.shape[-1],
            stride_h_row=h_rows.stride(0), stride_grad_row=grad_rows.stride(0), **blocks,
        )  # fmt: skip
    return dot, grad_square, state_square


@_radial_gradient.register_fake
def _(h: Tensor, grad: Tensor):
    rows = [h.new_empty(h.shape[:-1], dtype=accumulator(h.dtype)) for _ in range(3)]
    return rows[0], rows[1], rows[2]


@torch.library.custom_op("looped::radial_gradient_backward", mutates_args=())
def _radial_gradient_backward(
    h: Tensor, grad: Tensor, ddot: Tensor, dgrad_square: Tensor, dstate_square: Tensor
) -> tuple[Tensor, Tensor]:
    if not uses_triton(h):
        wide = accumulator(h.dtype)
        ddot, dgrad_square, dstate_square = (g.to(wide).unsqueeze(-1) for g in (ddot, dgrad_square, dstate_square))
        dh = (ddot * grad + 2 * dstate_square * h).to(h.dtype)
        return dh, (ddot * h + 2 * dgrad_square * grad).to(grad.dtype)
    h_rows, grad_rows = rows_of(h), rows_of(grad)
    dh, dgrad = torch.empty_like(h_rows, memory_format=torch.contiguous_format), grad.new_empty(grad_rows.shape)
    if h_rows.shape[0] > 0:
        blocks = norm_blocks(h.shape[-1])
        launch(
            radial_backward_kernel, (triton.cdiv(h_rows.shape[0], blocks["BLOCK_ROWS"]),), h_rows,
            h_ptr=h_rows, grad_ptr=grad_rows, ddot_ptr=ddot.reshape(-1).contiguous(),
            dgrad_square_ptr=dgrad_square.reshape(-1).contiguous(),
            dstate_square_ptr=dstate_square.reshape(-1).contiguous(), dh_ptr=dh, dgrad_ptr=dgrad,
            n_rows=h_rows.shape[0], n_columns=h.shape[-1],
            stride_h_row=h_rows.stride(0), stride_grad_row=grad_rows.stride(0), **blocks,
        )  # fmt: skip
    return dh.view(h.shape), dgrad.view(grad.shape)


@_radial_gradient_backward.register_fake
def _(h: Tensor, grad: Tensor, ddot: Tensor, dgrad_square: Tensor, dstate_square: Tensor):
    return h.new_empty(h.shape), grad.new_empty(grad.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, ddot, dgrad_square, dstate_square):
    return _radial_gradient_backward(*ctx.saved_tensors, ddot, dgrad_square, dstate_square)


torch.library.register_autograd("looped::radial_gradient", _backward, setup_context=_setup_context)


def radial_gradient(h: Tensor, grad: Tensor) -> RadialGradient:
    """<g, h>, |g|^2 and |h|^2 of every row, in one read of both.

    Args:
        h: states [..., d], float32, bfloat16 or float16 (float64 too on CPU), any strides.
        grad: the gradient of a loss with respect to h, of the same shape and device.

    Returns:
        `dot`, `grad_square`, `state_square`, each [...] float32 and differentiable; the property `fraction` is
        |dot| / (|g| |h|), 0 where either is 0: the share of the gradient that can change the state's scale
        (arXiv 2606.24898).

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.
    """
    check_rows("h", h)
    check_rows("grad", grad)
    if grad.shape != h.shape:
        raise ValueError(f"grad must have h's shape {tuple(h.shape)}. Got {tuple(grad.shape)}.")
    if grad.device != h.device:
        raise ValueError(f"grad must be on h's device {h.device}. Got {grad.device}.")
    return RadialGradient(*_radial_gradient(h, grad))
