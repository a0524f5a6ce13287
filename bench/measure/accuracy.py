"""Whether an implementation computes the right thing: its errors beside those of plain PyTorch in the same dtype."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOOR = 1e-6  # a relative error that float32 sums of any order may have
Errors = dict[str, float]  # relative error of each output and gradient


def truth_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype plain PyTorch gives the truth for results in `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def relative_error(actual: Tensor | None, truth: Tensor) -> float:
    """|actual - truth| / |truth| in the 2-norm, float64; infinite where there is no result at all."""
    if actual is None:
        return float("inf")
    actual, truth = actual.detach().double(), truth.detach().double()
    scale = float(torch.linalg.vector_norm(truth))
    return float(torch.linalg.vector_norm(actual - truth)) / (scale or 1.0)


def relative_errors(names: Iterable[str], found: Tensor | Sequence[Tensor], truth: Tensor | Sequence[Tensor]) -> Errors:
    """Of several results, or of a single one."""
    pairs = [(found, truth)] if isinstance(truth, Tensor) else zip(found, truth, strict=True)
    return {name: relative_error(*pair) for name, pair in zip(names, pairs, strict=True)}


def limits(plain: Errors) -> Errors:
    """What is allowed: twice the errors of plain PyTorch in the same dtype, and a floor."""
    return {name: 2 * error + FLOOR for name, error in plain.items()}


def limits_with_mean_loss(plain: Errors, dtype: torch.dtype) -> Errors:
    """`limits` where `loss` is one number for all tokens.

    Plain PyTorch may be close to the truth in it or far from it by luck, so that twice its error would condemn and
    acquit by luck.  Its limit is fixed: the error that rounding the true loss to `dtype` may have, or plain PyTorch's
    own where that is larger.
    """
    return limits(plain) | {"loss": max(plain["loss"], torch.finfo(dtype).eps / 2) + FLOOR}


def limits_of_float32_loss(allowed: Errors, dtype: torch.dtype) -> Errors:
    """`allowed` for those who give the mean loss in float32, as ours do: half of what rounding it may cost."""
    return allowed | {"loss": torch.finfo(dtype).eps / 4 + FLOOR}


def is_correct(found: Errors, allowed: Errors) -> bool:
    """No error above its limit; nan is wrong, and so is a result that is missing."""
    return found.keys() == allowed.keys() and all(found[name] <= allowed[name] for name in found)


def closest_to_limit(found: Errors, allowed: Errors) -> str:
    """The name of the error that breaks the rule by most, or comes closest to breaking it."""
    return max(found, key=lambda name: found[name] / allowed[name] if found[name] == found[name] else float("inf"))
