"""A model of which each process of a group has a part of the vocabulary: the head's rows, and a tied embedding's.

    share_vocabulary(model, group)          from here on this process has its rows of the table, and no others
    with whole_vocabulary(model): ...       for saving, evaluation, generation: every process has all of them

The loss of such a model, its statistics and its gradients are those of data-parallel training: each process calls with
its own tokens, of one shape, and all must call alike.  The table's gradient comes as the mean over the processes; that
of the other parameters has to be averaged, for instance by DistributedDataParallel, which must leave the table out.

A tied embedding is looked up where its rows are: tokens are gathered from all processes, each puts in the rows that it
has, and the sums go back to the process whose tokens they are (Megatron-LM, arXiv 1909.08053, section 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from looped.kernels import VocabularyShard
from looped.model import LoopedLM


class _Lookup(torch.autograd.Function):
    """table[tokens] [..., d] of tokens [...] where this process has some rows of the table."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, shard: VocabularyShard) -> Tensor:
        column = shard.blocks(tokens) - shard.rows.start  # [P, ...]
        here = (column >= 0) & (column < len(rows))
        parts = rows[column.clamp_(0, len(rows) - 1)].masked_fill_(~here.unsqueeze(-1), 0.0)
        result = rows.new_empty((*tokens.shape, rows.shape[1]))
        shard.sum_of_blocks(parts, result)
        ctx.save_for_backward(column, here)
        ctx.shard, ctx.n_rows = shard, len(rows)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        column, here = ctx.saved_tensors
        of_all = ctx.shard.blocks(gradient)[here]  # [found, d]
        total = gradient.new_zeros((ctx.n_rows, gradient.shape[-1]))
        return total.index_add_(0, column[here], of_all).mul_(ctx.shard.share), None, None


class SharedEmbedding(nn.Embedding):
    """The embedding of a table whose rows a group shares out. shard: which are here; None while all are."""

    shard: VocabularyShard | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., d] of tokens [...], in the table's dtype."""
        if self.shard is None:
            return super().forward(tokens)
        return _Lookup.apply(self.weight, tokens, self.shard)


def table_name(model: LoopedLM) -> str:
    """The name of the parameter that is the head."""
    return "embedding.weight" if model.head is None else "head.weight"


def share_vocabulary(model: LoopedLM, group: dist.ProcessGroup | None = None) -> None:
    """Keep this process's rows of the head, of those that all have now, in the same parameter.

    group: by default all processes. Raises ValueError as `VocabularyShard.of` does.
    """
    shard = VocabularyShard.of(model.config.vocab_size, group)
    if model.head is None:
        table = model.embedding.weight
        model.embedding = SharedEmbedding(model.config.vocab_size, model.config.d_model, _weight=table)
        model.embedding.weight = table  # itself: an optimiser may have it already
    _cut(model, shard, {})


@contextmanager
def whole_vocabulary(model: LoopedLM, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Every process has the whole table inside, and the optimiser's moments of it: all must enter.

    What is written to them inside stays: each process keeps its rows of it. Nothing happens to a model that is whole.
    """
    shard = model.shard
    if shard is None:
        yield
        return
    table = model.head_weight
    table.data = shard.whole(table.data)
    state = {} if optimizer is None else optimizer.state[table]
    for name in _moments(state):
        state[name] = shard.whole(state[name])
    _set_shard(model, None)
    try:
        yield
    finally:
        _cut(model, shard, state)


def _cut(model: LoopedLM, shard: VocabularyShard, state: dict[str, Any]) -> None:
    """Keep the shard's rows of the table and of the optimiser's moments of it, and drop all others."""
    model.head_weight.data = model.head_weight.data[shard.rows].clone()
    for name in _moments(state):
        state[name] = state[name][shard.rows].clone()
    _set_shard(model, shard)


def _moments(state: dict[str, Any]) -> list[str]:
    """What has the table's shape, and not the count of steps."""
    return [name for name, value in state.items() if isinstance(value, Tensor) and value.dim() == 2]


def _set_shard(model: LoopedLM, shard: VocabularyShard | None) -> None:
    model.shard = shard
    if isinstance(model.embedding, SharedEmbedding):
        model.embedding.shard = shard


def clip_grad_norm_(model: LoopedLM, max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, and gives the norm [] of the whole gradient, wherever its rows are."""
    parameters = list(model.parameters())
    if model.shard is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    table = model.head_weight
    norms = [
        get_total_norm([p.grad for p in of if p.grad is not None])
        for of in ([table], [p for p in parameters if p is not table])
    ]
    norm = (model.shard.sum(norms[0].square()) + norms[1].square()).sqrt()
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
