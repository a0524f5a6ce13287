"""One block of the decoder: attention and SwiGLU, each behind a norm and added to the residual stream."""

from torch import Tensor, nn

from looped.attention import SelfAttention
from looped.config import LoopedConfig
from looped.context import Context
from looped.dropout import dropout


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
    """`x + Attn(RMSNorm(x))`, then `x + Dropout(SwiGLU(RMSNorm(x)))`.

    The residual stream travels as a pair (x, delta) whose sum it is, so that each addition can be done by the norm
    that reads its result. delta is None at the start of a loop.
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        add_and_normalise = context.implementation.add_and_normalise
        normalised, x = add_and_normalise(x, delta, self.attention_norm)
        normalised, x = add_and_normalise(x, self.attention(normalised, context), self.mlp_norm)
        return x, dropout(self.mlp(normalised, context), self.dropout if self.training else 0.0)
