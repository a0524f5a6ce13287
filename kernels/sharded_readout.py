"""The chunks of kernels/readout.py where each rank of a group has a part of the head: W_p [V_p, d].

    rank q: y_q                     gathered:        Y = [y_0; ...; y_{P-1}]
    rank p: logits = Y W_p^T   ->   exchanged: 4 or 7 numbers a row   ->   CE, and g in place
            dW_p += g^T Y           in whole
            g W_p                   summed over p:   dy_q goes to rank q, over y_q

A chunk holds rows of all loops, and takes these three exchanges whatever K.  Chunk by chunk, not in whole, as the bytes
are the same and memory then holds the rows of all ranks for one chunk alone.  A rank's rows are weighed as if it were
alone with its tokens, and dW_p is the mean over ranks: what data-parallel training makes of a head that is whole.
"""

from typing import NamedTuple

from torch import Tensor

from .arguments import check_range
from .cross_entropy import LossOptions, RowResults
from .products import form_gradients, form_logits, logits_space
from .readout_call import ReadoutCall, ReadoutResults, ReadoutTensors
from .row_weights import LossScales, row_weights
from .sharded_cross_entropy import finish_rows, form_parts, n_parts


class RowsOfAll(NamedTuple):
    """targets, row_weight: [B, A * N] of the rows of B ranks, or B = 1 where all have the same.

    row_weight is None where all weigh the same.
    """

    targets: Tensor
    row_weight: Tensor | None


def weigh_all(tensors: ReadoutTensors, results: ReadoutResults, call: ReadoutCall) -> tuple[LossScales, RowsOfAll]:
    """Fill this rank's row weights and the factors that all ranks have in common; and what all need of all rows.

    n, where it is not given, is the mean over the ranks of the number of their targets that are not ignored.
    """
    assert call.shard is not None
    shard, n_loops, n_tokens = call.shard, len(call.active), len(tensors.targets)
    all_targets = shard.blocks(tensors.targets)  # [B, N]
    weights, n_targets = tensors.weights, tensors.n_targets
    if n_targets is None:
        n_targets = (all_targets != call.ignore_index).sum().to(results.factors.dtype) * shard.share
    space = None
    if weights is not None:
        if weights.shape[1] == n_tokens:
            weights = shard.blocks(weights).transpose(0, 1).flatten(1)
        space = results.row_weight.new_empty(n_loops * all_targets.numel())
    of_ranks = tensors._replace(targets=all_targets.flatten(), weights=weights, n_targets=n_targets)
    scales = row_weights(
        of_ranks, call, LossScales(space, results.factors), n_columns=shard.n_words, n_penalised=call.n_loops * n_tokens
    )
    check_range(of_ranks.targets, shard.n_words, call.ignore_index, scales.in_range)
    of_all = all_targets.repeat(1, n_loops)
    if space is None:
        return scales, RowsOfAll(of_all, None)
    row_weight = space.view(n_loops, *all_targets.shape).transpose(0, 1).flatten(1)
    results.row_weight.copy_(row_weight[shard.block])
    return LossScales(results.row_weight, results.factors, scales.in_range), RowsOfAll(of_all, row_weight)


def read_out_shard(
    y: Tensor, head: Tensor, of_all: RowsOfAll, options: LossOptions, rows: RowResults, results: ReadoutResults,
    call: ReadoutCall,
) -> None:  # fmt: skip
    """Row results of this rank's y [R, d], and, where needed, dhead and dbias of its rows and dy, written over y."""
    assert call.shard is not None
    shard, (n_rows, d) = call.shard, y.shape
    size = min(max(1, call.chunk_rows // shard.n_blocks), n_rows)  # of a rank's rows in a chunk
    logits = logits_space(head, shard.n_blocks * size)
    space = None if shard.same_states else y.new_empty((shard.n_blocks * size, d))
    for first in range(0, n_rows, size):
        chunk = slice(first, min(first + size, n_rows))
        rank_rows = y[chunk]
        room = None if space is None else space[: shard.n_blocks * len(rank_rows)]
        all_rows = rank_rows if room is None else shard.gathered(rank_rows, room)
        weight = None if of_all.row_weight is None else of_all.row_weight[:, chunk].flatten()
        g = form_logits(all_rows, head, logits[: len(all_rows)])
        _losses(g, of_all.targets[:, chunk].flatten(), weight, options, rows, chunk, call)
        form_gradients(g, all_rows, head, weight, results, call, first == 0)
        if call.needs_dy:
            shard.sum_of_blocks(all_rows.view(shard.n_blocks, *rank_rows.shape), rank_rows)


def _losses(
    logits: Tensor, targets: Tensor, weight: Tensor | None, options: LossOptions, rows: RowResults, chunk: slice,
    call: ReadoutCall,
) -> None:  # fmt: skip
    """The results of a chunk's rows, of which this rank's are kept in `rows`; the logits become their gradient."""
    assert call.shard is not None
    shard, n_rows, wide = call.shard, len(logits), rows.loss.dtype
    parts = logits.new_empty((n_parts(statistics=rows.statistics is not None), n_rows), dtype=wide)
    form_parts(logits, targets, options, shard, parts)
    of_chunk = RowResults(rows.loss.new_empty(n_rows))
    if rows.statistics is not None and rows.top1 is not None:
        of_chunk = RowResults(of_chunk.loss, rows.statistics.new_empty((3, n_rows)), rows.top1.new_empty(n_rows))
    finish_rows(logits, targets, weight, options, shard, shard.gathered(parts), of_chunk, gradient=call.needs_dlogits)
    size = chunk.stop - chunk.start
    of_rank = slice(shard.block * size, (shard.block + 1) * size)
    rows.loss[chunk] = of_chunk.loss[of_rank]
    if rows.statistics is not None and of_chunk.statistics is not None:
        rows.statistics[:3, chunk] = of_chunk.statistics[:, of_rank]
    if rows.top1 is not None and of_chunk.top1 is not None:
        rows.top1[chunk] = of_chunk.top1[of_rank]
