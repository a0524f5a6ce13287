"""A norm and the products that read it, as one node of autograd's graph.

    h = x + delta,   y = RMSNorm(h)
    heads:    q, k, v = y W^T,   W = (Wq; Wk; Wv)
    SwiGLU:   (gate, up) = y (W1; W3)^T,   z = (silu(gate) * up) W2^T;   before it, delta = mixed Wo^T

What is computed is that of the operations one by one: `rms_norm_penalty`, linear layers, `swiglu`.  So is what is
saved, but for frozen weights.  It is the host's time that is less.  A node that is written in Python takes the host as
long as three or four launches, recorded and run backward.  With one for each norm and each SwiGLU, a step in which the
host decides took a third longer than plain PyTorch's.  A node that has the products in it stands for those of PyTorch,
too.  TransformerEngine draws the same lines (LayerNormLinear, LayerNormMLP).  Attention's last product, with Wo,
belongs to the node of SwiGLU, unless a second norm stands between them.

There is less to do on the GPU, too:

- gate and up are one product, and so are their gradients with respect to y and to the weights;
- the gradients of x that come through the norm and past it are summed by the norm's kernel;
- the gradients of weights are summed over the loops by their products (looped/shared_weight.py).

x, the residual stream, delta, which may be None for 0, and mixed, the values as attention's heads mix them, are
[B, T, d].  x and delta need not have one dtype.  Products are in the weights' dtype.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from looped.kernels.registration import AUTOCAST, recording, refuse_create_graph
from looped.kernels.row_norm import NormBackward, NormForward, norm_backward, norm_forward
from looped.kernels.swiglu import swiglu_backward, swiglu_forward
from looped.shared_weight import NormSum, SharedNorm, SharedProduct, wanted

NO_GUARD = contextlib.nullcontext()


def _first_derivative(ctx: Any) -> Any:
    """What a backward pass runs in: without autocast, as all is in the dtype that the forward pass has chosen."""
    refuse_create_graph()
    if not isinstance(ctx, BackwardCFunction):
        raise RuntimeError("under compiled autograd the forward pass must be compiled, too.")
    return torch._C._ExcludeDispatchKeyGuard(AUTOCAST) if torch._C._is_any_autocast_enabled() else NO_GUARD


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
    ctx: Any, dy: Tensor, dh_past: Tensor, h: Tensor, norm_weight: Tensor, norm_sum: NormSum | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and delta. dh_past: that of h without the norm's. norm_sum: None if it is not needed."""
    dh = torch.empty_like(h)
    dtype = ctx.delta_dtype
    ddelta = None if dtype is None or dtype == h.dtype else torch.empty_like(h, dtype=dtype)
    partial, add = (None, False) if norm_sum is None else norm_sum.partial_sums(h)
    tensors = NormBackward(
        dy.view(h.shape), h, norm_weight, dtotal=dh_past.contiguous(), dh=dh, dx=ddelta, dweight=partial
    )
    norm_backward(tensors, ctx.eps, "rmsnorm", add=add)
    return dh, (dh if ddelta is None else ddelta) if dtype is not None else None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, norm_weight, weight, sums, eps, n_heads):
        y, h = _normalise(ctx, x, delta, norm_weight, eps, weight.dtype)
        q, k, v = F.linear(y, weight).view(*x.shape[:-1], 3, n_heads, -1).unbind(-3)
        ctx.sums, ctx.nodes = sums, (norm_weight.grad_fn, weight.grad_fn)
        ctx.save_for_backward(y, h, norm_weight, weight)
        return q, k, v, h

    @staticmethod
    def backward(ctx, dq, dk, dv, dh):
        dx = ddelta = None
        with _first_derivative(ctx):
            y, h, norm_weight, weight = ctx.saved_tensors
            norm_sum, weight_sum = map(wanted, ctx.sums, ctx.nodes)
            g = torch.stack((dq, dk, dv), -3).view(y.shape[0], -1)
            if weight_sum is not None:
                weight_sum.add(g, y)
            if norm_sum is not None or any(ctx.needs_input_grad[:2]):
                dx, ddelta = _normalise_backward(ctx, torch.mm(g, weight), dh, h, norm_weight, norm_sum)
        return dx, ddelta, None, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, output, norm_weight, w13, w2, sums, eps):
        mixed = None
        if output is not None:
            mixed, delta = delta, F.linear(delta, output)
        y, h = _normalise(ctx, x, delta, norm_weight, eps, w13.dtype)
        both = F.linear(y, w13)
        hidden = swiglu_forward(*both.chunk(2, -1))
        ctx.sums = sums
        ctx.nodes = [None if weight is None else weight.grad_fn for weight in (output, norm_weight, w13, w2)]
        ctx.save_for_backward(mixed, y, h, output, norm_weight, w13, w2, both, hidden)
        return F.linear(hidden.view(*x.shape[:-1], -1), w2), h

    @staticmethod
    def backward(ctx, dz, dh):
        dx = ddelta = None
        with _first_derivative(ctx):
            mixed, y, h, output, norm_weight, w13, w2, both, hidden = ctx.saved_tensors
            output_sum, norm_sum, sum13, sum2 = map(wanted, ctx.sums, ctx.nodes)
            dz = dz.reshape(y.shape[0], -1)
            if sum2 is not None:
                sum2.add(dz, hidden)
            g = torch.empty_like(both)
            swiglu_backward(torch.mm(dz, w2), *both.chunk(2, -1), *g.chunk(2, -1))
            if sum13 is not None:
                sum13.add(g, y)
            if output_sum is not None or norm_sum is not None or any(ctx.needs_input_grad[:2]):
                dx, ddelta = _normalise_backward(ctx, torch.mm(g, w13), dh, h, norm_weight, norm_sum)
            if mixed is not None and ddelta is not None:
                ddelta = ddelta.view(y.shape)
                if output_sum is not None:
                    output_sum.add(ddelta, mixed.reshape(y.shape[0], -1))
                ddelta = torch.mm(ddelta, output).view(mixed.shape) if ctx.needs_input_grad[1] else None
        return dx, ddelta, None, None, None, None, None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, sum):
        ctx.sum, ctx.node = sum, weight.grad_fn
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dz):
        with _first_derivative(ctx):
            x, weight = ctx.saved_tensors
            dz = dz.reshape(-1, weight.shape[0])
            if wanted(ctx.sum, ctx.node) is not None:
                ctx.sum.add(dz, x.reshape(dz.shape[0], -1))
            return torch.mm(dz, weight).view(x.shape) if ctx.needs_input_grad[0] else None, None, None


