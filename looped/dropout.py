"""Dropout: of an activation, and on a CPU of attention's softmax.

PyTorch draws a CPU's dropout with one Bernoulli variate for each element, 7 ns each, and has no fused attention with
dropout there: it writes all [B, H, T, T] scores and keeps them.  Here 16 random bits decide an element, so that p is
rounded to a multiple of 2^-16, and nothing random is kept: a seed drawn from PyTorch's generator gives the same bits
again in the backward pass.

Attention, for one block of heads and query rows at a time, with m the mask (0 or 1) and D = rowsum(dO * O):

    P = softmax(Q K^T / sqrt(head_dim) + causal mask),   O = (m * P) V / keep
    dV = (m * P)^T dO / keep,   dS = P * (m * dO V^T / keep - D),   dQ = dS K / sqrt(head_dim),   dK likewise

as in FlashAttention-2 (arXiv 2307.08691): P is formed again in the backward pass, and a row sees no later keys, so
those are not multiplied.  Half precision is computed in float32: a CPU's small products in it have a high fixed cost.
Autocast reaches into the body of an operation, in the forward pass and not in the backward pass; here it is off in
both, so that both form the same P.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_PER_BLOCK = 128  # of queries: fewer waste less on later keys, more make larger products
SCORES_PER_BLOCK = 1 << 18  # elements of a block, all heads: 1 MiB of float32, half of a typical core's L2 cache
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def _threshold(p: float) -> int:
    """p in units of 2^-16, below 1."""
    return min(round(p * 65536), 65535)


def _kept(x: Tensor, p: float, seed: int) -> Tensor:
    """For each element of x an integer of its size: all bits 0 with probability `_threshold(p) / 65536`, else all 1."""
    bits = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.int16)  # twice as fast as torch's generator
    number = torch.from_numpy(bits)[: x.numel()].view(x.shape).to(torch.int32)  # uniform in -2^15 .. 2^15 - 1
    below = torch.rsub(number, _threshold(p) - 32768 - 1)  # negative where kept
    return below.bitwise_right_shift_(31).to(INTEGERS[x.element_size()])


def _and_(x: Tensor, kept: Tensor) -> Tensor:
    """Set the elements of x that are not kept to 0, in place: on the CPU a tenth of masked_fill_'s time."""
    x.view(kept.dtype).bitwise_and_(kept)
    return x


def _keep(p: float) -> float:
    return 1 - _threshold(p) / 65536


def _draw_seed() -> Tensor:
    """A seed [] int64 from PyTorch's own generator, so that `torch.manual_seed` decides it."""
    return torch.randint(2**62, (), device="cpu")


# Activations ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("looped::dropout", mutates_args=())
def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    scaled = x.contiguous() * (1 / _keep(p))
    return _and_(scaled, _kept(scaled, p, int(seed)))


@_dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_seed(ctx, inputs, output) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx, dy: Tensor):
    (seed,) = ctx.saved_tensors
    return _dropout(dy, seed, ctx.p), None, None


torch.library.register_autograd("looped::dropout", _dropout_backward, setup_context=_save_seed)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with elements set to 0 with probability p in [0, 1), the others divided by 1 - p.

    On a CPU p is rounded to a multiple of 2^-16, and one number is drawn from PyTorch's generator; elsewhere this is
    PyTorch's dropout.
    """
    if p == 0:
        return x
    return _dropout(x, _draw_seed(), p) if x.device.type == "cpu" else F.dropout(x, p)


# Attention ------------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Some of the B * H heads, query rows, the keys up to the last of those rows, and the seed of their dropout."""

    heads: slice
    rows: slice
    keys: slice
    seed: int

    def probabilities(self, q: Tensor, k: Tensor, future: Tensor) -> Tensor:
        """softmax(q k^T) [H', rows, keys] of scaled queries and keys [B * H, T, head_dim]."""
        scores = torch.bmm(q[self.heads, self.rows], k[self.heads, self.keys].transpose(1, 2))
        diagonal = scores[:, :, self.rows]  # all earlier keys are visible
        diagonal += future[: diagonal.shape[1], : diagonal.shape[1]]
        return torch.softmax(scores, -1, out=scores)


