"""One block of the decoder: attention and SwiGLU, each behind a norm and added to the residual stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from looped.attention import SelfAttention
from looped.config import LoopedConfig
from looped.context import Context
from looped.dropout import dropout
from looped.implementation import FORWARDS, Implementation, does_only
from looped.kernels.device import uses_triton
from looped.kernels.registration import is_plain
from looped.normed_products import AttentionWeights, SwiGLUWeights, normed_heads, normed_swiglu, product
from looped.shared_weight import shared


class SwiGLU(nn.Module):
    """`w2(silu(w1 y) * w3 y)` of y = norm(x + delta), no biases."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor, delta: Tensor | None, norm: nn.RMSNorm, context: Context) -> tuple[Tensor, Tensor]:
        """SwiGLU's result, and x + delta; all [B, T, d]. delta may be None, which is 0."""
        y, x = context.implementation.add_and_normalise(x, delta, norm)
        return self.w2(context.implementation.glu(self.w1(y), self.w3(y))), x


# As FORWARDS.
PARTS: dict[type[nn.Module], Callable[..., Any]] = {kind: kind.forward for kind in (SelfAttention, SwiGLU)}


class Block(nn.Module):
    """`x + F(RMSNorm(x))` for F = attention, then for F = Dropout(SwiGLU). `config.block_norm` may add a second norm:

        pre           x + F(Norm(x))
        sandwich      x + Norm'(F(Norm(x)))       Gemma 2, Ouro (arXiv 2510.25741)
        sandwich-sum  Norm'(x + F(Norm(x)))       Huginn (arXiv 2502.05171)

    The residual stream travels as a pair (x, delta) whose sum it is, so that each addition can be done by the norm
    that reads its result. delta is None where there is nothing to add.
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.block_norm = config.block_norm
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        if config.block_norm != "pre":
            self.attention_output_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
            self.mlp_output_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        weights = context.shared_weights(self, self._share)
        if weights is not None:
            x, delta = self._joined(x, delta, context, *weights)
        else:
            delta, x = self.attention(x, delta, self.attention_norm, context)
            if self.block_norm != "pre":
                x, delta = self._second_norm(x, delta, self.attention_output_norm, context)
            delta, x = self.mlp(x, delta, self.mlp_norm, context)
        delta = dropout(delta, self.dropout if self.training else 0.0)
        if self.block_norm != "pre":
            x, delta = self._second_norm(x, delta, self.mlp_output_norm, context)
        return x, delta

    def _joined(
        self, x: Tensor, delta: Tensor | None, context: Context, attention: AttentionWeights, mlp: SwiGLUWeights
    ) -> tuple[Tensor, Tensor]:
        """The same by the nodes of looped/normed_products.py, up to the dropout."""
        q, k, v, x = normed_heads(x, delta, attention, self.attention_norm.eps, self.attention.n_heads)
        mixed = self.attention.mix(q, k, v, context)
        if self.block_norm == "pre":
            delta, x = normed_swiglu(x, mixed, mlp, self.mlp_norm.eps, attention.output)
        else:
            attended = product(mixed, attention.output)
            x, delta = self._second_norm(x, attended, self.attention_output_norm, context)
            delta, x = normed_swiglu(x, delta, mlp, self.mlp_norm.eps)
        return x, delta

    def _share(self) -> tuple[AttentionWeights, SwiGLUWeights] | None:
        """The weights as all loops read them; None where a part is asked for more than PyTorch's own operations.

        FSDP2, which gathers weights when a part of the block is called, makes a class of its own of that part.
        """
        attention, mlp = self.attention, self.mlp
        if _has_any_global_hook() or not (does_only(attention, PARTS) and does_only(mlp, PARTS)):
            return None
        modules = attention.qkv, attention.output, mlp.w1, mlp.w3, mlp.w2, self.attention_norm, self.mlp_norm
        layers = [module._parameters for module in modules if does_only(module, FORWARDS)]
        found = [layer.get("weight") for layer in layers if layer.get("bias") is None]
        weights = [weight for weight in found if weight is not None]
        if len(weights) < len(modules) or None in (self.attention_norm.eps, self.mlp_norm.eps):
            return None
        if not is_plain(weights) or (weights[0].dtype == torch.float64 and uses_triton(weights[0])):
            return None
        qkv, output, w1, w3, w2, *norms = weights
        (attention_norm, mlp_norm), products = shared(norms, [[qkv], [output], [w1, w3], [w2]])
        return AttentionWeights(attention_norm, *products[:2]), SwiGLUWeights(mlp_norm, *products[2:])

    def _second_norm(
        self, x: Tensor, delta: Tensor, norm: nn.RMSNorm, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """The stream (x, delta) after the sublayer's second norm."""
        if self.block_norm == "sandwich":
            return x, context.implementation.add_and_normalise(delta, None, norm)[0]
        return normalised_stream(x, delta, norm, context.implementation), None


def normalised_stream(x: Tensor, delta: Tensor | None, norm: nn.RMSNorm, implementation: Implementation) -> Tensor:
    """RMSNorm(x + delta) as the residual stream itself: in x's dtype, which autocast must not round."""
    with torch.autocast(x.device.type, enabled=False):
        return implementation.add_and_normalise(x, None if delta is None else delta.to(x.dtype), norm)[0]
