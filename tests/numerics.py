"""The correctness criterion of the kernels: no worse than plain PyTorch in the same dtype, by a factor."""

import torch
from torch import Tensor

# Layouts of a matrix [..., rows, d] in which an op may be given it.
LAYOUTS = {
    "contiguous": lambda x: x,
    "permuted": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
}
FLOOR = 1e-6  # of the truth's largest magnitude: a few float32 roundings


def assert_no_worse_than(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    dtype: torch.dtype | None = None,
    factor: float = 2.0,
    name: str = "",
) -> None:
    """Root-mean-square error at most `factor` times that of `plain`, largest error at most twice that again.

    A handful of numbers has no typical error, and plain PyTorch's may round to the truth by luck: fewer than 32 are
    allowed two roundings of `dtype`, in which both compute (the result's own dtype unless given).
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.isfinite().all(), f"{name}: not finite"
    if truth.numel() == 0:
        return
    truth = truth.double()
    error, allowed = actual.double() - truth, plain.double() - truth
    relative = FLOOR if truth.numel() >= 32 else max(FLOOR, 2 * torch.finfo(dtype or actual.dtype).eps)
    floor = relative * truth.abs().max() + 1e-7
    mean, mean_allowed = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert mean <= factor * mean_allowed + floor, f"{name}: rms error {mean:.3e}, plain PyTorch {mean_allowed:.3e}"
    largest, largest_allowed = error.abs().max(), allowed.abs().max()
    assert largest <= 2 * factor * largest_allowed + floor, f"{name}: error {largest:.3e}, plain {largest_allowed:.3e}"
