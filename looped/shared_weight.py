"""A weight that all loops read, and its gradient, summed over the loops where it stands.

    dW = sum over loops k of g_k^T y_k

Autograd would hold the first product, form the next one in a tensor of its own and add it: in the products' dtype,
which under autocast has 8 bits.  Here each loop's backward pass adds its product to one float32 sum, inside the product
itself where the library can (`accumulate_head`), and it is rounded once, to the weight's dtype.  For autograd a weight
is read once: one node stands between it and all loops, which give that node no gradient, only its turn.  It runs after
them and hands on the sum.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from looped.kernels.device import accumulator, autocast_dtype
from looped.kernels.products import accumulate_head
from looped.kernels.row_norm import partial_sums, summed


class GradientSum:
    """The gradient of a weight, so far.

    total: None before the first loop has added to it; then float32 like a matrix [V, d], or partial sums
    [programs, d] of a norm's weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.total: Tensor | None = None

    def add_product(self, g: Tensor, y: Tensor) -> None:
        """Add g^T y, for a weight [V, d], g [rows, V] and y [rows, d] of one dtype."""
        first = self.total is None
        if self.total is None:
            self.total = torch.empty_like(self.weight, dtype=accumulator(self.weight.dtype))
        accumulate_head(self.total, g, y, first)

    def partial_sums(self, h: Tensor) -> tuple[Tensor, bool]:
        """Of the norm of h [..., d]: where they are, and whether there is something to add to."""
        add = self.total is not None
        if self.total is None:
            self.total = partial_sums(h)
        return self.total, add

    def taken(self) -> Tensor | None:
        """The sum in the weight's dtype, or None; a next backward pass starts anew."""
        total, self.total = self.total, None
        if total is None:
            return None
        return summed(total, self.weight) if self.weight.dim() == 1 else total.to(self.weight.dtype)


class SharedWeight(NamedTuple):
    """read: the weight as products take it. gradient: the sum of what the loops' products give."""

    read: Tensor
    gradient: GradientSum


def _as_read(weight: Tensor) -> Tensor:
    """A matrix in the dtype of its products; a norm's weight as it is."""
    return weight.to(autocast_dtype(weight)) if weight.dim() > 1 else weight


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[GradientSum], *weights: Tensor) -> Any:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(map(_as_read, weights))

    @staticmethod
    def backward(ctx: Any, *others: Tensor | None) -> Any:
        return None, *[gradient.taken() for gradient in ctx.gradients]


def shared(weights: list[Tensor]) -> list[SharedWeight]:
    """The weights as all loops read them: matrices in the dtype in which their products are formed now."""
    gradients = list(map(GradientSum, weights))
    if all(weight.requires_grad for weight in weights):
        read = _Read.apply(gradients, *weights)
    else:  # a frozen weight has no gradient to sum up
        read = [_Read.apply([g], g.weight)[0] if g.weight.requires_grad else _as_read(g.weight) for g in gradients]
    return list(map(SharedWeight, read, gradients))
