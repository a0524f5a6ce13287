"""The Triton kernels of kernels/sharded_cross_entropy.py: one program a row of logits, before and after the exchange.

The passes over a row are those of kernels/cross_entropy_triton.py: the first kernel has its first read, the second its
second.  With statistics the first kernel reads the row twice.
"""

import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy import LossOptions, RowResults
from .cross_entropy_triton import (
    LN2,
    LOG2E,
    finished,
    gradient_of_target,
    step_of,
    store_statistics,
    summed,
    target_logit,
    with_target,
    with_z_loss,
)
from .launch import launch, power_of_2
from .vocabulary_shard import VocabularyShard


@triton.jit
def parts_kernel(
    logits_ptr, targets_ptr, bias_ptr, parts_ptr,
    n_columns, row_length, n_rows, first_column, smoothing, softcap,
    STATISTICS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * row_length
    out = parts_ptr + row
    block_column = tl.arange(0, BLOCK_VOCAB)  # [BLOCK_VOCAB]
    target = tl.load(targets_ptr + row) - first_column
    here = (target >= 0) & (target < n_columns)

    z_target = target_logit(logits_row, bias_ptr, target, here, softcap, STATISTICS)
    maximum, shift, total, pivot, sum_z, _, best = summed(
        logits_row, bias_ptr, block_column, n_columns, row_length, smoothing, softcap, STATISTICS, STAGES
    )
    residue = tl.fma(maximum, LOG2E, -shift)
    unshift = tl.exp2(-residue)  # total is relative to shift, and goes out relative to the maximum
    tl.store(out, maximum)
    tl.store(out + n_rows, total * unshift)
    tl.store(out + 2 * n_rows, z_target)
    if smoothing is not None:
        tl.store(out + 3 * n_rows, n_columns * (maximum - pivot) - sum_z)
    else:
        tl.store(out + 3 * n_rows, 0.0)

    if STATISTICS:
        moment, second = finished(
            logits_row, bias_ptr, block_column, n_columns, row_length, n_columns, shift, 0.0, best, True, smoothing,
            softcap, False, True, STAGES,
        )  # fmt: skip
        tl.store(out + 4 * n_rows, (moment - residue * total) * unshift * LN2)
        tl.store(out + 5 * n_rows, second)
        tl.store(out + 6 * n_rows, best.to(tl.float32))


@triton.jit
def finish_kernel(
    logits_ptr, targets_ptr, row_weight_ptr, bias_ptr, z_loss_ptr, parts_ptr, loss_ptr, statistics_ptr, top1_ptr,
    n_columns, row_length, n_rows, n_parts, first_column, n_words, most_rows, n_ranks, ignore_index, smoothing, softcap,
    GRADIENT: tl.constexpr, BLOCK_RANKS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * row_length
    block_column = tl.arange(0, BLOCK_VOCAB)  # [BLOCK_VOCAB]
    rank = tl.arange(0, BLOCK_RANKS)  # [BLOCK_RANKS]
    in_ranks = rank < n_ranks
    sent = parts_ptr + rank.to(tl.int64) * n_parts * n_rows + row
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index

    largest = tl.load(sent, mask=in_ranks, other=-1.0e38)
    sums = tl.load(sent + n_rows, mask=in_ranks, other=0.0)
    z_target = tl.sum(tl.load(sent + 2 * n_rows, mask=in_ranks, other=0.0), axis=0)
    maximum = tl.max(largest, axis=0)
    shift = tl.fma(maximum, LOG2E, 0.0)
    residue = tl.fma(maximum, LOG2E, -shift)
    share = tl.exp2(tl.fma(largest, LOG2E, -shift))  # of a rank's sum in the whole
    total = tl.sum(share * sums, axis=0)
    log_total = LN2 * (tl.log2(total) - residue)  # log sum_j exp(z_j - maximum)
    lse = maximum + log_total

    # differences from the maximum, not from lse, which a large common offset would round
    loss = log_total + (maximum - z_target)
    if smoothing is not None:
        of_rank = tl.minimum(most_rows, n_words - rank * most_rows)  # columns
        gaps = tl.load(sent + 3 * n_rows, mask=in_ranks, other=0.0) + of_rank * (maximum - largest)
        mean_gap = tl.sum(tl.where(in_ranks, gaps, 0.0), axis=0) / n_words
        loss = (1.0 - smoothing) * loss + smoothing * (log_total + mean_gap)
    loss, scale = with_z_loss(loss, lse, z_loss_ptr)
    loss = tl.where((target >= 0) & (target < n_words), loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))

    if statistics_ptr is not None:
        moments = tl.load(sent + 4 * n_rows, mask=in_ranks, other=0.0)
        seconds = tl.load(sent + 5 * n_rows, mask=in_ranks, other=float("-inf"))
        best = tl.load(sent + 6 * n_rows, mask=in_ranks, other=0.0).to(tl.int32)
        winner = tl.min(tl.where(largest == maximum, rank, BLOCK_RANKS), axis=0)
        others = tl.where(sums == 0, float("-inf"), largest)
        second = tl.max(tl.where(rank == winner, seconds, others), axis=0)
        moment = tl.sum(share * (moments + sums * (largest - maximum)), axis=0)
        entropy = log_total - moment / total
        top1 = winner * most_rows + tl.sum(tl.where(rank == winner, best, 0), axis=0)
        margin = tl.where(total > 0, maximum - second, float("nan"))
        store_statistics(statistics_ptr, top1_ptr, row, n_rows, lse, entropy, margin, top1)

    if GRADIENT:
        if row_weight_ptr is not None:
            counts = counts & (tl.load(row_weight_ptr + row) != 0.0)
        column = target - first_column
        is_here = (column >= 0) & (column < n_columns)
        factor = scale / total
        g_target = gradient_of_target(z_target, n_words, shift, factor, smoothing, softcap)
        finished(
            logits_row, bias_ptr, block_column, n_columns, row_length, n_words, shift, factor, 0, counts, smoothing,
            softcap, True, False, STAGES,
        )  # fmt: skip
        with_target(logits_row, block_column, n_columns, row_length, column, is_here, g_target, counts)


def form_parts(logits: Tensor, targets: Tensor, options: LossOptions, shard: VocabularyShard, parts: Tensor) -> None:
    n_rows, n_columns = logits.shape
    statistics = len(parts) > 4
    block, stages, launched = step_of(logits, options, statistics)
    launch(
        parts_kernel, (n_rows,),
        (logits, targets, options.bias, parts),
        n_columns, logits.stride(0), n_rows, shard.rows.start, options.label_smoothing or None, options.softcap,
        statistics, block, stages,
        **launched,
    )  # fmt: skip


def finish_rows(
    logits: Tensor, targets: Tensor, row_weight: Tensor | None, options: LossOptions, shard: VocabularyShard,
    parts: Tensor, results: RowResults, gradient: bool,
) -> None:  # fmt: skip
    n_rows, n_columns = logits.shape
    block, stages, launched = step_of(logits, options, statistics=False)
    launch(
        finish_kernel, (n_rows,),
        (logits, targets, row_weight, options.bias, options.z_loss, parts, *results),
        n_columns, logits.stride(0), n_rows, parts.shape[1], shard.rows.start, shard.n_words, shard.most_rows,
        shard.n_ranks, options.ignore_index, options.label_smoothing or None, options.softcap,
        gradient, power_of_2(shard.n_ranks), block, stages,
        **launched,
    )  # fmt: skip