def _blocks(n_heads: int, seq_len: int, seed: Tensor) -> Iterator[_Block]:
    """Blocks of at most about SCORES_PER_BLOCK scores (one head's, if those are more), each with its seed."""
    rows = min(ROWS_PER_BLOCK, seq_len)
    n = max(1, min(n_heads, SCORES_PER_BLOCK // max(1, rows * seq_len)))
    number = int(seed)
    for first in range(0, n_heads, n):
        for start in range(0, seq_len, rows):
            stop = min(start + rows, seq_len)
            yield _Block(slice(first, min(first + n, n_heads)), slice(start, stop), slice(0, stop), number)
            number += 1


def _future(like: Tensor) -> Tensor:
    """[rows, rows]: -inf above the diagonal, 0 elsewhere."""
    n = min(ROWS_PER_BLOCK, like.shape[1])
    return torch.full((n, n), -torch.inf, dtype=like.dtype).triu_(1)


def _by_head(x: Tensor, factor: float = 1.0) -> Tensor:
    """factor * x [B, T, H, head_dim], at least float32, as a new [B * H, T, head_dim]."""
    batch, seq_len, n_heads, head_dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = torch.empty((batch, n_heads, seq_len, head_dim), dtype=dtype).copy_(x.transpose(1, 2))
    return (heads if factor == 1.0 else heads.mul_(factor)).flatten(0, 1)


def _by_token(heads: Tensor, like: Tensor) -> Tensor:
    """heads [B * H, T, head_dim] in the shape [B, T, H, head_dim] and the dtype of `like`."""
    batch, seq_len, n_heads, head_dim = like.shape
    return torch.empty_like(like, memory_format=torch.contiguous_format).copy_(
        heads.view(batch, n_heads, seq_len, head_dim).transpose(1, 2)
    )


@torch.library.custom_op("looped::dropout_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, p: float) -> Tensor:
    queries, keys, values = _by_head(q, q.shape[-1] ** -0.5), _by_head(k), _by_head(v, 1 / _keep(p))
    out, future = torch.empty_like(values), _future(queries)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(queries.shape[0], queries.shape[1], seed):
            weights = block.probabilities(queries, keys, future)
            _and_(weights, _kept(weights, p, block.seed))
            out[block.heads, block.rows] = torch.bmm(weights, values[block.heads, block.keys])
    return _by_token(out, q)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("looped::dropout_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    queries, keys, values, douts = _by_head(q, scale), _by_head(k), _by_head(v), _by_head(dout)
    mean = (_by_head(out) * douts).sum(-1, keepdim=True)  # sum_j P_j dP_j
    douts.mul_(1 / _keep(p))
    dqueries, dkeys, dvalues, future = *(torch.zeros_like(queries) for _ in range(3)), _future(queries)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(queries.shape[0], queries.shape[1], seed):
            heads, rows, seen, _ = block
            probabilities = block.probabilities(queries, keys, future)
            kept = _kept(probabilities, p, block.seed)
            ds = _and_(torch.bmm(douts[heads, rows], values[heads, seen].transpose(1, 2)), kept)
            ds.sub_(mean[heads, rows]).mul_(probabilities)
            weights = _and_(probabilities, kept)
            # baddbmm_ would go head by head
            dvalues[heads, seen] += torch.bmm(weights.transpose(1, 2), douts[heads, rows])
            dkeys[heads, seen] += torch.bmm(ds.transpose(1, 2), queries[heads, rows])
            dqueries[heads, rows] = torch.bmm(ds, keys[heads, seen])
    return _by_token(dqueries.mul_(scale), q), _by_token(dkeys, k), _by_token(dvalues, v)


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seed: Tensor, p: float):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, seed, ctx.p = inputs
    ctx.save_for_backward(q, k, v, output, seed)


def _differentiate(ctx, dout: Tensor):
    return *_attention_backward(dout, *ctx.saved_tensors, ctx.p), None, None


torch.library.register_autograd("looped::dropout_attention", _differentiate, setup_context=_save)


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """`dropout(softmax(q k^T / sqrt(head_dim), causal), p) v` of CPU tensors [B, T, H, head_dim], in their dtype.

    p: in (0, 1), rounded to a multiple of 2^-16. Draws one number from PyTorch's generator.
    """
    return _attention(q, k, v, _draw_seed(), p)
