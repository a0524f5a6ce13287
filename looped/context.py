"""What every block of a forward pass is told beside its input."""

from dataclasses import dataclass

from torch import Tensor

from looped.implementation import Implementation


@dataclass(frozen=True)
class Context:
    """The same for all loops and layers of one forward pass.

    implementation: what the block computes with.
    rotary: the tables of `rotary_table` for the sequence's positions, or None without rotary positions.
    """

    implementation: Implementation
    rotary: tuple[Tensor, Tensor] | None = None
