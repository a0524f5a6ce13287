"""The weights of a readout's row losses, before its chunks, and the sums of the losses, after them: one launch each.

For weights w[a, t] of A loops and N tokens, n of which are not ignored (at least 1):

    c[a, t]     = w[a, t] [t is not ignored] / n                        for a sum instead of a mean: without / n
    c           = omega * reference,   reference = max finite |c|, or where that is 0 the c of w = 1
    total       = sum_{a, t} c[a, t] CE[a, t] + penalty * mean_{k, t} ms[k, t]
    per_loop[a] = sum_t CE[a, t] / n

omega, of order one in every dtype, is what a row's logit gradient is multiplied by; reference waits for the products.
Shapes: targets [N] int64; w [A, 1] or [A, N]; CE [A, N]; ms [K, N] of all loops; all floats float32 (on the CPU also
float64).  Each kernel is one program, so that sums need no second launch: it moves 12 to 20 bytes a row of logits,
whose products take thousands of times as long on the whole device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launch, uses_triton

BLOCK_TOKENS = 2048
NUM_WARPS = 8


class Scales(NamedTuple):
    """The weights and units of a pass.

    omega: [A * N], None without weights; factors: [3]; in_range: [] bool, whether all targets are, None on the CPU.
    """

    omega: Tensor | None
    factors: Tensor
    in_range: Tensor | None

    @property
    def reference(self) -> Tensor:
        """[]: the unit of omega."""
        return self.factors[0]

    @property
    def share(self) -> Tensor:
        """[]: 1 / n, a token's share in a mean."""
        return self.factors[1]

    @property
    def dmean_square(self) -> Tensor:
        """[]: the gradient of the penalty in a row's mean square."""
        return self.factors[2]


# Triton ---------------------------------------------------------------------------------------------------------------


@triton.jit
def load_weights(weights_ptr, loop, token, n_tokens, mask, PER_TOKEN: tl.constexpr):
    """w[loop, token] for a block of tokens; 0 off the mask."""
    if PER_TOKEN:
        return tl.load(weights_ptr + tl.cast(loop, tl.int64) * n_tokens + token, mask=mask, other=0.0)
    return tl.where(mask, tl.load(weights_ptr + loop), 0.0)


