"""How a token is drawn."""

import torch
from torch import Tensor


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
