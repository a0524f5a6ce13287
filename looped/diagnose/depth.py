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
    over all bytes of the targets, nan where bytes are not known.

    as_trained: [K], ce with each of the trained loops read as training reads it. It differs from `ce` where training
    normalises the last loop only: those before were trained through no norm.
    """

    ce: list[float]
    ppl: list[float]
    bits_per_byte: list[float]
    as_trained: list[float]

    @property
    def two_readings(self) -> bool:
        """Whether some loop is read in another way when it is the last."""
        return self.as_trained != self.ce[: len(self.as_trained)]


@torch.no_grad()
def measure_depth(
    model: LoopedModel, batches: Sequence[Batch], n_loops: int, bytes_per_token: Tensor | None = None
) -> Depth:
    """`n_loops`: at least the trained ones. `bytes_per_token`: [V] int64, UTF-8 bytes that each token stands for."""
    as_last = torch.zeros(n_loops, dtype=torch.float64)
    as_trained = torch.zeros(model.n_loops, dtype=torch.float64)
    n_tokens = n_bytes = 0
    for tokens, targets in batches:
        n_tokens += targets.numel()
        n_bytes += 0 if bytes_per_token is None else int(bytes_per_token[targets.cpu()].sum())
        for loop, state in enumerate(model.states(tokens, n_loops)):
            loss = model.cross_entropy(state, targets, final=True).double().sum().cpu()
            as_last[loop] += loss
            if loop < model.n_loops - 1 and not model.norm_every_loop:
                loss = model.cross_entropy(state, targets, final=False).double().sum().cpu()
            if loop < model.n_loops:
                as_trained[loop] += loss
    ce = as_last / n_tokens
    bits = as_last / math.log(2) / (n_bytes or math.nan)
    return Depth(ce.tolist(), ce.exp().tolist(), bits.tolist(), (as_trained / n_tokens).tolist())
