"""`readout_statistics`: what K states predict for every token. No gradient, and one chunk of logits in memory.

For every loop and token, with z = softcap(norm(h) W^T + bias):

    loss = lse - z_target,  lse = log sum_j exp(z_j),  entropy = lse - sum_j p_j z_j,  margin = top1 - top2,  top1 id

It is the pass of kernels/readout.py without gradients: 2 K N d V FLOPs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Readout, States, as_rows
from .looped_cross_entropy import LoopedCrossEntropy, looped_cross_entropy, looped_cross_entropy_reference
from .vocabulary_shard import VocabularyShard


class ReadoutStatistics(NamedTuple):
    """The result of `readout_statistics`, each [K, ...] float32 (top1: int64); loss is None without targets."""

    loss: Tensor | None
    lse: Tensor
    entropy: Tensor
    margin: Tensor
    top1: Tensor


def _measured(
    readout: Callable[..., LoopedCrossEntropy],
    states: States,
    head: Tensor,
    targets: Tensor | None,
    options: dict[str, Any],
) -> ReadoutStatistics:
    """The statistics of a readout of the states, without gradients."""
    known = targets
    if known is None:  # any that are in range, whose loss nobody gets
        rows, shape = as_rows(states)
        known = torch.zeros(shape, dtype=torch.int64, device=rows[0].device)
    with torch.no_grad():
        seen = readout(states, head, known, statistics=True, **options).statistics
    assert seen is not None  # they were asked for
    return ReadoutStatistics(None if targets is None else seen.loss, seen.lse, seen.entropy, seen.margin, seen.top1)


def readout_statistics_reference(
    states: States, head: Tensor, targets: Tensor | None = None, **options: Any
) -> ReadoutStatistics:
    """`readout_statistics` in plain PyTorch, all logits of a loop in memory: its definition. Checks no argument."""
    return _measured(looped_cross_entropy_reference, states, head, targets, options)


def readout_statistics(
    states: States,
    head: Tensor,
    targets: Tensor | None = None,
    *,
    readout: Readout = "rmsnorm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shard: VocabularyShard | None = None,
) -> ReadoutStatistics:
    """What every loop predicts for every token, without gradients.

        z = softcap(norm(h[k, t]) @ head.T + bias);  lse = log sum_j exp(z_j);  loss = lse - z_target
        entropy = lse - sum_j softmax(z)_j z_j (nats);  margin = largest - second largest z;  top1 = argmax z

    One chunk of logits is in memory at a time.

    Args:
        states, head, readout, norm_weight, norm_bias, eps, bias, softcap: as for `looped_cross_entropy`.
        targets: [...] int64 shared by all loops, or None; a token with `ignore_index` has loss 0.
        shard: as for `looped_cross_entropy`.

    Returns:
        `loss` (None without targets), `lse`, `entropy`, `margin` [K, ...] float32; `top1` [K, ...] int64, the lowest
        id among equal largest logits. With one word in the vocabulary the margin is inf.

    Raises:
        TypeError, ValueError: as `looped_cross_entropy`.
    """
    options = {
        "readout": readout, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "bias": bias,
        "ignore_index": ignore_index, "softcap": softcap, "shard": shard,
    }  # fmt: skip
    return _measured(looped_cross_entropy, states, head, targets, options)
