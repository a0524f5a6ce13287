"""The loss of a row of logits, its gradient and its statistics: definition, and one pass over a chunk of rows in place.

For a row x [V] with target t, after bias and softcap `z = c * tanh((x + b) / c)`:

    lse  = log sum_j exp(z_j)
    CE   = (1 - s) * (lse - z_t) + s * (lse - mean_j z_j) + zeta * lse^2          s: label smoothing, zeta: z_loss
    g_j  = dCE/dx_j = (1 - (z_j/c)^2) * (p_j * (1 + 2 zeta lse) - (1 - s) [j = t] - s / V),   p = softmax(z)
    entropy = lse - sum_j p_j z_j;   margin = largest - second largest z;   top1 = argmax z, the lowest among equals

g overwrites x.  Its elements are of order 1 in every dtype; the row's weight in the loss is applied later, to the
products, in float32.  A row whose target is `ignore_index` has CE = 0 and g = 0.  A row whose weight is exactly 0 has
g = 0, whatever its logits.

Shapes: logits [R, V] of any dtype, read as float32; results float32.  Bytes: on a GPU the logits are read twice, the
second time from cache, and written once.

Label smoothing: Szegedy et al., arXiv 1512.00567.  z-loss: Chowdhery et al., arXiv 2204.02311.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import accumulator, implementation, uses_triton


class LossOptions(NamedTuple):
    """What defines the loss of a row; see the module's equations.  z_loss [] and bias [V]: tensors, or None for 0."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: Tensor | None = None
    bias: Tensor | None = None


class RowResults(NamedTuple):
    """Results of rows.  loss: [rows]; statistics: [3 or more, rows], lse, entropy and margin, or None; top1: [rows]."""

    loss: Tensor
    statistics: Tensor | None = None
    top1: Tensor | None = None


def finished_logits(logits: Tensor, options: LossOptions) -> Tensor:
    """z [R, V]: the logits with the bias and the softcap, at least in float32; the same tensor if nothing changes."""
    z = logits.to(accumulator(logits.dtype))
    if options.bias is not None:
        z = z + options.bias
    return z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)


def loss_reference(logits: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """CE [R] of logits [R, V] and targets [R] in plain PyTorch, its definition; and z [R, V]."""
    z = finished_logits(logits, options)
    smoothing, ignore_index = options.label_smoothing, options.ignore_index
    loss = F.cross_entropy(z, targets, ignore_index=ignore_index, label_smoothing=smoothing, reduction="none")
    if options.z_loss is not None:
        lse_penalty = options.z_loss * torch.logsumexp(z, -1).square()
        loss = loss + lse_penalty.masked_fill(targets == ignore_index, 0.0)
    return loss, z


def statistics_reference(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, entropy, margin and top1 [R] of z [R, V] in plain PyTorch: their definition."""
    lse = torch.logsumexp(z, -1)
    log_p = z - lse.unsqueeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top = z.topk(min(2, z.shape[-1]), -1)
    margin = top.values[..., 0] - top.values[..., 1] if z.shape[-1] > 1 else torch.full_like(lse, torch.inf)
    return lse, entropy, margin, top.indices[..., 0]


def cross_entropy_(
    logits: Tensor, targets: Tensor, row_weight: Tensor | None, options: LossOptions, results: RowResults,
    first_row: int, *, gradient: bool,
) -> None:  # fmt: skip
    """Write the results of rows `first_row, first_row + 1, ...` whose logits [R, V] are given.

    targets [n_tokens]: row r has the target `targets[r % n_tokens]`.  row_weight [rows] and the results are indexed by
    r too; of the weights only those that are exactly 0 matter here, and None means that there are none.
    gradient: the logits are overwritten by dCE/dlogits; without it their content is undefined afterwards.

    A row is stride(0) elements long in memory.  A length past V that is a multiple of 16 keeps a GPU's accesses wide
    for any V.  What lies past V may hold anything before, and is 0 after a pass with a gradient.
    A target outside [0, V) that is not `ignore_index` is never read: its loss is nan (Triton); callers check on a CPU.
    """
    module = implementation("cross_entropy_triton" if uses_triton(logits) else "cross_entropy_cpu")
    module.cross_entropy(logits, targets, row_weight, options, results, first_row, gradient)
