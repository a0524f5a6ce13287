"""`readout_statistics`: what K states predict for every token. No gradient, and one chunk of logits in memory.

For every loop and token, with z = softcap(norm(h) W^T + bias):

    loss = lse - z_target,  lse = log sum_j exp(z_j),  entropy = lse - sum_j p_j z_j,  margin = top1 - top2,  top1 id

It is the pass of kernels/readout.py without gradients: 2 K N d V FLOPs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import (
    Readout,
    as_rows,
    check_index,
    check_readout,
    check_softcap,
    check_tensors,
    check_vector,
    gathered,
)
from .cross_entropy import LossOptions, loss_reference, statistics_reference
from .device import autocast_dtype, product_dtype
from .looped_cross_entropy import logits_reference
from .products import default_chunk_rows
from .readout import read_out
from .readout_call import ReadoutCall, ReadoutTensors
from .vocabulary_shard import VocabularyShard, rows_here


class ReadoutStatistics(NamedTuple):
    """The result of `readout_statistics`, each [K, ...] float32 (top1: int64); loss is None without targets."""

    loss: Tensor | None
    lse: Tensor
    entropy: Tensor
    margin: Tensor
    top1: Tensor


def readout_statistics_reference(
    states: Tensor | Sequence[Tensor],
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
) -> ReadoutStatistics:
    """`readout_statistics` in plain PyTorch, all logits of a loop in memory: its definition. Checks no argument."""
    options = LossOptions(ignore_index=ignore_index, softcap=softcap, bias=bias)
    shape = states[0].shape[:-1]
    known = torch.full(shape, ignore_index, device=head.device) if targets is None else targets
    loops = []
    with torch.no_grad():
        for loop, state in enumerate(states):
            logits = logits_reference(
                state, head, readout=readout, final=loop == len(states) - 1, norm_weight=norm_weight,
                norm_bias=norm_bias, eps=eps,
            )  # fmt: skip
            ce, z = loss_reference(logits.flatten(0, -2), known.flatten().long(), options)
            loops.append((ce, *statistics_reference(z)))
    loss, *others = (torch.stack(columns).view(len(loops), *shape) for columns in zip(*loops, strict=True))
    return ReadoutStatistics(None if targets is None else loss, *others)


def readout_statistics(
    states: Tensor | Sequence[Tensor],
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
    head, bias = rows_here("head", head, shard), rows_here("bias", bias, shard)
    norm_weight, norm_bias = gathered(norm_weight), gathered(norm_bias)
    rows, shape = as_rows(states)
    h = rows[0]
    check_tensors(rows, shape, head, targets)
    check_readout(readout, norm_weight, norm_bias, eps, h)
    check_softcap(softcap)
    check_index(ignore_index)
    check_vector("bias", bias, h, head.shape[0])
    n_loops, n_tokens = len(rows) if h.dim() == 2 else h.shape[0], h.shape[-2]
    compute_dtype = autocast_dtype(h)
    loops = tuple(range(n_loops))  # numbers even where a compiled graph has a symbol for K
    call = ReadoutCall(
        readout=readout, eps=eps, n_loops=len(loops), active=loops, ignore_index=ignore_index,
        softcap=softcap, statistics=True, dtype=str(compute_dtype).removeprefix("torch."),
        chunk_rows=default_chunk_rows(head.device, product_dtype(head, compute_dtype)), shard=shard,
    )  # fmt: skip
    known = (
        targets.reshape(-1).long() if targets is not None else torch.full((n_tokens,), ignore_index, device=h.device)
    )
    tensors = ReadoutTensors(head, known, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias)
    with torch.no_grad():
        results = read_out(rows, tensors, call)
    full = (n_loops, *shape)
    lse, entropy, margin = (column.view(full) for column in results.statistics[:3])
    loss = None if targets is None else results.ce.view(full)
    return ReadoutStatistics(loss, lse, entropy, margin, results.top1.view(full))
