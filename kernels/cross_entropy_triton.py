"""The Triton kernel of kernels/cross_entropy.py: one program a row of logits, which is read twice.

The first read finds the row's maximum and sum, the second leaves the gradient.  A row fits the second-level cache, so
that memory sees one read and one write.  No row is held in registers: 32 to 64 registers a thread let several programs
share a multiprocessor, and while one computes the others load.  Each loads its next steps while it computes, too.
With statistics, whose arithmetic takes longer than the memory, whole steps have no masks: the rest of a row has a loop
of its own.

The target's column is one in thousands, so no step looks for it: its share of the gradient is put in at the end.

Exponentials are powers of two of `z * log2(e) - shift`, one fused multiply-add a column.  `shift` is the maximum times
log2(e), rounded.  All columns lose the same by that rounding; `residue` puts it back where it counts.  `shift` is
itself a fused multiply-add, of 0: so no compiler fuses its product, unrounded, into what it is subtracted from.

Online softmax: Milakov & Gimelshein, arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy import LossOptions, RowResults
from .launch import launch, power_of_2

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


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
def softcapped(x, softcap, EXACT: tl.constexpr):
    """softcap * tanh(x / softcap).

    Where not EXACT by a form of fewer instructions.  Its error, of a few units of 2^-22 softcap, does not shrink with
    x.  That is little beside the rounding of logits to 16 bits, if the softcap is as people use it.  But it makes small
    logits equal, so that statistics, which say which is the largest, take the exact form.
    """
    if EXACT:
        return softcap * tanh(x * (1.0 / softcap))
    if softcap > 100.0:
        z = softcap * tanh(x * (1.0 / softcap))
    else:
        z = softcap - 2.0 * softcap / (1.0 + tl.exp2(x * (2.0 * LOG2E / softcap)))
    return z


@triton.jit
def load_logits(
    logits_row, bias_ptr, column, n_columns, row_length, softcap, EXACT: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """z [BLOCK_VOCAB] after bias and softcap; -inf outside the vocabulary.  Where not MASKED, no column is outside.

    Read to the end of the row in memory, as only a mask of 16 columns each keeps accesses wide.
    """
    in_columns = column < n_columns
    if MASKED:
        z = tl.load(logits_row + column, mask=column < row_length, other=0.0).to(tl.float32)
    else:
        z = tl.load(logits_row + column).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    if softcap is not None:
        z = softcapped(z, softcap, EXACT or logits_row.dtype.element_ty == tl.float32)
    return tl.where(in_columns, z, float("-inf")) if MASKED else z


@triton.jit
def target_logit(logits_row, bias_ptr, target, in_range, softcap, EXACT: tl.constexpr):
    """z of the target's column; of a target out of range 0 before the softcap."""
    z = tl.load(logits_row + target, mask=in_range, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + target, mask=in_range, other=0.0).to(tl.float32)
    if softcap is not None:
        z = softcapped(z, softcap, EXACT or logits_row.dtype.element_ty == tl.float32)
    return z


