"""What every block of a forward pass is told beside its input."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from looped.implementation import Implementation

Part = Literal["prelude", "loop", "coda"]
Weights = TypeVar("Weights")
# q, k, v of the rows at hand, each [B, T, H, head_dim] -> what attention makes of them, in the same shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Cache(Protocol):
    """Keys and values of tokens seen before: another way to attend than causally within the rows at hand."""

    def at(self, part: Part, loop: int, layer: int) -> Attend:
        """How layer `layer` of a part attends, and what it keeps. loop counts from 0, and is 0 outside the loops."""
        ...


@dataclass(frozen=True)
class Context:
    """The same for all loops and layers of one forward pass, but for `attend`. Weights do not change in one.

    implementation: what the block computes with.
    rotary: the tables of `rotary_table` for the rows' positions, or None without rotary positions.
    cache: None where every row attends to the rows at hand that are not after it.
    attend: how the layer at hand attends; None without a cache.
    weights: what `shared_weights` has given, by block.
    """

    implementation: Implementation
    rotary: tuple[Tensor, Tensor] | None = None
    cache: Cache | None = None
    attend: Attend | None = None
    weights: dict[nn.Module, Any] = field(default_factory=dict, compare=False)

    def at(self, part: Part, loop: int, layer: int) -> "Context":
        """The context of one layer."""
        return self if self.cache is None else replace(self, attend=self.cache.at(part, loop, layer))

    def shared_weights(self, block: nn.Module, share: Callable[[], Weights | None]) -> Weights | None:
        """What `share` gives for a block, asked once for all loops: its weights for looped/normed_products.py.

        None where operations are to be one by one: without a gradient, in plain PyTorch, and while torch.compile
        traces, which joins them itself.
        """
        if not self.implementation.joins or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if block not in self.weights:
            self.weights[block] = share()
        weights: Weights | None = self.weights[block]
        return weights
