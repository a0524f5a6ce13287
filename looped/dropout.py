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
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_PER_BLOCK = 128  # of queries: fewer waste less on later keys, more make larger products
SCORES_PER_BLOCK = 1 << 18  # elements of a block, all heads: 1 MiB of float32, half of a typical core's L2 cache


def _threshold(p: float) -> int:
    """p in units of 2^-16, below 1."""
    return min(round(p * 65536), 65535)


def _dropped(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """A mask that is True with probability `_threshold(p) / 65536`."""
    size = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    bits = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return (bits.view(torch.int16)[:size] < _threshold(p) - 32768).view(shape)


def _keep(p: float) -> float:
    return 1 - _threshold(p) / 65536


def _draw_seed() -> Tensor:
    """A seed [] int64 from PyTorch's own generator, so that `torch.manual_seed` decides it."""
    return torch.randint(2**62, (), device="cpu")


# Activations ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("looped::dropout", mutates_args=())
def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return (x * (1 / _keep(p))).masked_fill_(_dropped(x.shape, p, int(seed)), 0.0)


@_dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


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
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return _dropout(x, _draw_seed(), p) if p > 0 else x


# Attention ------------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Block:
    """Heads `heads` of sequence `batch`, query rows `rows`, and the keys up to the last of those rows."""

    def __init__(self, batch: int, heads: slice, rows: slice, seed: int) -> None:
        self.batch, self.heads, self.rows, self.keys = batch, heads, rows, slice(0, rows.stop)
        self.seed = seed

    def queries_of(self, x: Tensor) -> Tensor:
        """[H', rows, head_dim] of x [B, T, H, head_dim], at least float32: then a view."""
        return _wide(x[self.batch, self.rows, self.heads].transpose(0, 1))

    def keys_of(self, x: Tensor) -> Tensor:
        """[H', keys, head_dim] of x [B, T, H, head_dim], at least float32: then a view."""
        return _wide(x[self.batch, self.keys, self.heads].transpose(0, 1))

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q k^T) [H', rows, keys] of scaled queries q [H', rows, head_dim] and keys k [H', keys, head_dim]."""
        scores = torch.bmm(q, k.transpose(1, 2))
        diagonal = scores[:, :, self.rows]  # all earlier keys are visible
        n = diagonal.shape[-1]
        diagonal += torch.full((n, n), -torch.inf, dtype=scores.dtype).triu_(1)
        return torch.softmax(scores, -1, out=scores)

    def dropped(self, probabilities: Tensor, p: float) -> Tensor:
        return _dropped(probabilities.shape, p, self.seed)


def _blocks(shape: torch.Size, seed: Tensor) -> Iterator[_Block]:
    """Blocks of at most about SCORES_PER_BLOCK scores (one head's, if those are more), each with its seed."""
    batch, seq_len, n_heads, _ = shape
    rows = min(ROWS_PER_BLOCK, seq_len)
    n = max(1, min(n_heads, SCORES_PER_BLOCK // max(1, rows * seq_len)))
    number = int(seed)
    for b in range(batch):
        for first in range(0, n_heads, n):
            for start in range(0, seq_len, rows):
                yield _Block(b, slice(first, first + n), slice(start, min(start + rows, seq_len)), number)
                number += 1


@torch.library.custom_op("looped::dropout_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, p: float) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    scale = q.shape[-1] ** -0.5
    for block in _blocks(q.shape, seed):
        weights = block.probabilities(block.queries_of(q) * scale, block.keys_of(k))
        weights.masked_fill_(block.dropped(weights, p), 0.0)
        mixed = torch.bmm(weights, block.keys_of(v)).mul_(1 / _keep(p))
        out[block.batch, block.rows, block.heads] = mixed.transpose(0, 1)
    return out


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("looped::dropout_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_wide(torch.zeros(x.shape, dtype=x.dtype)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for block in _blocks(q.shape, seed):
        query, keys, values = block.queries_of(q) * scale, block.keys_of(k), block.keys_of(v)
        probabilities = block.probabilities(query, keys)
        mask = block.dropped(probabilities, p)
        do = block.queries_of(dout) * (1 / _keep(p))
        mean = (block.queries_of(out) * block.queries_of(dout)).sum(-1, keepdim=True)  # sum_j P_j dP_j
        ds = torch.bmm(do, values.transpose(1, 2)).masked_fill_(mask, 0.0).sub_(mean).mul_(probabilities)
        weights = probabilities.masked_fill_(mask, 0.0)
        block.keys_of(dv).add_(torch.bmm(weights.transpose(1, 2), do))
        block.keys_of(dk).add_(torch.bmm(ds.transpose(1, 2), query))
        block.queries_of(dq).copy_(torch.bmm(ds, keys).mul_(scale))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seed: Tensor, p: float):
    return tuple(torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))


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
