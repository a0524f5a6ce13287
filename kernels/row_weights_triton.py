"""The Triton kernels of kernels/row_weights.py, which has their equations and is their only caller."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch
from .readout_call import ReadoutCall, ReadoutTensors
from .row_weights import LossScales

BLOCK_TOKENS = 2048
NUM_WARPS = 8


@triton.jit
def load_weights(weights_ptr, loop, token, n_tokens, mask, PER_TOKEN: tl.constexpr):
    """w[loop, token] for a block of tokens; 0 off the mask."""
    if PER_TOKEN:
        return tl.load(weights_ptr + tl.cast(loop, tl.int64) * n_tokens + token, mask=mask, other=0.0)
    return tl.where(mask, tl.load(weights_ptr + loop), 0.0)


@triton.jit
def row_weights_kernel(
    targets_ptr, weights_ptr, penalty_ptr, n_targets_ptr, row_weight_ptr, factors_ptr, in_range_ptr,
    n_loops, n_tokens, n_columns, ignore_index, weight, n_penalised,
    PER_TOKEN: tl.constexpr, MEAN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    n_valid = tl.zeros((BLOCK_TOKENS,), tl.int32)
    n_outside = tl.zeros((BLOCK_TOKENS,), tl.int32)
    largest = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
        target = tl.load(targets_ptr + token, mask=token < n_tokens, other=ignore_index)
        valid = target != ignore_index
        n_valid += valid.to(tl.int32)
        n_outside += (valid & ((target < 0) | (target >= n_columns))).to(tl.int32)
        if weights_ptr is not None:
            for loop in range(n_loops):
                magnitude = tl.abs(load_weights(weights_ptr, loop, token, n_tokens, valid, PER_TOKEN))
                largest = tl.where(magnitude < float("inf"), tl.maximum(largest, magnitude), largest)
    n = tl.sum(n_valid).to(tl.float32)
    if n_targets_ptr is not None:
        n = tl.load(n_targets_ptr).to(tl.float32)
    n = tl.where(n > 0, n, 1.0)
    peak = tl.cast(weight, tl.float32)
    if weights_ptr is not None:
        peak = tl.max(largest)
        peak = tl.where(peak > 0, peak, 1.0)

    tl.store(factors_ptr, peak / n if MEAN else peak)
    tl.store(factors_ptr + 1, 1.0 / n)
    if penalty_ptr is not None:
        tl.store(factors_ptr + 2, tl.load(penalty_ptr).to(tl.float32) / tl.maximum(n_penalised, 1))
    else:
        tl.store(factors_ptr + 2, 0.0)
    tl.store(in_range_ptr, tl.sum(n_outside) == 0)
    if row_weight_ptr is not None:
        for start in range(0, n_tokens, BLOCK_TOKENS):
            token = start + tl.arange(0, BLOCK_TOKENS)
            target = tl.load(targets_ptr + token, mask=token < n_tokens, other=ignore_index)
            valid = target != ignore_index
            for loop in range(n_loops):
                row_weight = load_weights(weights_ptr, loop, token, n_tokens, valid, PER_TOKEN) / peak
                at = row_weight_ptr + tl.cast(loop, tl.int64) * n_tokens + token
                tl.store(at, row_weight, mask=token < n_tokens)


@triton.jit
def loss_sums_kernel(
    loss_ptr, row_weight_ptr, mean_square_ptr, factors_ptr, total_ptr, per_loop_ptr, n_loops, n_tokens, n_penalised,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    weighted = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for loop in range(n_loops):
        first = tl.cast(loop, tl.int64) * n_tokens
        loop_sum = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for start in range(0, n_tokens, BLOCK_TOKENS):
            token = start + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
            loss = tl.load(loss_ptr + first + token, mask=token < n_tokens, other=0.0)
            loop_sum += loss
            if row_weight_ptr is not None:
                row_weight = tl.load(row_weight_ptr + first + token, mask=token < n_tokens, other=0.0)
                weighted += tl.where(row_weight == 0.0, 0.0, row_weight * loss)
            else:
                weighted += loss
        tl.store(per_loop_ptr + loop, tl.sum(loop_sum) * tl.load(factors_ptr + 1))

    total = tl.load(factors_ptr) * tl.sum(weighted)
    if mean_square_ptr is not None:
        squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for start in range(0, n_penalised, BLOCK_TOKENS):
            row = start + tl.arange(0, BLOCK_TOKENS)
            squares += tl.load(mean_square_ptr + row, mask=row < n_penalised, other=0.0)
        total += tl.load(factors_ptr + 2) * tl.sum(squares)
    tl.store(total_ptr, total)


@triton.jit
def scaled_kernel(x_ptr, scale_ptr, out_ptr, n_elements, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < n_elements, other=0.0) * tl.load(scale_ptr)
    tl.store(out_ptr + element, x.to(out_ptr.dtype.element_ty), mask=element < n_elements)


def row_weights(
    tensors: ReadoutTensors, call: ReadoutCall, scales: LossScales, in_range: Tensor, n_columns: int, n_penalised: int
) -> None:
    targets, weights, n_tokens = tensors.targets, tensors.weights, len(tensors.targets)
    launch(
        row_weights_kernel, (1,),
        (targets, weights, tensors.penalty, tensors.n_targets, scales.row_weight, scales.factors, in_range),
        0 if weights is None else weights.shape[0], n_tokens, n_columns, call.ignore_index, call.weight, n_penalised,
        weights is not None and weights.shape[1] == n_tokens, call.mean, BLOCK_TOKENS, num_warps=NUM_WARPS,
    )  # fmt: skip


def loss_sums(
    loss: Tensor, row_weight: Tensor | None, mean_square: Tensor | None, factors: Tensor, total: Tensor,
    per_loop: Tensor,
) -> None:  # fmt: skip
    n_penalised = 0 if mean_square is None else mean_square.numel()
    launch(
        loss_sums_kernel, (1,),
        (loss, row_weight, mean_square, factors, total, per_loop), *loss.shape, n_penalised, BLOCK_TOKENS,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def scaled(x: Tensor, scale: Tensor, out: Tensor) -> None:
    grid = (cdiv(x.numel(), BLOCK_TOKENS),)
    launch(scaled_kernel, grid, (x, scale, out), x.numel(), BLOCK_TOKENS, num_warps=NUM_WARPS)
