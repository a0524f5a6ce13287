"""A weight that all loops read, and its gradient, summed over the loops where it stands.

    dW = sum over loops k of g_k^T y_k

Autograd would hold the first product, form the next one in a tensor of its own and add it: in the products' dtype,
which under autocast has 8 bits.  Here each loop's backward pass adds its product to one sum, inside the product itself
where the library can (`accumulate_head`).  On CUDA the sum is float32, and rounded once, to the weight's dtype.  Where
no product of bfloat16 gives float32, on a CPU and ROCm, a sum of rounded products stays bfloat16, as autograd's would.

A node of autograd's graph, `_Read`, stands between a weight and all that reads it.  The loops' nodes return None as the
weight's gradient; autograd runs `_Read` when all of them have run, and it returns the sum.

Matrices that multiply the same rows are read as one, (W1; W3), so that one product takes the place of two.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from looped.kernels.device import accumulator, autocast_dtype
from looped.kernels.products import accumulate_head, gives_float32
from looped.kernels.registration import recording
from looped.kernels.row_norm import partial_sums, summed

# A graph may be run backward more than once, in parts, or fail midway: every backward pass has sums of its own.
backward_pass = torch._C._current_graph_task_id


class NormSum:
    """The gradient of a norm's weight [d] so far, as partial sums [programs, d]."""

    def __init__(self, weight: Tensor) -> None:
        self.weights = (weight,)
        self.totals: dict[int, Tensor] = {}

    def read(self) -> Tensor:
        return self.weights[0]

    def partial_sums(self, h: Tensor) -> tuple[Tensor, bool]:
        """For the norm of h [..., d]: where they are, and whether there is something to add to."""
        add = backward_pass() in self.totals
        if not add:
            self.totals[backward_pass()] = partial_sums(h)
        return self.totals[backward_pass()], add

    def taken(self) -> Sequence[Tensor | None]:
        """This backward pass's gradient, or None."""
        total = self.totals.pop(backward_pass(), None)
        return [None if total is None else summed(total, self.weights[0])]


class ProductSum:
    """The gradient of the matrices [V_1, d], [V_2, d], ... of one product so far, [V_1 + V_2 + ..., d]."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.totals: dict[int, Tensor] = {}

    def read(self) -> Tensor:
        """The matrices below each other, in the products' dtype."""
        first, dtype = self.weights[0], autocast_dtype(self.weights[0])
        if len(self.weights) == 1:
            return first.to(dtype)
        rows = [weight.shape[0] for weight in self.weights]
        read = first.new_empty((sum(rows), first.shape[1]), dtype=dtype)
        torch._foreach_copy_(read.split(rows), list(self.weights))
        return read

    def add(self, g: Tensor, y: Tensor) -> None:
        """Add g^T y, for g [rows, V_1 + V_2 + ...] and y [rows, d] of one dtype."""
        total = self.totals.get(backward_pass())
        first = total is None
        if total is None:
            rounded = y.dtype == torch.bfloat16 and not gives_float32(y)
            dtype = y.dtype if rounded else accumulator(y.dtype)
            total = self.totals[backward_pass()] = y.new_empty((g.shape[1], y.shape[1]), dtype=dtype)
        accumulate_head(total, g, y, first)

    def taken(self) -> Sequence[Tensor | None]:
        """This backward pass's gradient of each matrix, or None."""
        total = self.totals.pop(backward_pass(), None)
        if total is None:
            return [None] * len(self.weights)
        total = total.to(self.weights[0].dtype)
        return [total] if len(self.weights) == 1 else total.split(list(map(len, self.weights)))


Sum = TypeVar("Sum", bound=NormSum | ProductSum)


class SharedNorm(NamedTuple):
    """A norm's weight [d], and the sum of its gradient."""

    read: Tensor
    gradient: NormSum


class SharedProduct(NamedTuple):
    """The matrices of one product below each other, in its dtype; and the sum of their gradients."""

    read: Tensor
    gradient: ProductSum


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Sequence[NormSum | ProductSum], *weights: Tensor) -> Any:
        ctx.sums = sums
        ctx.set_materialize_grads(False)
        return tuple([sum.read() for sum in sums])

    @staticmethod
    def backward(ctx: Any, *others: Tensor | None) -> Any:
        return None, *[gradient for sum in ctx.sums for gradient in sum.taken()]


_read_node = recording(_Read)


def _read(sums: Sequence[NormSum | ProductSum]) -> Sequence[Tensor]:
    weights = [weight for sum in sums for weight in sum.weights]
    if all(weight.requires_grad for weight in weights):
        return _read_node(sums, *weights)
    # each by itself, so that no gradient is formed of those of which all are frozen
    return [_read_node([sum], *sum.weights)[0] for sum in sums]


def shared(
    norms: Sequence[Tensor], products: Sequence[Sequence[Tensor]]
) -> tuple[list[SharedNorm], list[SharedProduct]]:
    """Norms' weights, and the matrices of products, as all loops read them in one forward pass."""
    norm_sums, product_sums = list(map(NormSum, norms)), list(map(ProductSum, products))
    read = _read([*norm_sums, *product_sums])
    return list(map(SharedNorm, read, norm_sums)), list(map(SharedProduct, read[len(norms) :], product_sums))


def wanted(gradient: Sum, node: Any) -> Sum | None:
    """A weight's sum, if this backward pass will run the weight's `_Read` node, which is None for a frozen one."""
    return gradient if node is not None and torch._C._will_engine_execute_node(node) else None
