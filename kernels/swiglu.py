"""`swiglu`: SwiGLU's product of a gate and a value, and its gradient, one pass each way.

    y = silu(gate) * up,   silu(g) = g * sigmoid(g)
    dup = dy * silu(gate),   dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Shapes: gate, up and y [...], of one dtype.  On a GPU all arithmetic is in float32, with one rounding at the store; on a
CPU it is PyTorch's own, operation by operation, so that the bits are those of the definition and its gradient.
Saved for the backward pass: gate and up; silu(gate) is formed again.
Elements moved: forward reads 2 and writes 1; backward reads 3 and writes 2.  Without a gradient of `up` it writes one
less, without one of `gate` it also reads one less.

SwiGLU: Shazeer, arXiv 2002.05202.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_values
from .device import implementation, uses_triton
from .registration import refuse_create_graph, register


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch: its definition."""
    return F.silu(gate) * up


def _as_rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Both as rows of one stride, whose columns are contiguous, and the columns and stride; a copy only where needed.

    Contiguous tensors are one long row.  The two halves of one [..., 2 f] are rows of f at a stride of 2 f.
    """
    if gate.stride() == up.stride() and not gate.is_contiguous() and gate.stride(-1) == 1:
        if gate.dim() != 2:
            gate, up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        return gate, up, gate.shape[-1], gate.stride(0)
    return gate.contiguous(), up.contiguous(), gate.numel(), gate.numel()


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    if not uses_triton(gate):
        return F.silu(gate).mul_(up).contiguous()
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        gate, up, n_columns, stride = _as_rows(gate, up)
        implementation("swiglu_triton").swiglu_forward((gate, up, y), n_columns, stride)
    return y


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None) -> None:
    """Write those gradients that are given: both contiguous, or both the halves of one [rows, 2 f]."""
    if not uses_triton(gate):
        if dgate is not None:
            torch.mul(dy, up, out=dgate)
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        if dup is not None:
            torch.ops.aten.silu.out(gate, out=dup).mul_(dy)
    elif gate.numel() > 0:
        gate, up, n_columns, stride = _as_rows(gate, up)
        written = dup if dgate is None else dgate
        stride_gradient = n_columns if written is None or written.is_contiguous() else written.stride(0)
        tensors = dy.contiguous(), gate, up, dgate, dup
        implementation("swiglu_triton").swiglu_backward(tensors, n_columns, stride, stride_gradient)


def _backward(dy: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool):
    """dgate and dup; empty where not needed."""
    dgate, dup = (gate.new_empty(gate.shape if needed else 0) for needed in (need_dgate, need_dup))
    swiglu_backward(dy, gate, up, dgate if need_dgate else None, dup if need_dup else None)
    return dgate, dup


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool):
    return tuple(gate.new_empty(gate.shape if needed else 0) for needed in (need_dgate, need_dup))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu.below_autograd(gate, up)

    @staticmethod
    def backward(ctx, dy):
        refuse_create_graph()
        need_dgate, need_dup = ctx.needs_input_grad
        dgate, dup = _swiglu_backward(dy, *ctx.saved_tensors, need_dgate, need_dup)
        return dgate if need_dgate else None, dup if need_dup else None


_swiglu = register("swiglu(Tensor gate, Tensor up) -> Tensor", swiglu_forward, _forward_fake, _SwiGLU)
_swiglu_backward = register(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, bool need_dgate, bool need_dup) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` in one pass, and its gradient in one.

    Args:
        gate: [...], float32, bfloat16 or float16 (float64 too on CPU).  Contiguous tensors and the two halves of one
            [..., 2 f] are read where they are; other layouts are copied first.
        up: of the same shape, dtype and device.

    Returns:
        [...] in their dtype, contiguous.  Under autocast too: a matrix product has given both its dtype by then.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.
    """
    check_values("gate", gate)
    check_values("up", up)
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(gate, what), getattr(up, what)
        if got != expected:
            expected, got = (tuple(x) if what == "shape" else x for x in (expected, got))
            raise (TypeError if what == "dtype" else ValueError)(f"up must have gate's {what} {expected}. Got {got}.")
    y: Tensor = _swiglu(gate, up)
    return y
