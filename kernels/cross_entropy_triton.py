"""The Triton kernel of kernels/cross_entropy.py: one program a row of logits, which is read twice.

The first read finds the row's maximum and sum, the second leaves the gradient.  A row fits the second-level cache, so
that memory sees one read and one write.  No row is held in registers: 32 to 64 registers a thread let several programs
share a multiprocessor, and while one computes the others load.

Exponentials are powers of two of `z * log2(e) - shift`, one fused multiply-add a column.  `shift` is the maximum times
log2(e), rounded.  All columns lose the same by that rounding; `residue` puts it back where it counts.  `shift` is
itself a fused multiply-add, of 0: so no compiler fuses its product, unrounded, into what it is subtracted from.

Online softmax: Milakov & Gimelshein, arXiv 1805.02867.
"""

import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy import LossOptions, RowResults
from .launch import HIP, launch, power_of_2

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
BLOCK_VOCAB = 4096  # columns of a step of plain rows that end where the vocabulary does; `step_of` has the others
NUM_WARPS = 8


@triton.jit
def tanh(x):
    decay = tl.exp(-2.0 * tl.abs(x))
    large = tl.where(x < 0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
    square = x * x  # 1 - decay cancels for small x: the series is exact to float32 there
    small = x * (
        1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * 62.0 / 2835.0)))
    )
    return tl.where(square < 0.09, small, large)


