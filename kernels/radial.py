"""The radial part of a gradient: how much of dL/dh points along h itself.

    dot = <g, h>,   grad_square = |g|^2,   state_square = |h|^2,   fraction = |dot| / (|g| |h|)

A loss that reads h through a scale-invariant map has <g, h> = 0 (Euler): its gradient cannot change the scale of
h.  Behind RMSNorm with eps the exact value is `eps * rstd^3 * <dL/dy * w, h>` (kernels/README.md).  The fraction
is about 1e-8 behind a norm and 1e-2 behind a raw readout (arXiv 2606.24898, Table 3).

Shapes: h, g [..., d]; results [...] float32.  h and g are read once each, in one pass; nothing is saved but them.
Gradients: dh = ddot * g + 2 dstate_square * h;  dg = ddot * h + 2 dgrad_square * g.
Range: `dot` and the squares are float32, so they are 0 or inf where the truth leaves [1e-45, 3.4e38].  The fraction is
formed from rows that are scaled first, and holds for all finite rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_rows
from .device import accumulator, cpu_blocks, implementation, uses_triton
from .registration import refuse_create_graph, register
from .row_norm import CPU_ROW_TENSORS, radial_fraction, rows_of


class _Sums(NamedTuple):
    dot: Tensor
    grad_square: Tensor
    state_square: Tensor


class RadialGradient(_Sums):
    """The result of `radial_gradient`: `dot` = <g, h>, `grad_square` = |g|^2, `state_square` = |h|^2 of every row.

    fraction: |<g, h>| / (|g| |h|) of every row, detached; 0 where g or h is 0, nan where either has a nan.
    """

    fraction: Tensor

    def __new__(cls, dot: Tensor, grad_square: Tensor, state_square: Tensor, fraction: Tensor) -> "RadialGradient":
        result = super().__new__(cls, dot, grad_square, state_square)
        result.fraction = fraction
        return result


def radial_gradient_reference(h: Tensor, grad: Tensor) -> RadialGradient:
    """`radial_gradient` in plain PyTorch: its definition."""
    wide = accumulator(h.dtype)
    h, grad = h.to(wide), grad.to(wide)
    fraction = radial_fraction(grad.detach(), h.detach())
    return RadialGradient((grad * h).sum(-1), grad.square().sum(-1), h.square().sum(-1), fraction)


def _forward(h: Tensor, grad: Tensor):
    h_rows, grad_rows = rows_of(h), rows_of(grad)
    sums = [h.new_empty(h.shape[:-1], dtype=accumulator(h.dtype)) for _ in range(4)]
    if not uses_triton(h):
        for rows in cpu_blocks(h_rows.shape[0], CPU_ROW_TENSORS * 4 * h.shape[-1]):
            result = radial_gradient_reference(h_rows[rows], grad_rows[rows])
            for out, block in zip(sums, (*result, result.fraction), strict=True):
                out.view(-1)[rows] = block
    elif h_rows.shape[0] > 0:
        implementation("radial_triton").radial_forward(h_rows, grad_rows, sums)
    return tuple(sums)


def _forward_fake(h: Tensor, grad: Tensor):
    return tuple(h.new_empty(h.shape[:-1], dtype=accumulator(h.dtype)) for _ in range(4))


def _backward(h: Tensor, grad: Tensor, ddot: Tensor, dgrad_square: Tensor, dstate_square: Tensor):
    h_rows, grad_rows = rows_of(h), rows_of(grad)
    wide = accumulator(h.dtype)
    upstream = [g.reshape(-1).to(wide).contiguous() for g in (ddot, dgrad_square, dstate_square)]
    dh, dgrad = h.new_empty(h.shape), grad.new_empty(grad.shape)
    if not uses_triton(h):
        of_dot, of_grad, of_state = (g.unsqueeze(-1) for g in upstream)
        dh.view(h_rows.shape).copy_(of_dot * grad_rows + 2 * of_state * h_rows)
        dgrad.view(h_rows.shape).copy_(of_dot * h_rows + 2 * of_grad * grad_rows)
    elif h_rows.shape[0] > 0:
        implementation("radial_triton").radial_backward(h_rows, grad_rows, upstream, dh, dgrad)
    return dh, dgrad


def _backward_fake(h: Tensor, grad: Tensor, ddot: Tensor, dgrad_square: Tensor, dstate_square: Tensor):
    return h.new_empty(h.shape), grad.new_empty(grad.shape)


class _RadialGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, grad):
        ctx.save_for_backward(h, grad)
        results = _radial_gradient.below_autograd(h, grad)
        ctx.mark_non_differentiable(results[3])
        return results

    @staticmethod
    def backward(ctx, ddot, dgrad_square, dstate_square, _):
        refuse_create_graph()
        return _radial_gradient_backward(*ctx.saved_tensors, ddot, dgrad_square, dstate_square)


_radial_gradient = register(
    "radial_gradient(Tensor h, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _RadialGradient,
)
_radial_gradient_backward = register(
    "radial_gradient_backward(Tensor h, Tensor grad, Tensor ddot, Tensor dgrad_square, Tensor dstate_square)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def radial_gradient(h: Tensor, grad: Tensor) -> RadialGradient:
    """<g, h>, |g|^2 and |h|^2 of every row, in one read of both.

    Args:
        h: states [..., d], float32, bfloat16 or float16 (float64 too on CPU), any strides.
        grad: the gradient of a loss with respect to h, of the same shape and device.

    Returns:
        `dot`, `grad_square`, `state_square`, each [...] float32 and differentiable.  The attribute `fraction` [...]
        is |dot| / (|g| |h|), 0 where either is 0: the share of the gradient that can change the state's scale
        (arXiv 2606.24898).  It is detached.

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
