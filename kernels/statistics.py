"""`readout_statistics`: what K states predict, streamed over the vocabulary; no logits in memory and no gradient.

For every loop and token, with z = softcap(norm(h) W^T + bias):

    loss = lse - z_target,  lse = log sum_j exp(z_j),  entropy = lse - sum_j p_j z_j,  margin = top1 - top2,  top1 id

A program holds a block of rows and sweeps the vocabulary: a tile of logits is a product on the matrix units, folded
into the rows' running maximum, sum, first moment, target logit and two largest logits while still in registers.
With few rows the vocabulary is split between programs, and a second kernel folds their partial results.  On the CPU
the logits of one chunk of rows are formed and folded at a time.

FLOPs: 2 K N d V.  Bytes on a GPU: the head once a block of rows, `ceil(K N / BLOCK_ROWS) V d`, and the normed rows once
a tile of the vocabulary, `ceil(V / BLOCK_VOCAB) K N d`, both from cache where the blocks run side by side; results 28
bytes a row and split.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import (
    as_rows,
    check_index,
    check_range,
    check_readout,
    check_softcap,
    check_tensors,
    check_vector,
    gathered,
)
from .cross_entropy import finish_logits, fold_moment, fold_softmax, fold_top2
from .device import accumulator, autocast_dtype, launch, multiprocessors, product_dtype, uses_triton
from .readout import Readout, default_chunk_rows, loops_of, normed_rows, read_out
from .row_loss import LossOptions, RowResults


class ReadoutStatistics(NamedTuple):
    """The result of `readout_statistics`, each [K, ...] float32 (top1: int64); loss is None without targets."""

    loss: Tensor | None
    lse: Tensor
    entropy: Tensor
    margin: Tensor
    top1: Tensor


# Triton ---------------------------------------------------------------------------------------------------------------


@triton.jit
def stream_kernel(
    y_ptr, head_ptr, bias_ptr, targets_ptr, partial_ptr, best_ptr,
    n_rows, n_columns, d, n_tokens, columns_per_split, softcap, stride_y_row, stride_head_row,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TARGETS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    in_rows = row < n_rows
    first_column = split * columns_per_split
    last_column = tl.minimum(first_column + columns_per_split, n_columns)
    maximum = tl.full((BLOCK_ROWS,), -1.0e38, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    z_target = tl.zeros((BLOCK_ROWS,), tl.float32)
    top1 = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    top2 = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK_ROWS,), tl.int32)
    target = tl.full((BLOCK_ROWS,), -1, tl.int64)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row % n_tokens, mask=in_rows, other=-1)

    for start in range(first_column, last_column, BLOCK_VOCAB):
        column = start + tl.arange(0, BLOCK_VOCAB)  # [BLOCK_VOCAB]
        in_columns = column < last_column
        z = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
        for start_d in range(0, d, BLOCK_D):
            channel = start_d + tl.arange(0, BLOCK_D)  # [BLOCK_D]
            in_d = channel < d
            y_at = y_ptr + row[:, None] * stride_y_row + channel[None, :]
            y = tl.load(y_at, mask=in_rows[:, None] & in_d[None, :], other=0.0)
            head_at = head_ptr + column.to(tl.int64)[None, :] * stride_head_row + channel[:, None]
            head = tl.load(head_at, mask=in_columns[None, :] & in_d[:, None], other=0.0)  # [BLOCK_D, BLOCK_VOCAB]
            if UPCAST:
                y, head = y.to(tl.float32), head.to(tl.float32)
            z = tl.dot(y, head, z, input_precision=PRECISION)
        z = finish_logits(z, bias_ptr, column, in_columns, softcap, HAS_BIAS, HAS_SOFTCAP)
        new_maximum, e, new_total = fold_softmax(z, maximum, total)
        moment = fold_moment(z, e, maximum, total, new_maximum, moment)
        top1, best, top2 = fold_top2(z, column, top1, best, top2)
        maximum, total = new_maximum, new_total
        z_target += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), axis=1)

    out = split.to(tl.int64) * n_rows + row
    field = tl.num_programs(1).to(tl.int64) * n_rows
    tl.store(partial_ptr + out, maximum, mask=in_rows)
    tl.store(partial_ptr + field + out, total, mask=in_rows)
    tl.store(partial_ptr + 2 * field + out, moment, mask=in_rows)
    tl.store(partial_ptr + 3 * field + out, z_target, mask=in_rows)
    tl.store(partial_ptr + 4 * field + out, top1, mask=in_rows)
    tl.store(partial_ptr + 5 * field + out, top2, mask=in_rows)
    tl.store(best_ptr + out, best, mask=in_rows)


@triton.jit
def combine_kernel(
    partial_ptr, best_ptr, targets_ptr, loss_ptr, lse_ptr, entropy_ptr, margin_ptr, top1_ptr,
    n_rows, n_columns, n_splits, n_tokens, ignore_index,
    HAS_TARGETS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    in_rows = row < n_rows
    field = tl.cast(n_rows, tl.int64) * n_splits
    maximum = tl.full((BLOCK_ROWS,), -1.0e38, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    z_target = tl.zeros((BLOCK_ROWS,), tl.float32)
    top1 = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    top2 = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    best = tl.zeros((BLOCK_ROWS,), tl.int32)

    for split in range(0, n_splits):
        at = partial_ptr + row + tl.cast(split, tl.int64) * n_rows
        part_maximum = tl.load(at, mask=in_rows, other=-1.0e38)
        part_total = tl.load(at + field, mask=in_rows, other=0.0)
        part_moment = tl.load(at + 2 * field, mask=in_rows, other=0.0)
        part_top1 = tl.load(at + 4 * field, mask=in_rows, other=float("-inf"))
        part_top2 = tl.load(at + 5 * field, mask=in_rows, other=float("-inf"))
        part_best = tl.load(best_ptr + row + tl.cast(split, tl.int64) * n_rows, mask=in_rows, other=0)
        z_target += tl.load(at + 3 * field, mask=in_rows, other=0.0)

        new_maximum = tl.maximum(maximum, part_maximum)
        shift, part_shift = maximum - new_maximum, part_maximum - new_maximum
        moment = tl.exp(shift) * (moment + total * shift)
        moment += tl.exp(part_shift) * (part_moment + part_total * part_shift)
        total = tl.exp(shift) * total + tl.exp(part_shift) * part_total
        maximum = new_maximum
        top2 = tl.maximum(tl.minimum(top1, part_top1), tl.maximum(top2, part_top2))
        best = tl.where(part_top1 > top1, part_best, best)
        top1 = tl.maximum(top1, part_top1)

    lse = maximum + tl.log(total)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row % n_tokens, mask=in_rows, other=0)
        loss = tl.log(total) + (maximum - z_target)
        loss = tl.where((target >= 0) & (target < n_columns), loss, float("nan"))
        tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss), mask=in_rows)
    tl.store(lse_ptr + row, lse, mask=in_rows)
    tl.store(entropy_ptr + row, tl.log(total) - moment / total, mask=in_rows)
    tl.store(margin_ptr + row, top1 - top2, mask=in_rows)
    tl.store(top1_ptr + row, best.to(tl.int64), mask=in_rows)


def stream_blocks(n_rows: int, d: int, dtype: torch.dtype, precision: str) -> dict[str, int]:
    """Tile, warps and pipeline depth of `stream_kernel`: the largest tile whose registers do not spill."""
    single = dtype == torch.float32
    depth = 32 if single else 64
    if single and precision != "tf32" and not torch.version.hip:
        depth = 16  # products of full precision take their operands from registers
    block_rows = 64 if single or n_rows <= 64 else 128
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_VOCAB": 128 if torch.version.hip and not single else 64,
        "BLOCK_D": max(16, min(depth, triton.next_power_of_2(d))),
        "num_warps": 8,
        "num_stages": 2 if torch.version.hip else 3,
    }


def stream_splits(n_rows: int, n_columns: int, blocks: dict[str, int], device: torch.device) -> int:
    """Parts of the vocabulary swept by different programs: enough programs for every multiprocessor."""
    wanted = triton.cdiv(multiprocessors(device), triton.cdiv(n_rows, blocks["BLOCK_ROWS"]))
    return max(1, min(wanted, triton.cdiv(n_columns, blocks["BLOCK_VOCAB"])))


def _stream_triton(
    y: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor | None, options: LossOptions, results: RowResults,
    n_tokens: int,
) -> None:  # fmt: skip
    (n_rows, d), n_columns = y.shape, head.shape[0]
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    blocks = stream_blocks(n_rows, d, y.dtype, precision)
    splits = stream_splits(n_rows, n_columns, blocks, y.device)
    per_split = triton.cdiv(triton.cdiv(n_columns, splits), blocks["BLOCK_VOCAB"]) * blocks["BLOCK_VOCAB"]
    splits = triton.cdiv(n_columns, per_split)
    partial = torch.empty((6, splits, n_rows), dtype=torch.float32, device=y.device)
    best = torch.empty((splits, n_rows), dtype=torch.int32, device=y.device)
    launch(
        stream_kernel, (triton.cdiv(n_rows, blocks["BLOCK_ROWS"]), splits), y,
        y_ptr=y, head_ptr=head, bias_ptr=bias, targets_ptr=targets, partial_ptr=partial, best_ptr=best,
        n_rows=n_rows, n_columns=n_columns, d=d, n_tokens=n_tokens,
        columns_per_split=per_split, softcap=1.0 if options.softcap is None else options.softcap,
        stride_y_row=y.stride(0), stride_head_row=head.stride(0),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=options.softcap is not None, HAS_TARGETS=targets is not None,
        UPCAST=not y.is_cuda and y.dtype == torch.bfloat16,  # the interpreter multiplies bfloat16 bit patterns
        PRECISION=precision, **blocks,
    )  # fmt: skip
    launch(
        combine_kernel, (triton.cdiv(n_rows, 128),), y,
        partial_ptr=partial, best_ptr=best, targets_ptr=targets, loss_ptr=results.loss, lse_ptr=results.lse,
        entropy_ptr=results.entropy, margin_ptr=results.margin, top1_ptr=results.top1,
        n_rows=n_rows, n_columns=n_columns, n_splits=splits, n_tokens=n_tokens, ignore_index=options.ignore_index,
        HAS_TARGETS=targets is not None, BLOCK_ROWS=128,
    )  # fmt: skip


# The op ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("looped::readout_statistics", mutates_args=())
def _readout_statistics(
    states: list[Tensor], head: Tensor, targets: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    bias: Tensor | None, readout: str, eps: float, ignore_index: int, softcap: float | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if targets is not None:
        check_range(targets, head.shape[0], ignore_index)
    norm_weight, norm_bias, bias = (None if v is None else v.contiguous() for v in (norm_weight, norm_bias, bias))
    head = head if head.stride(-1) == 1 else head.contiguous()
    loops = loops_of(states)
    n_loops, n_tokens = len(loops), len(loops[0])
    n_rows = n_loops * n_tokens
    loss, lse, entropy, margin = (head.new_empty(n_rows, dtype=accumulator(head.dtype)) for _ in range(4))
    results = RowResults(loss, lse, entropy, margin, head.new_empty(n_rows, dtype=torch.int64))
    options = LossOptions(ignore_index, softcap=softcap)
    dtype = product_dtype(head, compute_dtype)
    with torch.autocast(head.device.type, enabled=False):
        y = normed_rows(loops, range(n_loops), norm_weight, norm_bias, readout=readout, eps=eps, dtype=dtype)
        if uses_triton(head) and n_rows:
            _stream_triton(y, head.to(dtype), bias, targets, options, results, n_tokens)
        elif n_rows:
            known = head.new_full((n_tokens,), ignore_index, dtype=torch.int64) if targets is None else targets
            read_out(y, head.to(dtype), known, bias, options, default_chunk_rows(head, compute_dtype), results)
    shape = (n_loops, n_tokens)
    loss = loss.view(shape) if targets is not None else head.new_empty(0, dtype=loss.dtype)
    return loss, lse.view(shape), entropy.view(shape), margin.view(shape), results.top1.view(shape)  # type: ignore


@_readout_statistics.register_fake
def _(states, head, targets, norm_weight, norm_bias, bias, readout, eps, ignore_index, softcap, compute_dtype):
    shape = states[0].shape[:2] if states[0].dim() == 3 else (len(states), states[0].shape[0])
    loss, lse, entropy, margin = (head.new_empty(shape, dtype=accumulator(head.dtype)) for _ in range(4))
    return (
        head.new_empty(0, dtype=loss.dtype) if targets is None else loss,
        lse,
        entropy,
        margin,
        head.new_empty(shape, dtype=torch.int64),
    )


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
) -> ReadoutStatistics:
    """What every loop predicts for every token, without gradients and without the logits ever being in memory.

        z = softcap(norm(h[k, t]) @ head.T + bias);  lse = log sum_j exp(z_j);  loss = lse - z_target
        entropy = lse - sum_j softmax(z)_j z_j (nats);  margin = largest - second largest z;  top1 = argmax z

    On a GPU the logits stay in registers; on the CPU one chunk of them is in memory at a time.

    Args:
        states, head, readout, norm_weight, norm_bias, eps, bias, softcap: as for `looped_cross_entropy`.
        targets: [...] int64 shared by all loops, or None; a token with `ignore_index` has loss 0.

    Returns:
        `loss` (None without targets), `lse`, `entropy`, `margin` [K, ...] float32; `top1` [K, ...] int64, the lowest
        id among equal largest logits. With one word in the vocabulary the margin is inf.

    Raises:
        TypeError, ValueError: as `looped_cross_entropy`.
    """
    head, norm_weight, norm_bias, bias = gathered(head), gathered(norm_weight), gathered(norm_bias), gathered(bias)
    rows, shape = as_rows(states)
    compute_dtype = autocast_dtype(rows[0])
    check_tensors(rows, shape, head, targets)
    check_readout(readout, norm_weight, norm_bias, eps, rows[0])
    check_softcap(softcap)
    check_index(ignore_index)
    check_vector("bias", bias, rows[0], head.shape[0])
    flat = None if targets is None else targets.reshape(-1).long()
    with torch.no_grad():
        loss, *others = _readout_statistics(
            rows, head, flat, norm_weight, norm_bias, bias, readout, eps, ignore_index, softcap, compute_dtype
        )
    n_loops = others[0].shape[0]
    lse, entropy, margin, top1 = (result.view(n_loops, *shape) for result in others)
    return ReadoutStatistics(None if targets is None else loss.view(n_loops, *shape), lse, entropy, margin, top1)
