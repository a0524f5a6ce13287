"""A norm and the products that read it, as one node of autograd's graph.

    h = x + delta,   y = RMSNorm(h)
    heads:    q, k, v = y W^T,   W = (Wq; Wk; Wv)
    SwiGLU:   (gate, up) = y (W1; W3)^T,   z = (silu(gate) * up) W2^T

The kernels, the products and what is saved are those of the operations one by one: `rms_norm_penalty`, linear layers,
`swiglu`.  It is the host's time that is saved.  A node that is written in Python takes the host as long as three or
four launches, recorded and run backward; with one for each norm and each SwiGLU, a step in which the host decides took
a third longer than plain PyTorch's.  A node that has the products in it stands for those of PyTorch, too.
TransformerEngine draws the same lines (LayerNormLinear, LayerNormMLP).

Fewer products and bytes: W1 and W3 are read as one matrix, dx through h and past it is summed by the norm's kernel, and
the weights' gradients over the loops by their products (looped/shared_weight.py).

x, the residual stream, and delta, which may be None for 0, are [B, T, d] and need not have one dtype.  Products are in
the weights' dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from looped.kernels.registration import AUTOCAST, AUTOGRAD, PLAIN
from looped.kernels.row_norm import NormBackward, NormForward, norm_backward, norm_forward
from looped.kernels.swiglu import swiglu_backward, swiglu_forward
from looped.shared_weight import SharedWeight

# A gradient is not differentiated again, and all is in the dtype that autocast has chosen.
BELOW = AUTOCAST | AUTOGRAD
without = torch._C._ExcludeDispatchKeyGuard


def are_bare(linears: list[nn.Linear]) -> bool:
    """Whether a product with its weight is all that each of these layers does.

    Not a layer of another class, nor one with a bias or hooks, nor a weight that is another kind of tensor, as DTensor.
    """
    return all(map(_is_bare, linears))


def _is_bare(linear: nn.Linear) -> bool:
    if type(linear) is not nn.Linear or linear.bias is not None:
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    return type(linear.weight) in PLAIN or not is_traceable_wrapper_subclass(linear.weight)


def _normalise(
    ctx: Any, x: Tensor, delta: Tensor | None, norm_weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y as rows [B * T, d], and h [B, T, d]."""
    ctx.eps, ctx.delta_dtype = eps, None if delta is None else delta.dtype
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if delta is None:
        h = x
        norm_forward(NormForward(x, None, norm_weight, y=y), eps, "rmsnorm")
    else:
        h = torch.empty_like(x)
        norm_forward(NormForward(delta.contiguous(), x, norm_weight, y=y, total=h), eps, "rmsnorm")
    return y.view(-1, y.shape[-1]), h


def _normalise_backward(
    ctx: Any, dy: Tensor, dh_past: Tensor, h: Tensor, norm_weight: Tensor, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and delta. dh_past: that of h without the norm's."""
    dh = torch.empty_like(h)
    dtype = ctx.delta_dtype
    ddelta = None if dtype is None or dtype == h.dtype else torch.empty_like(h, dtype=dtype)
    partial, add = ctx.norm_gradient.partial_sums(h) if need_dweight else (None, False)
    tensors = NormBackward(
        dy.view(h.shape), h, norm_weight, dtotal=dh_past.contiguous(), dh=dh, dx=ddelta, dweight=partial
    )
    norm_backward(tensors, ctx.eps, "rmsnorm", add=add)
    return dh, (dh if ddelta is None else ddelta) if dtype is not None else None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, norm_weight, weight, norm_gradient, gradient, eps, n_heads):
        y, h = _normalise(ctx, x, delta, norm_weight, eps, weight.dtype)
        q, k, v = F.linear(y, weight).view(*x.shape[:-1], 3, n_heads, -1).unbind(-3)
        ctx.norm_gradient, ctx.gradient = norm_gradient, gradient
        ctx.save_for_backward(y, h, norm_weight, weight)
        return q, k, v, h

    @staticmethod
    def backward(ctx, dq, dk, dv, dh):
        y, h, norm_weight, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = ddelta = None
        with without(BELOW):
            g = torch.stack((dq, dk, dv), -3).view(len(y), -1)
            if needs[3]:
                ctx.gradient.add_product(g, y)
            if any(needs[:3]):
                dx, ddelta = _normalise_backward(ctx, torch.mm(g, weight), dh, h, norm_weight, needs[2])
        return dx, ddelta, None, None, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, norm_weight, w13, w2, norm_gradient, gradient13, gradient2, eps):
        y, h = _normalise(ctx, x, delta, norm_weight, eps, w13.dtype)
        both = F.linear(y, w13)
        hidden = swiglu_forward(*both.chunk(2, -1))
        ctx.norm_gradient, ctx.gradient13, ctx.gradient2 = norm_gradient, gradient13, gradient2
        ctx.save_for_backward(y, h, norm_weight, w13, w2, both, hidden)
        return F.linear(hidden, w2).view(x.shape), h

    @staticmethod
    def backward(ctx, dz, dh):
        y, h, norm_weight, w13, w2, both, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = ddelta = None
        with without(BELOW):
            dz = dz.reshape(len(y), -1)
            if needs[4]:
                ctx.gradient2.add_product(dz, hidden)
            g = torch.empty_like(both)
            swiglu_backward(torch.mm(dz, w2), *both.chunk(2, -1), *g.chunk(2, -1))
            if needs[3]:
                ctx.gradient13.add_product(g, y)
            if any(needs[:3]):
                dx, ddelta = _normalise_backward(ctx, torch.mm(g, w13), dh, h, norm_weight, needs[2])
        return dx, ddelta, None, None, None, None, None, None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gradient):
        ctx.gradient = gradient
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dz):
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, _ = ctx.needs_input_grad
        with without(BELOW):
            dz = dz.reshape(-1, len(weight))
            if need_dweight:
                ctx.gradient.add_product(dz, x.reshape(len(dz), -1))
            return torch.mm(dz, weight).view(x.shape) if need_dx else None, None, None


def normed_heads(
    x: Tensor, delta: Tensor | None, eps: float | None, norm: SharedWeight, weight: SharedWeight, n_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v [B, T, H, head_dim] of norm(x + delta), and x + delta in x's dtype. weight: [3 d, d]."""
    return _Heads.apply(x, delta, norm.read, weight.read, norm.gradient, weight.gradient, eps, n_heads)


def normed_swiglu(
    x: Tensor, delta: Tensor | None, eps: float | None, norm: SharedWeight, w13: SharedWeight, w2: SharedWeight
) -> tuple[Tensor, Tensor]:
    """SwiGLU of norm(x + delta), [B, T, d], and x + delta in x's dtype. w13: (W1; W3) [2 d_ff, d]; w2: [d, d_ff]."""
    gradients = norm.gradient, w13.gradient, w2.gradient
    return _SwiGLU.apply(x, delta, norm.read, w13.read, w2.read, *gradients, eps)


def product(x: Tensor, weight: SharedWeight) -> Tensor:
    """x W^T [..., out] of x [..., in] and W [out, in]."""
    return _Product.apply(x, weight.read, weight.gradient)