@triton.jit
def summed(
    logits_row, bias_ptr, block_column, n_columns, row_length, smoothing, softcap,
    STATISTICS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first read of a row: maximum, `shift`, sum_j exp2(z_j * log2(e) - shift), a pivot, sum_j (z_j - pivot).

    The maximum is -1e38 at least: a row of -inf has a shift all the same.  The pivot is the first step's maximum, so
    that sums of z - pivot stay exact.  That sum is formed for smoothing.
    And, with STATISTICS, the largest z and its first column.  Their steps are short: each lane has its own sum.
    """
    BLOCK_VOCAB: tl.constexpr = block_column.shape[0]
    maximum = tl.full((), -1.0e38, tl.float32)
    shift = tl.fma(maximum, LOG2E, 0.0)
    total = tl.zeros((BLOCK_VOCAB,) if STATISTICS else (), tl.float32)
    pivot = maximum
    sum_z = tl.zeros((), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    top_step = tl.zeros((), tl.int32)
    n_whole = n_columns // BLOCK_VOCAB * BLOCK_VOCAB if STATISTICS else 0  # columns of steps without masks
    for MASKED in tl.static_range(0 if STATISTICS else 1, 2):
        begin, end = n_whole if MASKED else 0, n_columns if MASKED else n_whole
        for start in tl.range(begin, end, BLOCK_VOCAB, num_stages=1 if MASKED and STATISTICS else STAGES):
            column = start + block_column
            z = load_logits(logits_row, bias_ptr, column, n_columns, row_length, softcap, STATISTICS, MASKED)
            largest = tl.max(z, axis=0)
            if STATISTICS:
                top_step = tl.where(largest > top, start, top_step)
                top = tl.maximum(top, largest)
            maximum = tl.maximum(maximum, largest)
            new_shift = tl.fma(maximum, LOG2E, 0.0)
            e = tl.exp2(tl.fma(z, LOG2E, -new_shift))
            total = total * tl.exp2(shift - new_shift) + (e if STATISTICS else tl.sum(e, axis=0))
            shift = new_shift
            if smoothing is not None:
                pivot = tl.where(start == 0, maximum, pivot)
                sum_z += tl.sum(tl.where(column < n_columns, z - pivot, 0.0), axis=0)
    best = top_step
    if STATISTICS:
        total = tl.sum(total, axis=0)
        column = top_step + block_column
        z = load_logits(logits_row, bias_ptr, column, n_columns, row_length, softcap, STATISTICS, True)
        best = tl.min(tl.where(z == top, column, n_columns - 1), axis=0)  # none is, where all are nan
    return maximum, shift, total, pivot, sum_z, top, best


@triton.jit
def gradient_of(e, z, factor, n_words, smoothing, softcap, TARGET: tl.constexpr):
    """dCE/dx of e = exp(z - maximum), which `factor` makes the softmax, z-loss included.  TARGET: of the target's z."""
    hit = -1.0 if TARGET else 0.0
    if smoothing is not None:
        hit = hit * (1.0 - smoothing) - smoothing / n_words
    g = tl.fma(e, factor, hit)
    if softcap is not None:
        capped = z * (1.0 / softcap)
        g *= 1.0 - capped * capped
    return g


@triton.jit
def finished(
    logits_row, bias_ptr, block_column, n_columns, row_length, n_words, shift, factor, best, counts, smoothing, softcap,
    GRADIENT: tl.constexpr, STATISTICS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The second read of a row.  It leaves the gradient, but for the target's share: `with_target` puts that in.

    With STATISTICS: sum_j e_j * log2(e_j) of e_j = exp2(z_j * log2(e) - shift), and the largest z but `best`'s.
    Without, a row that does not count is not read.
    """
    BLOCK_VOCAB: tl.constexpr = block_column.shape[0]
    moment = tl.zeros((BLOCK_VOCAB,), tl.float32)
    second = tl.full((BLOCK_VOCAB,), float("-inf"), tl.float32)
    n_read = n_columns if STATISTICS else tl.where(counts, n_columns, 0)
    n_whole = n_columns // BLOCK_VOCAB * BLOCK_VOCAB if STATISTICS else 0  # columns of steps without masks
    for MASKED in tl.static_range(0 if STATISTICS else 1, 2):
        begin, end = n_whole if MASKED else 0, n_read if MASKED else n_whole
        for start in tl.range(begin, end, BLOCK_VOCAB, num_stages=1 if MASKED and STATISTICS else STAGES):
            column = start + block_column
            z = load_logits(logits_row, bias_ptr, column, n_columns, row_length, softcap, STATISTICS, MASKED)
            exponent = tl.fma(z, LOG2E, -shift)
            e = tl.exp2(exponent)
            if STATISTICS:
                moment = tl.fma(e, tl.maximum(exponent, -1000.0), moment)  # -inf * 0 would be nan
                second = tl.maximum(second, tl.where(column == best, float("-inf"), z))
            if GRADIENT:
                g = gradient_of(e, z, factor, n_words, smoothing, softcap, False)
                if MASKED and (smoothing is not None or softcap is not None):
                    g = tl.where(column < n_columns, g, 0.0)
                in_row = column < row_length if MASKED else None
                tl.store(logits_row + column, g.to(logits_row.dtype.element_ty), mask=in_row)
    return tl.sum(moment, axis=0), tl.max(second, axis=0)


@triton.jit
def gradient_of_target(z_target, n_words, shift, factor, smoothing, softcap):
    """dCE/dx of the target's column, whose z after bias and softcap is given."""
    e = tl.exp2(tl.fma(z_target, LOG2E, -shift))
    return gradient_of(e, z_target, factor, n_words, smoothing, softcap, True)


@triton.jit
def with_target(logits_row, block_column, n_columns, row_length, target, is_here, g, counts):
    """Put in the target's gradient g, where its column `is_here`; and zeros in a row that does not count."""
    tl.debug_barrier()  # every thread has stored its columns
    tl.store(logits_row + target, g.to(logits_row.dtype.element_ty), mask=is_here & counts)
    if counts == 0:
        zeros = tl.zeros(block_column.shape, logits_row.dtype.element_ty)
        for start in range(0, n_columns, block_column.shape[0]):
            tl.store(logits_row + start + block_column, zeros, mask=start + block_column < row_length)


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
    GRADIENT: tl.constexpr, BLOCK_VOCAB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    STATISTICS: tl.constexpr = statistics_ptr is not None
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
    z_target = target_logit(logits_row, bias_ptr, target, in_range, softcap, STATISTICS)

    maximum, shift, total, pivot, sum_z, top, best = summed(
        logits_row, bias_ptr, block_column, n_columns, row_length, smoothing, softcap, STATISTICS, STAGES
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

    tl.debug_barrier()  # every thread has read the target's logit
    if GRADIENT or STATISTICS:
        factor = scale / total
        g_target = gradient_of_target(z_target, n_columns, shift, factor, smoothing, softcap)
        moment, second = finished(
            logits_row, bias_ptr, block_column, n_columns, row_length, n_columns, shift, factor, best, counts,
            smoothing, softcap, GRADIENT, STATISTICS, STAGES,
        )  # fmt: skip
        if GRADIENT:
            with_target(logits_row, block_column, n_columns, row_length, target, in_range, g_target, counts)
        if STATISTICS:
            entropy = LN2 * (tl.log2(total) - moment / total)
            margin = tl.where(lse == lse, top - second, float("nan"))
            store_statistics(statistics_ptr, top1_ptr, out, n_results, lse, entropy, margin, best)


def step_of(logits: Tensor, options: LossOptions, statistics: bool) -> tuple[int, int, dict[str, int]]:
    """Columns of a step over a row, Triton's num_stages (one more than steps loaded ahead), how the kernel is launched.

    Measured on an H200: what keeps more in registers a column has shorter steps.  A bias is read in every row, from
    cache: to load it ahead costs more than it gains, as for a softcap, whose arithmetic takes longer than the memory.
    """
    plain = options.bias is None and options.softcap is None
    if statistics:
        block, num_warps = 2048 if plain and logits.element_size() == 2 else 1024, 4
    else:
        block, num_warps = (4096, 8) if options.softcap is None else (2048, 4)
    block = max(128, min(block, power_of_2(logits.shape[1])))
    launched = {"num_warps": max(1, min(num_warps, block // 128))}
    if torch.version.hip:
        return block, 1, launched
    if options.bias is not None and logits.is_cuda:
        launched["maxnreg"] = 128  # left alone, the assembler spills a word or two to fit one more program
    return block, 3 if plain else 1, launched


def cross_entropy(
    logits: Tensor, targets: Tensor, row_weight: Tensor | None, options: LossOptions, results: RowResults,
    first_row: int, gradient: bool,
) -> None:  # fmt: skip
    n_rows, n_columns = logits.shape
    block, stages, launched = step_of(logits, options, results.statistics is not None)
    launch(
        cross_entropy_kernel, (n_rows,),
        (logits, targets, row_weight, options.bias, options.z_loss, *results),
        n_columns, logits.stride(0), targets.shape[0], results.loss.shape[0], first_row, options.ignore_index,
        options.label_smoothing or None, options.softcap, gradient, block, stages,
        **launched,
    )  # fmt: skip