_heads, _swiglu, _product = map(recording, (_Heads, _SwiGLU, _Product))


class AttentionWeights(NamedTuple):
    """The weights of attention. qkv: (Wq; Wk; Wv) [3 d, d]; output: [d, d]."""

    norm: SharedNorm
    qkv: SharedProduct
    output: SharedProduct


class SwiGLUWeights(NamedTuple):
    """The weights of SwiGLU. w13: (W1; W3) [2 d_ff, d]; w2: [d, d_ff]."""

    norm: SharedNorm
    w13: SharedProduct
    w2: SharedProduct


def normed_heads(
    x: Tensor, delta: Tensor | None, weights: AttentionWeights, eps: float | None, n_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v [B, T, H, head_dim] of norm(x + delta), and x + delta in x's dtype."""
    norm, qkv, _ = weights
    return _heads(x, delta, norm.read, qkv.read, (norm.gradient, qkv.gradient), eps, n_heads)


def normed_swiglu(
    x: Tensor, delta: Tensor | None, weights: SwiGLUWeights, eps: float | None, output: SharedProduct | None = None
) -> tuple[Tensor, Tensor]:
    """SwiGLU of norm(x + delta), [B, T, d], and x + delta in x's dtype.

    output: attention's last matrix Wo, where delta is mixed Wo^T, and mixed is given in its place.
    """
    read, sums = zip(output or (None, None), *weights, strict=True)
    return _swiglu(x, delta, *read, sums, eps)


def product(x: Tensor, weight: SharedProduct) -> Tensor:
    """x W^T [..., out] of x [..., in] and W [out, in]."""
    return _product(x, weight.read, weight.gradient)
