"""What stopping after K loops costs: cross-entropy, perplexity and bits per byte, beyond the trained depth too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.diagnose.model import Batch, LoopedModel


@dataclass(frozen=True)
class Depth:
    """The quality of the predictions after loops 1..n. Every loop is read as the last one is.

    ce: [n], cross-entropy in nats per token. ppl: [n], its exponential. bits_per_byte: [n], the bits of all targets
    divided by their bytes; nan where the bytes of a token are not known.

    as_trained: [K], the cross-entropy with each of the trained loops read as training reads it. It differs from `ce`
    where training normalises the last loop only, so that the earlier ones were trained without a norm.
    """

    ce: list[float]
    ppl: list[float]
    bits_per_byte: list[float]
    as_trained: list[float]

    @property
    def two_readings(self) -> bool:
        """Whether training reads some loop in another way than the last one."""
        return self.as_trained != self.ce[: len(self.as_trained)]


@torch.no_grad()
def measure_depth(
    model: LoopedModel, batches: Sequence[Batch], n_loops: int, bytes_per_token: Tensor | None = None
) -> Depth:
    """Depth after loops 1..n_loops, which include at least the trained ones.

    bytes_per_token: [V] int64, how many UTF-8 bytes each token stands for.
    """
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
    return Depth(
        ce=ce.tolist(),
        ppl=ce.exp().tolist(),
        bits_per_byte=bits.tolist(),
        as_trained=(as_trained / n_tokens).tolist(),
    )
