"""Whether an implementation computes the right thing: its errors beside those of plain PyTorch in the same dtype."""

import torch
from torch import Tensor

FLOOR = 1e-5  # a relative error that float32 sums of any order may have
Errors = dict[str, float]  # relative error of each output and gradient


def relative_error(actual: Tensor | None, truth: Tensor) -> float:
    """|actual - truth| / |truth| in the 2-norm, float64; infinite where there is no result at all."""
    if actual is None:
        return float("inf")
    actual, truth = actual.detach().double(), truth.detach().double()
    scale = float(torch.linalg.vector_norm(truth))
    return float(torch.linalg.vector_norm(actual - truth)) / (scale or 1.0)


def allowing_for_luck(plain: Errors, dtype: torch.dtype) -> Errors:
    """Plain PyTorch's errors, but for the loss at least an eighth of a rounding of `dtype`.

    The loss is one number: it has no typical error, and plain PyTorch's may be close to the truth by luck.
    """
    return {**plain, "loss": max(plain["loss"], torch.finfo(dtype).eps / 8)}


def is_correct(found: Errors, allowed: Errors) -> bool:
    """No error more than twice that of plain PyTorch in the same dtype, which is `allowed`; nan is wrong."""
    return found.keys() == allowed.keys() and all(found[name] <= 2 * allowed[name] + FLOOR for name in found)
