"""One block of the decoder: attention and SwiGLU, each behind a norm and added to the residual stream."""

import torch
from torch import Tensor, nn

from looped.attention import SelfAttention
from looped.config import LoopedConfig
from looped.context import Context
from looped.dropout import dropout
from looped.implementation import Implementation


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) * w3 x)`, no biases."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.w2(context.implementation.glu(self.w1(x), self.w3(x)))


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
        add_and_normalise = context.implementation.add_and_normalise
        normalised, x = add_and_normalise(x, delta, self.attention_norm)
        delta = self.attention(normalised, context)
        if self.block_norm != "pre":
            x, delta = self._second_norm(x, delta, self.attention_output_norm, context)
        normalised, x = add_and_normalise(x, delta, self.mlp_norm)
        delta = dropout(self.mlp(normalised, context), self.dropout if self.training else 0.0)
        if self.block_norm != "pre":
            x, delta = self._second_norm(x, delta, self.mlp_output_norm, context)
        return x, delta

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