@triton.jit
def loss_weights_kernel(
    targets_ptr, weights_ptr, omega_ptr, factors_ptr, in_range_ptr,
    n_loops, n_tokens, n_columns, ignore_index, dmean_square,
    HAS_WEIGHTS: tl.constexpr, PER_TOKEN: tl.constexpr, MEAN: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
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
        if HAS_WEIGHTS:
            for loop in range(n_loops):
                magnitude = tl.abs(load_weights(weights_ptr, loop, token, n_tokens, valid, PER_TOKEN))
                largest = tl.where(magnitude < float("inf"), tl.maximum(largest, magnitude), largest)
    n = tl.maximum(tl.sum(n_valid), 1).to(tl.float32)
    peak = tl.max(largest)
    peak = tl.where(peak > 0, peak, 1.0)

    tl.store(factors_ptr, peak / n if MEAN else peak)
    tl.store(factors_ptr + 1, 1.0 / n)
    tl.store(factors_ptr + 2, dmean_square)
    tl.store(in_range_ptr, tl.sum(n_outside) == 0)
    if HAS_WEIGHTS:
        for start in range(0, n_tokens, BLOCK_TOKENS):
            token = start + tl.arange(0, BLOCK_TOKENS)
            target = tl.load(targets_ptr + token, mask=token < n_tokens, other=ignore_index)
            valid = target != ignore_index
            for loop in range(n_loops):
                weight = load_weights(weights_ptr, loop, token, n_tokens, valid, PER_TOKEN)
                at = omega_ptr + tl.cast(loop, tl.int64) * n_tokens + token
                tl.store(at, weight / peak, mask=token < n_tokens)


@triton.jit
def loss_sums_kernel(
    loss_ptr, omega_ptr, mean_square_ptr, factors_ptr, total_ptr, per_loop_ptr,
    n_loops, n_tokens, n_rows, penalty,
    HAS_WEIGHTS: tl.constexpr, HAS_PENALTY: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    reference, share = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    weighted = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for loop in range(n_loops):
        first = tl.cast(loop, tl.int64) * n_tokens
        loop_sum = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for start in range(0, n_tokens, BLOCK_TOKENS):
            token = start + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
            loss = tl.load(loss_ptr + first + token, mask=token < n_tokens, other=0.0)
            loop_sum += loss
            if HAS_WEIGHTS:
                weighted += loss * tl.load(omega_ptr + first + token, mask=token < n_tokens, other=0.0)
        tl.store(per_loop_ptr + loop, tl.sum(loop_sum) * share)

    total = reference * tl.sum(weighted)
    if HAS_PENALTY:
        squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for start in range(0, n_rows, BLOCK_TOKENS):
            row = start + tl.arange(0, BLOCK_TOKENS)
            squares += tl.load(mean_square_ptr + row, mask=row < n_rows, other=0.0)
        total += penalty * (tl.sum(squares) / tl.maximum(n_rows, 1))
    tl.store(total_ptr, total)


def _loss_weights_triton(
    targets: Tensor, weights: Tensor | None, n_columns: int, ignore_index: int, mean: bool, dmean_square: float
) -> Scales:
    n_loops = 0 if weights is None else weights.shape[0]
    omega = None if weights is None else weights.new_empty(n_loops * targets.shape[0])
    factors = torch.empty(3, dtype=torch.float32, device=targets.device)
    in_range = torch.empty((), dtype=torch.bool, device=targets.device)
    launch(
        loss_weights_kernel, (1,), targets,
        targets_ptr=targets, weights_ptr=None if weights is None else weights.contiguous(), omega_ptr=omega,
        factors_ptr=factors, in_range_ptr=in_range,
        n_loops=n_loops, n_tokens=targets.shape[0], n_columns=n_columns, ignore_index=ignore_index,
        dmean_square=dmean_square,
        HAS_WEIGHTS=weights is not None, PER_TOKEN=weights is not None and weights.shape[1] == targets.shape[0],
        MEAN=mean, BLOCK_TOKENS=BLOCK_TOKENS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return Scales(omega, factors, in_range)


def _loss_sums_triton(
    loss: Tensor, scales: Scales, mean_square: Tensor | None, penalty: float
) -> tuple[Tensor, Tensor]:
    n_loops, n_tokens = loss.shape
    total, per_loop = loss.new_empty(()), loss.new_empty(n_loops)
    launch(
        loss_sums_kernel, (1,), loss,
        loss_ptr=loss, omega_ptr=scales.omega, mean_square_ptr=mean_square, factors_ptr=scales.factors,
        total_ptr=total, per_loop_ptr=per_loop,
        n_loops=n_loops, n_tokens=n_tokens, n_rows=0 if mean_square is None else mean_square.numel(), penalty=penalty,
        HAS_WEIGHTS=scales.omega is not None, HAS_PENALTY=mean_square is not None,
        BLOCK_TOKENS=BLOCK_TOKENS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return total, per_loop


# CPU ------------------------------------------------------------------------------------------------------------------


def _loss_weights_cpu(
    targets: Tensor, weights: Tensor | None, n_columns: int, ignore_index: int, mean: bool, dmean_square: float
) -> Scales:
    wide = torch.float32 if weights is None else weights.dtype
    valid = targets != ignore_index
    n = valid.sum().clamp(min=1).to(wide)
    peak, omega = n.new_ones(()), None
    if weights is not None:
        weights = torch.where(valid, weights, 0.0)  # [A, N]
        magnitude = weights.abs()
        largest = torch.where(magnitude.isfinite(), magnitude, 0.0).amax() if weights.numel() else 0.0 * peak
        peak = torch.where(largest > 0, largest, peak)
        omega = (weights / peak).flatten()
    return Scales(omega, torch.stack([peak / n if mean else peak, 1 / n, n.new_tensor(dmean_square)]), None)


def _loss_sums_cpu(loss: Tensor, scales: Scales, mean_square: Tensor | None, penalty: float) -> tuple[Tensor, Tensor]:
    total = loss.new_zeros(())
    if scales.omega is not None:
        total = (scales.omega * loss.flatten()).sum() * scales.reference
    if mean_square is not None:
        total = total + penalty * (mean_square.sum() / max(1, mean_square.numel()))
    return total, loss.sum(1) * scales.share


# Before and after the chunks ------------------------------------------------------------------------------------------


def loop_weights(
    weights: Tensor | Sequence[float] | None, active: list[int], n_loops: int, head: Tensor, wide: torch.dtype
) -> Tensor:
    """w of the active loops, [A, 1] or [A, N]; differentiable in a weights tensor."""
    if isinstance(weights, Tensor):
        return weights.to(wide).reshape(n_loops, weights.numel() // n_loops)
    numbers = [1.0 / n_loops] * n_loops if weights is None else [float(weights[k]) for k in active]
    if len(set(numbers)) == 1:
        return torch.full((len(active), 1), numbers[0], dtype=wide, device=head.device)
    # not from the list, whose copy to a GPU the host would wait for
    return torch.stack([torch.full((1,), number, dtype=wide, device=head.device) for number in numbers])


def loss_weights(
    targets: Tensor,
    weights: Tensor | None,
    n_columns: int,
    *,
    ignore_index: int,
    mean: bool,
    dmean_square: float,
) -> Scales:
    """The scales of targets [N] and weights [A, 1] or [A, N]; `mean`: the loss is divided by n."""
    run = _loss_weights_triton if uses_triton(targets) else _loss_weights_cpu
    return run(targets, weights, n_columns, ignore_index, mean, dmean_square)


def loss_sums(
    loss: Tensor, scales: Scales, mean_square: Tensor | None = None, penalty: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`total` [] (without weights only the penalty) and `per_loop` [A] of loss [A, N] and mean_square [K, N]."""
    run = _loss_sums_triton if uses_triton(loss) else _loss_sums_cpu
    return run(loss, scales, mean_square, penalty)
