"""Implementations of norm + penalty: residual add, RMSNorm and the mean square of the sum.

Each takes x [N, d], the norm's weight [d] and, where there is one, the residual stream [N, d]. It returns y, the mean
squares [N] and, with a residual, the sum of x and residual.  A library is imported when its function is called.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.implementation import Implementation, by_name, fused_plain_compiled, why_missing
from bench.measure.rows import Operands
from bench.shapes import DEVICE, RowsShape
from looped.kernels import rms_norm_penalty
from looped.kernels.rms_norm import rms_norm_penalty_reference

EPS = 1e-6
LIGER_MISSING = why_missing("liger_kernel", needs_gpu=True)
QUACK_MISSING = why_missing("quack", needs_gpu=True)


def random_operands(shape: RowsShape, dtype: torch.dtype, *, residual: bool) -> Operands:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    rows = (shape.n_rows, shape.d)
    inputs = [random(*rows) * 3, 1 + random(shape.d) / 10, *([random(*rows) * 3] if residual else [])]
    gradients = [random(*rows), random(shape.n_rows).float(), *([random(*rows)] if residual else [])]
    return Operands([x.requires_grad_() for x in inputs], gradients)


def fused(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    result = rms_norm_penalty(x, weight, eps=EPS, residual=residual)
    return [tensor for tensor in result if tensor is not None]


def plain(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    result = rms_norm_penalty_reference(x, weight, eps=EPS, residual=residual)
    return [tensor for tensor in result if tensor is not None]


# Norms of others: y of x [N, d]; with a residual y and the sum of both ------------------------------------------------


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What nn.RMSNorm calls."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def liger_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, eps, in_place=False)


def liger_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)


def quack_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, eps=eps)


def quack_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


def with_mean_square(norm: Callable[..., Tensor], add_norm: Callable[..., tuple[Tensor, Tensor]] | None = None):
    """Norm and penalty by a library's norm, and the mean square in a pass of its own.

    add_norm: the library's norm with the residual added in; None: the sum is a pass of its own too.
    """

    def with_penalty(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> list[Tensor]:
        if residual is None:
            return [norm(x, weight, EPS), x.float().square().mean(-1)]
        if add_norm is None:
            total = x + residual
            y = norm(total, weight, EPS)
        else:
            y, total = add_norm(x, residual, weight, EPS)
        return [y, total.float().square().mean(-1), total]

    return with_penalty


IMPLEMENTATIONS = by_name(
    [
        *fused_plain_compiled(fused, plain),
        Implementation("nn.RMSNorm + penalty", with_mean_square(torch_norm)),
        Implementation("liger + penalty", with_mean_square(liger_norm, liger_add_norm), LIGER_MISSING),
        Implementation("quack + penalty", with_mean_square(quack_norm, quack_add_norm), QUACK_MISSING),
    ]
)
