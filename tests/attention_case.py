"""Causal attention from its equation, and random operands of it."""

import math

import torch
from torch import Tensor


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
    """The definition; kept: [B, H, T, T] factors on the attention weights (0 or 1 / (1 - p))."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights if kept is None else weights * kept, v)


def random_qkv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))
    return q, k, v
