"""What a token is drawn from, how it is drawn, and which drafted tokens may stay."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`softmax(logits / temperature)` of the top_k most probable tokens, and of those the fewest that hold top_p.

    temperature: 0 is the most probable token alone. top_k: None for all tokens. top_p: the share of the probability,
    after temperature and top_k, that is kept at least (Holtzman et al., arXiv 1904.09751).
    Raises ValueError for a temperature below 0 or not finite, top_k below 1 or top_p outside of (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0. Got temperature={self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1. Got top_k={self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1. Got top_p={self.top_p}.")

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] fp32 of logits [..., V]. Of equal logits the smaller token counts as the more probable."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        # Largest first: the quotients by a tiny temperature must not overflow.
        logits = logits.float()
        scaled = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is None and self.top_p == 1:
            return scaled.softmax(-1)
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            scaled[..., self.top_k :] = -math.inf
        sorted_ = scaled.softmax(-1)
        above = sorted_.cumsum(-1) - sorted_  # held by the tokens that are more probable
        sorted_ = sorted_.masked_fill(above >= self.top_p, 0.0)
        kept = torch.zeros_like(sorted_).scatter(-1, order, sorted_)
        return kept / kept.sum(-1, keepdim=True)


class Draws:
    """Uniform random numbers for every row, from a generator of the row's own, which is seeded with seed + row.

    A row's numbers do not depend on the others: row b of a batch draws as a batch of one with seed + b.
    """

    def __init__(self, seed: int, batch_size: int, device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]
        self._device = device

    def uniforms(self, count: int) -> Tensor:
        """[B, count] fp64, in [0, 1)."""
        drawn = [torch.rand(count, generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(drawn).to(self._device)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [...] from probabilities [..., V], which need not add up to 1, by uniform numbers [...] in [0, 1).

    Token v is drawn where the cumulative distribution first exceeds the number.
    """
    cumulative = probabilities.double().cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]  # ends in exactly 1
    return torch.searchsorted(cumulative, uniform.double().unsqueeze(-1).contiguous(), right=True).squeeze(-1)