@triton.jit
def load_logits(logits_row, bias_ptr, column, n_columns, row_length, softcap):
    """z [BLOCK_VOCAB] after bias and softcap; -inf outside the vocabulary.

    Read to the end of the row in memory, as only a mask of 16 columns each keeps accesses wide.
    """
    in_columns = column < n_columns
    z = tl.load(logits_row + column, mask=column < row_length, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return tl.where(in_columns, z, float("-inf"))


@triton.jit
def target_logit(logits_row, bias_ptr, target, in_range, softcap):
    """z of the target's column; of a target out of range 0 before the softcap."""
    z = tl.load(logits_row + target, mask=in_range, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + target, mask=in_range, other=0.0).to(tl.float32)
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def summed(logits_row, bias_ptr, block_column, n_columns, row_length, smoothing, softcap):
    """The first read of a row: maximum, `shift`, sum_j exp2(z_j * log2(e) - shift), a pivot and sum_j (z_j - pivot).

    The pivot is the first block's maximum, so that sums of z - pivot stay exact.  The last sum is formed for smoothing.
    """
    BLOCK_VOCAB: tl.constexpr = block_column.shape[0]
    maximum = tl.full((), -1.0e38, tl.float32)
    shift = tl.fma(maximum, LOG2E, 0.0)
    total = tl.zeros((), tl.float32)
    pivot = maximum
    sum_z = tl.zeros((), tl.float32)
    for start in range(0, n_columns, BLOCK_VOCAB):
        column = start + block_column
        z = load_logits(logits_row, bias_ptr, column, n_columns, row_length, softcap)
        maximum = tl.maximum(maximum, tl.max(z, axis=0))
        new_shift = tl.fma(maximum, LOG2E, 0.0)
        total = total * tl.exp2(shift - new_shift) + tl.sum(tl.exp2(tl.fma(z, LOG2E, -new_shift)), axis=0)
        shift = new_shift
        if smoothing is not None:
            pivot = tl.where(start == 0, maximum, pivot)
            sum_z += tl.sum(tl.where(column < n_columns, z - pivot, 0.0), axis=0)
    return maximum, shift, total, pivot, sum_z


@triton.jit
def measured(z, e, below, column, moment, top1, top2, best):
    """Each lane's moment sum e * below, its largest and second largest z, and the largest one's column, a step on."""
    moment += tl.where(e > 0, e * below, 0.0)
    top2 = tl.maximum(top2, tl.minimum(top1, z))
    best = tl.where(z > top1, column, best)
    return moment, tl.maximum(top1, z), top2, best


@triton.jit
def top2_of_lanes(lane_top1, lane_top2, lane_best):
    """A row's largest z, the first column of it, and the second largest."""
    top1 = tl.max(lane_top1, axis=0)
    best = tl.min(tl.where(lane_top1 == top1, lane_best, 2147483647), axis=0)
    return top1, best, tl.max(tl.where(lane_best == best, lane_top2, lane_top1), axis=0)


@triton.jit
def gradient_of(e, z, scale, column, target, n_columns, n_words, smoothing, softcap, counts):
    """dCE/dx [BLOCK_VOCAB] of e = exp(z - maximum), whose `scale` makes it the softmax; 0 past n_columns of n_words."""
    hit = tl.where(column == target, -1.0, 0.0)
    if smoothing is not None:
        hit = hit * (1.0 - smoothing) - smoothing / n_words
    g = tl.fma(e, scale, hit)
    if softcap is not None:
        g *= 1.0 - (z / softcap) * (z / softcap)
    if smoothing is not None or softcap is not None:
        g = tl.where(column < n_columns, g, 0.0)
    return tl.where(counts, g, 0.0)


@triton.jit
def with_z_loss(loss, lse, z_loss_ptr):
    """The row's loss with its z-loss, and the factor of the softmax in the gradient."""
    scale = tl.full((), 1.0, tl.float32)
    if z_loss_ptr is not None:
        z_loss = tl.load(z_loss_ptr)
        loss += z_loss * lse * lse
        scale += 2.0 * z_loss * lse
    return loss, scale


@triton.jit
def store_statistics(statistics_ptr, top1_ptr, out, n_results, lse, entropy, margin, top1):
    tl.store(statistics_ptr + out, lse)
    tl.store(statistics_ptr + n_results + out, entropy)
    tl.store(statistics_ptr + 2 * n_results + out, margin)
    tl.store(top1_ptr + out, top1.to(tl.int64))


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, row_weight_ptr, bias_ptr, z_loss_ptr, loss_ptr, statistics_ptr, top1_ptr,
    n_columns, row_length, n_tokens, n_results, first_row, ignore_index, smoothing, softcap,
    GRADIENT: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out = first_row + row  # among all rows of all loops, whose targets repeat every n_tokens
    logits_row = logits_ptr + row * row_length
    block_column = tl.arange(0, BLOCK_VOCAB)  # [BLOCK_VOCAB]
    target = tl.load(targets_ptr + out % n_tokens)
    in_range = (target >= 0) & (target < n_columns)
    counts = target != ignore_index
    if row_weight_ptr is not None:
        counts = counts & (tl.load(row_weight_ptr + out) != 0.0)

    # the target's logit, loaded before any gradient is stored
    z_target = target_logit(logits_row, bias_ptr, target, in_range, softcap)

    maximum, shift, total, pivot, sum_z = summed(
        logits_row, bias_ptr, block_column, n_columns, row_length, smoothing, softcap
    )
    residue = tl.fma(maximum, LOG2E, -shift)
    log_total = LN2 * (tl.log2(total) - residue)  # log sum_j exp(z_j - maximum)
    lse = maximum + log_total

    # differences from the maximum, not from lse, which a large common offset would round
    loss = log_total + (maximum - z_target)
    if smoothing is not None:
        uniform = log_total + (maximum - pivot - sum_z / n_columns)
        loss = (1.0 - smoothing) * loss + smoothing * uniform
    loss, scale = with_z_loss(loss, lse, z_loss_ptr)
    loss = tl.where(in_range, loss, float("nan"))
    tl.store(loss_ptr + out, tl.where(target == ignore_index, 0.0, loss))

    lane_top1 = tl.full((BLOCK_VOCAB,), float("-inf"), tl.float32)
    lane_top2 = tl.full((BLOCK_VOCAB,), float("-inf"), tl.float32)
    lane_best = tl.full((BLOCK_VOCAB,), 2147483647, tl.int32)
    lane_moment = tl.zeros((BLOCK_VOCAB,), tl.float32)
    tl.debug_barrier()  # every thread has read the target's logit
    if GRADIENT or statistics_ptr is not None:
        for start in range(0, n_columns, BLOCK_VOCAB):
            column = start + block_column
            z = load_logits(logits_row, bias_ptr, column, n_columns, row_length, softcap)
            exponent = tl.fma(z, LOG2E, -shift)
            e = tl.exp2(exponent)
            if statistics_ptr is not None:
                lane_moment, lane_top1, lane_top2, lane_best = measured(
                    z, e, exponent - residue, column, lane_moment, lane_top1, lane_top2, lane_best
                )
            if GRADIENT:
                g = gradient_of(e, z, scale / total, column, target, n_columns, n_columns, smoothing, softcap, counts)
                tl.store(logits_row + column, g.to(logits_ptr.dtype.element_ty), mask=column < row_length)

    if statistics_ptr is not None:
        top1, best, top2 = top2_of_lanes(lane_top1, lane_top2, lane_best)
        entropy = log_total - LN2 * tl.sum(lane_moment, axis=0) / total
        store_statistics(statistics_ptr, top1_ptr, out, n_results, lse, entropy, top1 - top2, best)


def step_of(logits: Tensor, options: LossOptions, statistics: bool) -> tuple[int, dict[str, int]]:
    """Columns of a step over a row of logits, and how the kernel is launched.

    What needs more registers a column gets fewer columns, so that at least 16 warps of any kind are resident: rows with
    a bias or a softcap, with statistics, or longer in memory than the vocabulary.
    """
    n_columns = logits.shape[1]
    finished, padded = options.bias is not None or options.softcap is not None, logits.stride(0) > n_columns
    block = max(128, min(BLOCK_VOCAB >> max(finished + statistics, padded), power_of_2(n_columns)))
    # left alone, NVIDIA's assembler spills a word or two of the elaborate rows to fit one more program
    elaborate = (options.bias is not None or statistics) and logits.is_cuda and not HIP
    return block, {"num_warps": max(1, min(NUM_WARPS, block // 128))} | ({"maxnreg": 128} if elaborate else {})


def cross_entropy(
    logits: Tensor, targets: Tensor, row_weight: Tensor | None, options: LossOptions, results: RowResults,
    first_row: int, gradient: bool,
) -> None:  # fmt: skip
    n_rows, n_columns = logits.shape
    block, launched = step_of(logits, options, results.statistics is not None)
    launch(
        cross_entropy_kernel, (n_rows,),
        (logits, targets, row_weight, options.bias, options.z_loss, *results),
        n_columns, logits.stride(0), targets.shape[0], results.loss.shape[0], first_row, options.ignore_index,
        options.label_smoothing or None, options.softcap, gradient, block,
        **launched,
    )  # fmt: skip
