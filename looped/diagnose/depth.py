"""Cross-entropy, perplexity and bits per byte of stopping after any number of loops, beyond the trained depth too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.diagnose.model import Batch, LoopedModel


@dataclass(frozen=True)
class Depth:
    """After loops 1..n, each read as the last, [n]. ce: nats per token. ppl: its exponential. bits_per_byte: all bits
    over all bytes of the targets, nan where bytes are not known."""

    ce: list[float]
    ppl: list[float]
    bits_per_byte: list[float]


@torch.no_grad()
def measure_depth(
    model: LoopedModel, batches: Sequence[Batch], n_loops: int, bytes_per_token: Tensor | None = None
) -> Depth:
    """`bytes_per_token`: [V] int64, UTF-8 bytes that each token stands for."""
    total = torch.zeros(n_loops, dtype=torch.float64)
    n_tokens = n_bytes = 0
    for tokens, targets in batches:
        n_tokens += targets.numel()
        n_bytes += 0 if bytes_per_token is None else int(bytes_per_token[targets.cpu()].sum())
        for loop, state in enumerate(model.states(tokens, n_loops)):
            total[loop] += model.cross_entropy(state, targets, final=True).double().sum().cpu()
    bits = total / math.log(2) / (n_bytes or math.nan)
    return Depth((total / n_tokens).tolist(), (total / n_tokens).exp().tolist(), bits.tolist())
