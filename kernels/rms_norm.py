"""`rms_norm_penalty`: RMSNorm of rows and their mean square, with an optional fused residual add.

    h = x + residual,   mean_square = mean_c h_c^2,   y = w * h * (mean_square + eps)^(-1/2)

The gradients and the kernels stand in kernels/row_norm.py; here are the definition in plain PyTorch, the registration
and the public function.  Saved for the backward pass: h and w.  RMSNorm: Zhang & Sennrich, arXiv 1910.07467.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_number, check_rows, check_vector, gathered
from .device import accumulator, autocast_dtype
from .registration import refuse_create_graph, register
from .row_norm import NormBackward, NormForward, norm_backward, norm_forward, partial_sums, summed


class RMSNormPenalty(NamedTuple):
    """The result of `rms_norm_penalty`."""

    y: Tensor
    mean_square: Tensor
    residual: Tensor | None


def rms_norm_penalty_reference(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> RMSNormPenalty:
    """`rms_norm_penalty` in plain PyTorch: its definition."""
    h = x if residual is None else (x + residual).to(residual.dtype)
    wide = h.to(accumulator(h.dtype))
    mean_square = wide.square().mean(-1)
    y = wide * torch.rsqrt(mean_square + eps).unsqueeze(-1)
    if weight is not None:
        y = y * weight
    return RMSNormPenalty(y.to(autocast_dtype(x)), mean_square, None if residual is None else h)


# Registration ---------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, y_dtype: torch.dtype):
    """y, mean_square, and with a residual the sum."""
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x, dtype=y_dtype)
    mean_square = x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))
    total = None if residual is None else torch.empty_like(residual)
    norm_forward(NormForward(x, residual, weight, y=y, total=total, mean_square=mean_square), eps, "rmsnorm")
    return [y, mean_square] if total is None else [y, mean_square, total]


def _forward_fake(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, y_dtype: torch.dtype):
    results = [x.new_empty(x.shape, dtype=y_dtype), x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))]
    return results if residual is None else [*results, x.new_empty(x.shape, dtype=residual.dtype)]


def _backward(
    dy: Tensor | None, dmean_square: Tensor | None, dtotal: Tensor | None, h: Tensor, weight: Tensor | None,
    eps: float, x_dtype: torch.dtype, need_dweight: bool,
):  # fmt: skip
    """dh; dx, if x_dtype is not h's dtype; and the gradient of the weight, if needed."""
    h = h.contiguous()
    dy, dmean_square, dtotal, weight = [t if t is None else t.contiguous() for t in (dy, dmean_square, dtotal, weight)]
    dh = torch.empty_like(h)
    dx = None if x_dtype == h.dtype else torch.empty_like(h, dtype=x_dtype)
    dweight = partial_sums(h) if need_dweight else None
    tensors = NormBackward(dy, h, weight, dmean_square=dmean_square, dtotal=dtotal, dh=dh, dx=dx, dweight=dweight)
    norm_backward(tensors, eps, "rmsnorm")
    results = [dh] if dx is None else [dh, dx]
    if dweight is not None and weight is not None:
        results.append(summed(dweight, weight))
    return results


def _backward_fake(dy, dmean_square, dtotal, h, weight, eps, x_dtype, need_dweight):
    results = [h.new_empty(h.shape, dtype=dtype) for dtype in dict.fromkeys((h.dtype, x_dtype))]
    return [*results, weight.new_empty(weight.shape)] if need_dweight else results


class _RMSNormPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, y_dtype):
        results = _rms_norm_penalty.below_autograd(x, weight, residual, eps, y_dtype)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.x_dtype, ctx.has_residual = eps, x.dtype, residual is not None
        ctx.save_for_backward(x if residual is None else results[2], weight)
        return tuple(results)

    @staticmethod
    def backward(ctx, dy, dmean_square, dtotal=None):
        refuse_create_graph()
        h, weight = ctx.saved_tensors
        if dy is None and dmean_square is None and dtotal is None:
            return None, None, None, None, None
        need_dweight = weight is not None and ctx.needs_input_grad[1] and dy is not None
        results = _rms_norm_penalty_backward(dy, dmean_square, dtotal, h, weight, ctx.eps, ctx.x_dtype, need_dweight)
        dweight = results.pop() if need_dweight else None
        return results[-1], dweight, results[0] if ctx.has_residual else None, None, None


# An op whose results change gets another name: graphs that torch.compile keeps on disk know ops by their names alone.
_rms_norm_penalty = register(
    "rms_norm_mean_square(Tensor x, Tensor? weight, Tensor? residual, float eps, ScalarType y_dtype) -> Tensor[]",
    _forward,
    _forward_fake,
    _RMSNormPenalty,
)
_rms_norm_penalty_backward = register(
    "rms_norm_mean_square_backward(Tensor? dy, Tensor? dmean_square, Tensor? dtotal, Tensor h, Tensor? weight,"
    " float eps, ScalarType x_dtype, bool need_dweight) -> Tensor[]",
    _backward,
    _backward_fake,
)


# The public function --------------------------------------------------------------------------------------------------


def rms_norm_penalty(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> RMSNormPenalty:
    """RMSNorm of rows and their mean square in one pass, with the residual add fused in where one is given.

        h = x + residual;  mean_square = mean_c h_c^2;  y = weight * h * (mean_square + eps)^(-1/2)

    Args:
        x: [..., d], float32, bfloat16 or float16 (float64 too on CPU), any strides.
        weight: [d] of any floating dtype, or None for 1.
        eps: added to the mean square.
        residual: [..., d] like x, of any dtype that x may have: the residual stream that x is added to.

    Returns:
        `y` [..., d] in x's dtype (under autocast: in its dtype, as a matrix product would take it);
        `mean_square` [...] float32, differentiable, so that `penalty * mean_square.mean()` controls the scale of h;
        `residual`: the sum h in the residual's dtype, or None where there is no residual.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit; eps < 0.

    Gradients flow to x, weight and residual from all three results.  The equations and their source stand in
    kernels/README.md.
    """
    check_rows("x", x)
    weight = gathered(weight)
    check_vector("weight", weight, x, x.shape[-1])
    check_number("eps", eps, 0)
    if residual is not None:
        check_rows("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}. Got {tuple(residual.shape)}.")
        if residual.device != x.device:
            raise ValueError(f"residual must be on x's device {x.device}. Got {residual.device}.")
    y, mean_square, *total = _rms_norm_penalty(x, weight, residual, eps, autocast_dtype(x))
    return RMSNormPenalty(y, mean_square, total[0] if total else None)
