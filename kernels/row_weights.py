"""The weights of a readout's row losses, before its chunks, and the sums of the losses, after them.

For weights w[a, t] of A loops and N tokens, and n, by default the number of tokens that are not ignored (at least 1):

    c[a, t]     = w[a, t] [t is not ignored] / n                        for a sum instead of a mean: without / n
    c           = row_weight * unit,   unit = max finite |c|, or where that is 0 the c of w = 1
    total       = sum_{a, t} c[a, t] CE[a, t] + penalty * mean_{k, t} ms[k, t];   c = 0 counts 0, even if CE is inf
    per_loop[a] = sum_t CE[a, t] / n

`row_weight` is of order one in every dtype and waits for the rows' gradients, `unit` for the products of all rows.
Shapes: targets [N] int64; w [A, 1] or [A, N]; CE [A, N]; ms [K, N] of all loops; all floats float32 (on the CPU also
float64).  Each kernel is one program, so that sums need no second launch: it moves 12 to 20 bytes a row of logits,
whose products take thousands of times as long on the whole device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import cpu_blocks, implementation, uses_triton
from .readout_call import ReadoutCall, ReadoutTensors


@dataclass(frozen=True)
class LossScales:
    """The weights and units of a pass.

    row_weight: [A * N], or None where all rows that are not ignored weigh the same.
    factors: [3]: unit, share and dmean_square, each [] below.
    in_range: [] bool, whether all targets are; None on the CPU.
    """

    row_weight: Tensor | None
    factors: Tensor
    in_range: Tensor | None = None

    @property
    def unit(self) -> Tensor:
        """The c of a row whose row_weight is 1."""
        return self.factors[0]

    @property
    def share(self) -> Tensor:
        """1 / n, a token's share in a mean."""
        return self.factors[1]

    @property
    def dmean_square(self) -> Tensor:
        """The gradient of the penalty in a row's mean square."""
        return self.factors[2]


def row_weights(
    tensors: ReadoutTensors, call: ReadoutCall, scales: LossScales, *, n_columns: int, n_penalised: int
) -> LossScales:
    """Fill the scales of targets [N] and weights [A, 1] or [A, N], or of the one weight of all rows.

    scales: with space for the row weights where there are weights.  It is returned with `in_range`.
    n_penalised: rows K * N whose mean squares the penalty is a mean of.
    """
    targets, weights, penalty = tensors.targets, tensors.weights, tensors.penalty
    if uses_triton(targets):
        in_range = targets.new_empty((), dtype=torch.bool)
        implementation("row_weights_triton").row_weights(tensors, call, scales, in_range, n_columns, n_penalised)
        return LossScales(scales.row_weight, scales.factors, in_range)
    valid = targets != call.ignore_index
    n = (valid.sum() if tensors.n_targets is None else tensors.n_targets).to(scales.factors.dtype)
    n = torch.where(n > 0, n, 1.0)
    peak = n.new_full((), call.weight)
    if weights is not None and scales.row_weight is not None:
        weights = torch.where(valid, weights, 0.0)  # [A, N]
        magnitude = weights.abs()
        largest = torch.where(magnitude.isfinite(), magnitude, 0.0).amax() if weights.numel() else 0.0 * n
        peak = torch.where(largest > 0, largest, 1.0)
        scales.row_weight.copy_((weights / peak).flatten())
    scales.unit.copy_(peak / n if call.mean else peak)
    scales.share.copy_(1 / n)
    scales.dmean_square.copy_(n.new_zeros(()) if penalty is None else penalty.to(n.dtype) / max(1, n_penalised))
    return scales


def loss_sums(loss: Tensor, scales: LossScales, mean_square: Tensor | None, total: Tensor, per_loop: Tensor) -> None:
    """Write `total` [] and `per_loop` [A] of loss [A, N]; with the penalty, where the mean_square [K, N] is given."""
    row_weight = scales.row_weight
    if uses_triton(loss):
        implementation("row_weights_triton").loss_sums(loss, row_weight, mean_square, scales.factors, total, per_loop)
        return
    weighted = loss.flatten()
    if row_weight is not None:
        weighted = torch.where(row_weight == 0, 0.0, row_weight * weighted)
    total.copy_(weighted.sum() * scales.unit)
    if mean_square is not None:
        total += scales.dmean_square * mean_square.sum()
    torch.mul(loss.sum(1), scales.share, out=per_loop)


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale [], the product formed in float32 and rounded once; a new contiguous tensor, whatever the scale."""
    out = x.new_empty(x.shape, dtype=dtype)
    if uses_triton(x):
        implementation("row_weights_triton").scaled(x.contiguous(), scale, out)
        return out
    for rows in cpu_blocks(x.shape[0], 2 * x.nbytes // max(1, x.shape[0])):
        torch.mul(x[rows], scale.item(), out=out[rows])  # in float32, whatever the dtype of `out`
    return out


def loop_weights(
    weights: Tensor | Sequence[float] | None, active: Sequence[int], n_loops: int, like: Tensor, wide: torch.dtype
) -> tuple[Tensor | None, float]:
    """w of the active loops, [A, 1] or [A, N], differentiable in a weights tensor; or None and the weight of all."""
    if isinstance(weights, Tensor):
        return weights.to(wide).reshape(n_loops, weights.numel() // n_loops), 1.0
    numbers = [1.0 / n_loops] if weights is None else [float(weights[k]) for k in active]
    if len(set(numbers)) == 1:
        return None, numbers[0]
    # not from the list, whose copy to a GPU the host would wait for
    return torch.stack([torch.full((1,), number, dtype=wide, device=like.device) for number in numbers]), 1.0
