"""Softmax, cross-entropy and its gradient over one chunk of logits, in place.

With CE of `kernels.row_loss` for a row x [V] with target t, after bias and softcap `z = c * tanh((x + b) / c)`:

    g_j  = omega * dCE/dx_j
         = omega * (1 - (z_j/c)^2) * (softmax(z)_j * (1 + 2 zeta lse) - (1 - s) [j = t] - s / V)

g overwrites x.  omega is the row's weight in the loss relative to the largest one, so that |g| is of order 1 in
every dtype; the common factor is applied to the products in float32.  A row whose target is `ignore_index` has g = 0.
The pass can also leave the row's entropy, its largest logit's index and the margin to the second largest.

Shapes: logits [R, V] of any dtype, read as float32; per-row results float32.  Bytes: the logits read once and
written once where a row fits a program's registers (V <= 16384; 24576 for plain 16-bit ones; 8192 with a softcap or
statistics), read twice otherwise.

Online softmax: Milakov & Gimelshein, arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy_cpu import cross_entropy_cpu
from .device import launch, multiprocessors, uses_triton
from .row_loss import LossOptions, RowResults

HELD_BLOCK = 8192  # columns of a block of a row that a program keeps in registers
# How many it keeps without spills; one more of plain 16-bit logits, one fewer with statistics or a softcap.
MAX_HELD_BLOCKS = 2


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
def finish_logits(z, bias_ptr, column, in_columns, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Bias and softcap of raw logits z [BLOCK_ROWS, BLOCK_VOCAB]; -inf outside the vocabulary."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return tl.where(in_columns[None, :], z, float("-inf"))


@triton.jit
def fold_softmax(z, maximum, total):
    """One step of the online softmax over z [BLOCK_ROWS, BLOCK_VOCAB]: the new maximum, exp(z - maximum), total."""
    new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
    e = tl.exp(z - new_maximum[:, None])
    return new_maximum, e, total * tl.exp(maximum - new_maximum) + tl.sum(e, axis=1)


@triton.jit
def fold_moment(z, e, maximum, total, new_maximum, moment):
    """`moment` = sum_j exp(z_j - maximum) * (z_j - maximum), carried over to the new maximum; -inf logits add 0."""
    shift = maximum - new_maximum
    carried = tl.exp(shift) * (moment + total * shift)
    return carried + tl.sum(tl.where(e > 0, e * (z - new_maximum[:, None]), 0.0), axis=1)


@triton.jit
def fold_top2(z, column, top1, best, top2):
    """The largest logit, its column (the lowest among equals) and the second largest, after one more block."""
    block_top1 = tl.max(z, axis=1)
    block_best = tl.min(tl.where(z == block_top1[:, None], column[None, :], 2147483647), axis=1)
    block_top2 = tl.max(tl.where(column[None, :] == block_best[:, None], float("-inf"), z), axis=1)
    new_top2 = tl.maximum(tl.minimum(top1, block_top1), tl.maximum(top2, block_top2))
    return tl.maximum(top1, block_top1), tl.where(block_top1 > top1, block_best, best), new_top2


@triton.jit
def gradient(z, lse, target, omega, column, smoothing, softcap, z_loss, n_columns, HAS_SOFTCAP: tl.constexpr):
    """omega * dCE/dx for z [BLOCK_ROWS, BLOCK_VOCAB]; 0 where omega is 0, whatever the logits."""
    g = tl.exp(z - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None] - smoothing / n_columns
    g -= tl.where(column[None, :] == target[:, None], 1.0 - smoothing, 0.0)
    if HAS_SOFTCAP:
        g *= 1.0 - (z / softcap) * (z / softcap)
    return tl.where((omega != 0.0)[:, None], g * omega[:, None], 0.0)


@triton.jit
def load_logits(
    logits_row, bias_ptr, column, in_rows, n_columns, row_length, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z [BLOCK_ROWS, BLOCK_VOCAB] after bias and softcap; -inf outside the vocabulary."""
    inside = in_rows[:, None] & (column < row_length)[None, :]
    z = tl.load(logits_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return finish_logits(z, bias_ptr, column, column < n_columns, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def empty_sums(BLOCK_ROWS: tl.constexpr):
    """The sums of `fold_block` before the first block."""
    zero = tl.zeros((BLOCK_ROWS,), tl.float32)
    lowest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK_ROWS,), tl.int32)
    return zero - 1.0e38, zero, zero, zero, zero, zero, lowest, best, lowest


@triton.jit
def fold_block(z, column, target, n_columns, first, sums, HAS_STATISTICS: tl.constexpr):
    """The sums over a row, [BLOCK_ROWS] each, after one more block z [BLOCK_ROWS, BLOCK_VOCAB] of it."""
    maximum, total, pivot, sum_z, z_target, moment, top1, best, top2 = sums
    new_maximum, e, new_total = fold_softmax(z, maximum, total)
    if HAS_STATISTICS:
        moment = fold_moment(z, e, maximum, total, new_maximum, moment)
        top1, best, top2 = fold_top2(z, column, top1, best, top2)
    pivot = tl.where(first, new_maximum, pivot)  # the first block's maximum: sums of z - pivot stay exact
    sum_z += tl.sum(tl.where((column < n_columns)[None, :], z - pivot[:, None], 0.0), axis=1)
    z_target += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), axis=1)
    return new_maximum, new_total, pivot, sum_z, z_target, moment, top1, best, top2


