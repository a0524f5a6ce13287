"""A weight that all loops read, and its gradient, summed over the loops where it stands.

    dW = sum over loops k of g_k^T y_k

Autograd would hold the first product, form the next one in a tensor of its own and add it: in the products' dtype,
which under autocast has 8 bits.  Here each loop's backward pass adds its product to one float32 sum, inside the product
itself where the library can (`accumulate_head`), and it is rounded once, to the weight's dtype.  For autograd a weight
is read once: one node stands between it and all loops, which give that node no gradient, only its turn.  It runs after
them and hands on the sum.

Matrices that multiply the same rows are read as one, (W1; W3), so that one product takes the place of two.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looped.kernels.device import accumulator, autocast_dtype
from looped.kernels.products import accumulate_head
from looped.kernels.row_norm import partial_sums, summed

Weights = Sequence[Tensor]  # of one product: a norm's weight [d], or matrices [V_1, d], [V_2, d], ...


class GradientSum:
    """The gradient of the weights of one product, so far.

    total: None before the first loop has added to it; then float32 like the matrices, [V_1 + V_2 + ..., d], or partial
    sums [programs, d] of a norm's weight.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.total: Tensor | None = None

    def add_product(self, g: Tensor, y: Tensor) -> None:
        """Add g^T y, for g [rows, V] and y [rows, d] of one dtype."""
        first = self.total is None
        if self.total is None:
            self.total = y.new_empty((g.shape[1], y.shape[1]), dtype=accumulator(y.dtype))
        accumulate_head(self.total, g, y, first)

    def partial_sums(self, h: Tensor) -> tuple[Tensor, bool]:
        """Of the norm of h [..., d]: where they are, and whether there is something to add to."""
        add = self.total is not None
        if self.total is None:
            self.total = partial_sums(h)
        return self.total, add

    def taken(self) -> Sequence[Tensor | None]:
        """The sum for each of the weights, in its dtype, or None; a next backward pass starts anew."""
        total, self.total = self.total, None
        if total is None:
            return [None] * len(self.weights)
        first = self.weights[0]
        if first.dim() == 1:
            return [summed(total, first)]
        total = total.to(first.dtype)
        return [total] if len(self.weights) == 1 else total.split(list(map(len, self.weights)))


class SharedWeight(NamedTuple):
    """read: the weights as their product takes them. gradient: the sum of what the loops' products give."""

    read: Tensor
    gradient: GradientSum


def _as_read(weights: Weights) -> Tensor:
    """Matrices in the dtype of their product, below each other; a norm's weight as it is."""
    first = weights[0]
    if first.dim() == 1:
        return first
    if len(weights) == 1:
        return first.to(autocast_dtype(first))
    read = first.new_empty((sum(map(len, weights)), first.shape[1]), dtype=autocast_dtype(first))
    for part, weight in zip(read.split(list(map(len, weights))), weights, strict=True):
        part.copy_(weight)
    return read


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[GradientSum], *weights: Tensor) -> Any:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple([_as_read(gradient.weights) for gradient in gradients])

    @staticmethod
    def backward(ctx: Any, *others: Tensor | None) -> Any:
        return None, *[taken for gradient in ctx.gradients for taken in gradient.taken()]


def shared(groups: Sequence[Weights]) -> list[SharedWeight]:
    """The weights of some products as all loops read them, in the dtype in which products are formed now."""
    gradients = list(map(GradientSum, groups))
    weights = [weight for group in groups for weight in group]
    if all(weight.requires_grad for weight in weights):
        read = _Read.apply(gradients, *weights)
    else:  # by themselves, so that those of which all are frozen have no gradient
        read = [_Read.apply([gradient], *gradient.weights)[0] for gradient in gradients]
    return list(map(SharedWeight, read, gradients))
