"""Implementations of norm + penalty: residual add, RMSNorm and the mean square of the sum."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.competitors.libraries import (
    LIGER_MISSING,
    QUACK_MISSING,
    liger_add_norm,
    liger_norm,
    quack_add_norm,
    quack_norm,
)
from bench.measure.implementation import Implementation, by_name, compiled
from bench.shapes import DEVICE, RowsShape
from looped.kernels import rms_norm_penalty
from looped.kernels.device import accumulator
from looped.kernels.rms_norm import rms_norm_penalty_reference

EPS = 1e-6


@dataclass
class NormInputs:
    """x and, where there is one, the residual stream [N, d]; the norm's weight [d]; gradients of every result."""

    x: Tensor
    weight: Tensor
    residual: Tensor | None
    dy: Tensor
    dmean_square: Tensor
    dtotal: Tensor | None

    @classmethod
    def of(cls, shape: RowsShape, dtype: torch.dtype, *, residual: bool) -> "NormInputs":
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(DEVICE, dtype)

        rows = (shape.n_rows, shape.d)
        return cls(
            (random(*rows) * 3).requires_grad_(),
            (1 + random(shape.d) / 10).requires_grad_(),
            (random(*rows) * 3).requires_grad_() if residual else None,
            random(*rows),
            random(shape.n_rows).float(),
            random(*rows) if residual else None,
        )

    def to(self, dtype: torch.dtype) -> "NormInputs":
        """The same numbers in another dtype."""
        x, weight = self.x.detach().to(dtype).requires_grad_(), self.weight.detach().to(dtype).requires_grad_()
        residual = None if self.residual is None else self.residual.detach().to(dtype).requires_grad_()
        dtotal = None if self.dtotal is None else self.dtotal.to(dtype)
        dmean_square = self.dmean_square.to(accumulator(dtype))
        return NormInputs(x, weight, residual, self.dy.to(dtype), dmean_square, dtotal)

    @property
    def differentiated(self) -> list[Tensor]:
        return [self.x, self.weight] + ([] if self.residual is None else [self.residual])

    @property
    def gradients(self) -> list[Tensor]:
        return [self.dy, self.dmean_square] + ([] if self.dtotal is None else [self.dtotal])


def fused(inputs: NormInputs) -> list[Tensor]:
    result = rms_norm_penalty(inputs.x, inputs.weight, eps=EPS, residual=inputs.residual)
    return [tensor for tensor in result if tensor is not None]


def plain(inputs: NormInputs) -> list[Tensor]:
    result = rms_norm_penalty_reference(inputs.x, inputs.weight, eps=EPS, residual=inputs.residual)
    return [tensor for tensor in result if tensor is not None]


def with_mean_square(norm: Callable[..., Tensor], add_norm: Callable[..., tuple[Tensor, Tensor]] | None = None):
    """Norm and penalty by a library's norm, and the mean square in a pass of its own.

    add_norm: the library's norm with the residual added in; None: the sum is a pass of its own too.
    """

    def with_penalty(inputs: NormInputs) -> list[Tensor]:
        if inputs.residual is None:
            return [norm(inputs.x, inputs.weight, EPS), inputs.x.float().square().mean(-1)]
        if add_norm is None:
            total = inputs.x + inputs.residual
            y = norm(total, inputs.weight, EPS)
        else:
            y, total = add_norm(inputs.x, inputs.residual, inputs.weight, EPS)
        return [y, total.float().square().mean(-1), total]

    return with_penalty


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What nn.RMSNorm calls."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


IMPLEMENTATIONS = by_name(
    [
        Implementation("fused", lambda: fused),
        Implementation("plain", lambda: plain),
        compiled("compiled", plain),
        Implementation("nn.RMSNorm + penalty", lambda: with_mean_square(torch_norm)),
        Implementation("liger + penalty", lambda: with_mean_square(liger_norm, liger_add_norm), LIGER_MISSING),
        Implementation("quack + penalty", lambda: with_mean_square(quack_norm, quack_add_norm), QUACK_MISSING),
    ]
)