@triton.jit
def store_gradient(
    logits_row, z, lse, target, omega, column, in_rows, n_columns, row_length, smoothing, softcap, z_loss,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    g = gradient(z, lse, target, omega, column, smoothing, softcap, z_loss, n_columns, HAS_SOFTCAP)
    inside = in_rows[:, None] & (column < row_length)[None, :]
    tl.store(logits_row + column[None, :], g.to(logits_row.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_rows(
    group,
    logits_ptr, targets_ptr, omega_ptr, bias_ptr, loss_ptr, lse_ptr, entropy_ptr, margin_ptr, top1_ptr,
    n_rows, n_columns, row_length, n_tokens, first_row, ignore_index, smoothing, softcap, z_loss,
    HAS_GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    HELD_BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    """Rows `group * BLOCK_ROWS` and on of the chunk."""
    row = tl.cast(group, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS], in the chunk
    in_rows = row < n_rows
    out = first_row + row  # among all rows of all loops, whose targets repeat every n_tokens
    logits_row = logits_ptr + row[:, None] * row_length
    block_column = tl.arange(0, BLOCK_VOCAB)  # [BLOCK_VOCAB]
    target = tl.load(targets_ptr + out % n_tokens, mask=in_rows, other=0)

    sums = empty_sums(BLOCK_ROWS)
    held = ()  # all of a row, or, where HELD_BLOCKS is 0, nothing
    for block in tl.static_range(HELD_BLOCKS):
        column = block * BLOCK_VOCAB + block_column
        z = load_logits(
            logits_row, bias_ptr, column, in_rows, n_columns, row_length, softcap, HAS_BIAS, HAS_SOFTCAP
        )  # fmt: skip
        held = held + (z,)  # type: ignore[assignment]
    for block in tl.static_range(HELD_BLOCKS):
        column = block * BLOCK_VOCAB + block_column
        sums = fold_block(held[block], column, target, n_columns, block == 0, sums, HAS_STATISTICS)
    if HELD_BLOCKS == 0:
        for start in range(0, n_columns, BLOCK_VOCAB):
            column = start + block_column
            z = load_logits(
                logits_row, bias_ptr, column, in_rows, n_columns, row_length, softcap, HAS_BIAS, HAS_SOFTCAP
            )  # fmt: skip
            sums = fold_block(z, column, target, n_columns, start == 0, sums, HAS_STATISTICS)
    maximum, total, pivot, sum_z, z_target, moment, top1, best, top2 = sums

    lse = maximum + tl.log(total)
    ignored = target == ignore_index
    # differences from the maximum, not from lse, which a large common offset would round
    loss = tl.log(total) + (1.0 - smoothing) * (maximum - z_target) + z_loss * lse * lse
    loss += tl.where(smoothing > 0, smoothing * (maximum - pivot - sum_z / n_columns), 0.0)
    loss = tl.where((target >= 0) & (target < n_columns), loss, float("nan"))
    tl.store(loss_ptr + out, tl.where(ignored, 0.0, loss), mask=in_rows)
    if HAS_STATISTICS:
        tl.store(lse_ptr + out, lse, mask=in_rows)
        tl.store(entropy_ptr + out, tl.log(total) - moment / total, mask=in_rows)
        tl.store(margin_ptr + out, top1 - top2, mask=in_rows)
        tl.store(top1_ptr + out, best.to(tl.int64), mask=in_rows)

    if HAS_GRADIENT:
        omega = tl.load(omega_ptr + out, mask=in_rows, other=0.0)
        for block in tl.static_range(HELD_BLOCKS):
            column = block * BLOCK_VOCAB + block_column
            store_gradient(
                logits_row, held[block], lse, target, omega, column, in_rows, n_columns, row_length, smoothing,
                softcap, z_loss, HAS_SOFTCAP,
            )  # fmt: skip
        if HELD_BLOCKS == 0:
            for start in range(0, n_columns, BLOCK_VOCAB):
                column = start + block_column
                z = load_logits(
                    logits_row, bias_ptr, column, in_rows, n_columns, row_length, softcap, HAS_BIAS, HAS_SOFTCAP
                )  # fmt: skip
                store_gradient(
                    logits_row, z, lse, target, omega, column, in_rows, n_columns, row_length, smoothing, softcap,
                    z_loss, HAS_SOFTCAP,
                )  # fmt: skip


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, omega_ptr, bias_ptr, loss_ptr, lse_ptr, entropy_ptr, margin_ptr, top1_ptr,
    n_rows, n_columns, row_length, n_tokens, first_row, ignore_index, smoothing, softcap, z_loss,
    HAS_GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    HELD_BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr,
):  # fmt: skip
    first, step = tl.program_id(0), tl.num_programs(0)
    if HELD_BLOCKS > 0:  # not in a loop, in which the registers would not hold a row
        cross_entropy_rows(
            first, logits_ptr, targets_ptr, omega_ptr, bias_ptr, loss_ptr, lse_ptr, entropy_ptr, margin_ptr, top1_ptr,
            n_rows, n_columns, row_length, n_tokens, first_row, ignore_index, smoothing, softcap, z_loss,
            HAS_GRADIENT, HAS_BIAS, HAS_SOFTCAP, HAS_STATISTICS, HELD_BLOCKS, BLOCK_ROWS, BLOCK_VOCAB,
        )  # fmt: skip
    else:
        for group in range(first, tl.cdiv(n_rows, BLOCK_ROWS), step):
            cross_entropy_rows(
                group, logits_ptr, targets_ptr, omega_ptr, bias_ptr, loss_ptr, lse_ptr, entropy_ptr, margin_ptr,
                top1_ptr, n_rows, n_columns, row_length, n_tokens, first_row, ignore_index, smoothing, softcap, z_loss,
                HAS_GRADIENT, HAS_BIAS, HAS_SOFTCAP, HAS_STATISTICS, HELD_BLOCKS, BLOCK_ROWS, BLOCK_VOCAB,
            )  # fmt: skip


def cross_entropy_blocks(n_columns: int, plain: bool, elaborate: bool) -> dict[str, int]:
    """Tile and warps for a vocabulary of `n_columns`.

    plain: 16-bit logits, no bias, no softcap, no statistics. elaborate: a softcap or statistics.
    """
    held_block = min(HELD_BLOCK, max(16, triton.next_power_of_2(n_columns)))
    held_blocks = triton.cdiv(n_columns, held_block)
    if held_blocks > MAX_HELD_BLOCKS + plain - elaborate:
        # a program has its multiprocessor to itself (cross_entropy_programs): loads in flight are what counts
        warps = 32 if elaborate and not torch.version.hip else 16  # so many that no register is spilled
        return {"HELD_BLOCKS": 0, "BLOCK_ROWS": 1, "BLOCK_VOCAB": (1 + plain) * HELD_BLOCK, "num_warps": warps}
    block_rows = max(1, min(8, 2048 // held_block))
    warps = max(4, block_rows * held_block // 512)
    return {"HELD_BLOCKS": held_blocks, "BLOCK_ROWS": block_rows, "BLOCK_VOCAB": held_block, "num_warps": warps}


def cross_entropy_programs(n_rows: int, blocks: dict[str, int], device: torch.device) -> int:
    """One for each block of rows; where rows are read twice, one a multiprocessor, whose row is still in L2 then."""
    n_groups = triton.cdiv(n_rows, blocks["BLOCK_ROWS"])
    if blocks["HELD_BLOCKS"] > 0:
        return n_groups
    return min(n_groups, multiprocessors(device))


def _cross_entropy_triton(
    logits: Tensor, targets: Tensor, omega: Tensor | None, bias: Tensor | None, options: LossOptions,
    results: RowResults, first_row: int,
) -> None:  # fmt: skip
    n_rows, n_columns = logits.shape
    plain = logits.element_size() == 2 and bias is None and options.softcap is None and results.lse is None
    blocks = cross_entropy_blocks(n_columns, plain, options.softcap is not None or results.lse is not None)
    launch(
        cross_entropy_kernel, (cross_entropy_programs(n_rows, blocks, logits.device),), logits,
        logits_ptr=logits, targets_ptr=targets, omega_ptr=omega, bias_ptr=bias,
        loss_ptr=results.loss, lse_ptr=results.lse, entropy_ptr=results.entropy,
        margin_ptr=results.margin, top1_ptr=results.top1,
        n_rows=n_rows, n_columns=n_columns, row_length=logits.stride(0), n_tokens=targets.shape[0], first_row=first_row,
        ignore_index=options.ignore_index, smoothing=options.label_smoothing,
        softcap=1.0 if options.softcap is None else options.softcap, z_loss=options.z_loss,
        HAS_GRADIENT=omega is not None, HAS_BIAS=bias is not None, HAS_SOFTCAP=options.softcap is not None,
        HAS_STATISTICS=results.lse is not None, **blocks,
    )  # fmt: skip


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    omega: Tensor | None,
    bias: Tensor | None,
    options: LossOptions,
    results: RowResults,
    first_row: int,
) -> None:
    """Write the results of rows `first_row, first_row + 1, ...` whose logits [R, V] are given.

    A row is stride(0) elements long in memory: a length past V that is a multiple of 16 keeps a GPU's accesses wide
    for any V; what lies past V is ignored and may be overwritten.  targets [n_tokens] serves row r with
    `targets[r % n_tokens]`; omega and the results are indexed by r.  With omega the logits are overwritten by
    `omega * dCE/dlogits`; without it their content is undefined afterwards.  A target outside [0, V) that is not
    `ignore_index` is never read: its loss is nan (Triton); callers check on CPU.
    """
    run = _cross_entropy_triton if uses_triton(logits) else cross_entropy_cpu
    run(logits, targets, omega, bias, options, results, first_row)
