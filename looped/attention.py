"""Causal self-attention whose scores are never held for a whole batch, and rotary positions.

flash-attn is used when it is installed and the tensors qualify, else PyTorch's scaled_dot_product_attention (SDPA);
looped/flash_attention.py decides. All compute `softmax(Q K^T / sqrt(head_dim) + causal mask) V` tile by tile. The one
case in which SDPA would write all [B, H, T, T] scores, dropout on a CPU, is done in blocks (looped/dropout.py).
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from looped.config import LoopedConfig
from looped.context import Context
from looped.dropout import attention_with_dropout
from looped.flash_attention import (
    FLASH_2,
    FLASH_4,
    HALF,
    flash_implementation,
    qualifies_for_flash_attention,
    sdpa_has_flash_3_or_4,
)

NOT_FLASH = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """`softmax(q k^T / sqrt(head_dim), causal) v`, with dropout of probability `dropout_p` on the softmax.

    q, k, v: [B, T, H, head_dim], one floating dtype and device. Returns [B, T, H, head_dim] in the same dtype.
    Raises ValueError if the shapes differ or are not of rank 4, or if `dropout_p` is not in [0, 1).

    flash-attn takes fp16 and bf16 on a GPU it supports, with `head_dim <= 256` a multiple of 8; SDPA the rest. Raises
    ImportError if flash-attn is installed for this GPU and cannot be imported.
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must have one shape [B, T, H, head_dim]. "
            f"Got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}."
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1). Got dropout_p={dropout_p}.")
    if qualifies_for_flash_attention(q.is_cuda, q.dtype, q.shape[-1]):
        serves = flash_implementation(q.device, q.shape[-1], dropout_p, torch.compiler.is_compiling())
        if serves == FLASH_2:
            from flash_attn import flash_attn_func

            return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=True)
        if serves == FLASH_4:
            from flash_attn.cute import flash_attn_func

            mixed = flash_attn_func(q, k, v, causal=True)
            return mixed[0] if isinstance(mixed, tuple) else mixed  # with the log-sum-exp, in some versions
    if dropout_p > 0 and q.device.type == "cpu":
        return attention_with_dropout(q, k, v, dropout_p)
    if q.device.type == "cpu" and q.dtype in HALF and q.shape[-1] < 64:
        # PyTorch's CPU kernel is made of small products, which in half precision have a high fixed cost each: at
        # (B, T, H, head_dim) = (16, 128, 4, 32) its backward pass took 16 ms in bf16 and 5 ms in fp32.
        with torch.autocast("cpu", enabled=False):
            return _attend(q.float(), k.float(), v.float(), dropout_p).to(q.dtype)
    return _attend(q, k, v, dropout_p)


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # SDPA wants [B, H, T, head_dim]
    with sdpa_kernel(NOT_FLASH) if dropout_p > 0 and sdpa_has_flash_3_or_4() else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True).transpose(1, 2)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles `t * theta^(-2i / head_dim)`, each [..., head_dim / 2] fp32.

    t is a position, of positions [...]; i = 0..head_dim/2-1 is the pair of channels (RoFormer, arXiv 2104.09864).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of channels (i, i + head_dim/2) of x [B, T, H, head_dim] by its angle ("rotate_half" pairs).

    cos, sin: [T, head_dim / 2], or [B, T, head_dim / 2] where rows differ in their positions; fp32, so that the
    products are fp32 (autocast or not). Returned in x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [..., T, 1, head_dim / 2]: the same for all heads
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal multi-head self-attention: fused projection to q, k, v (in this order, heads inside), no biases."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, delta: Tensor | None, norm: nn.RMSNorm, context: Context) -> tuple[Tensor, Tensor]:
        """What attention makes of norm(x + delta), and x + delta; all [B, T, d]. delta may be None, which is 0."""
        y, x = context.implementation.add_and_normalise(x, delta, norm)
        q, k, v = self.qkv(y).view(*x.shape[:2], 3, self.n_heads, -1).unbind(2)  # each [B, T, H, head_dim]
        return self.output(self.mix(q, k, v, context)), x

    def mix(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """The values as the heads mix them, side by side: [B, T, d]. What `output` multiplies."""
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        if context.attend is not None:
            mixed = context.attend(q, k, v)
        else:
            mixed = causal_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return mixed.flatten(2)
