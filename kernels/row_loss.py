"""The loss of a row of logits: its options, its results, and their definition in plain PyTorch.

For a row x [V] with target t, after bias and softcap `z = c * tanh((x + b) / c)`:

    lse  = log sum_j exp(z_j)
    CE   = (1 - s) * (lse - z_t) + s * (lse - mean_j z_j) + zeta * lse^2          s: label smoothing, zeta: z_loss
    entropy = lse - sum_j p_j z_j,  p = softmax(z);   margin = largest - second largest z;   top1 = argmax z

A row whose target is `ignore_index` has CE = 0.

Label smoothing: Szegedy et al., arXiv 1512.00567.  z-loss: Chowdhery et al., arXiv 2204.02311.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .device import accumulator


class LossOptions(NamedTuple):
    """What defines the loss of a row; see the module's equations."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0


class RowResults(NamedTuple):
    """Per-row results, each [rows] in one order; what is None is not computed."""

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    top1: Tensor | None = None


def cross_entropy_reference(logits: Tensor, targets: Tensor, bias: Tensor | None, options: LossOptions) -> RowResults:
    """The per-row results of logits [R, V] and targets [R] in plain PyTorch: their definition."""
    z = logits.to(accumulator(logits.dtype))
    if bias is not None:
        z = z + bias
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    lse = torch.logsumexp(z, -1)
    ignored = targets == options.ignore_index
    target = z.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    smoothing = options.label_smoothing
    loss = (1 - smoothing) * (lse - target) + options.z_loss * lse.square()
    if smoothing:
        loss = loss + smoothing * (lse - z.mean(-1))
    log_p = z - lse.unsqueeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top = z.topk(min(2, z.shape[-1]), -1)
    margin = top.values[..., 0] - top.values[..., 1] if z.shape[-1] > 1 else torch.full_like(lse, torch.inf)
    return RowResults(loss.masked_fill(ignored, 0.0), lse, entropy, margin, top.indices[..., 0])
