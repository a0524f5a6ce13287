"""Operations that work on rows alone, one direction at a time: GB/s of moving every tensor once.

On a GPU each is a CUDA graph, for their kernels are shorter than the host takes to launch them; bench_host.py has that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from bench.measure.accuracy import Errors, relative_errors, truth_dtype
from bench.measure.graphs import Replay
from bench.measure.implementation import Implementation
from bench.measure.measurement import Work
from bench.measure.roofs import copy_roof
from bench.measure.timing import Call, Prepare
from bench.shapes import DEVICE, Case, RowsShape

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Operands:
    """What an operation is called with, and the gradients of its results."""

    inputs: list[Tensor]
    gradients: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Operands":
        """The same numbers in a wider dtype."""

        def widened(x: Tensor) -> Tensor:
            return x.detach().to(torch.promote_types(x.dtype, dtype)).requires_grad_(x.requires_grad)

        return Operands([widened(x) for x in self.inputs], [widened(x) for x in self.gradients])


def make_round(function: Callable[..., Any], operands: Operands, direction: Direction) -> Prepare:
    """The forward pass, of which autograd records nothing, or the backward pass alone."""
    on_gpu = DEVICE.type == "cuda"

    def forward() -> Any:
        with torch.set_grad_enabled(not any(x.requires_grad for x in operands.inputs)):
            return function(*operands.inputs)

    def backward() -> Call:
        with torch._functorch.config.patch(donated_buffer=not on_gpu):  # which torch.compile's backward may use up
            results = function(*operands.inputs)
        return lambda: torch.autograd.grad(results, operands.inputs, operands.gradients, retain_graph=on_gpu)

    prepare = backward if direction == "backward" else lambda: forward
    return cache(lambda: Replay(prepare)) if on_gpu else prepare


def of_rows(
    implementations: Mapping[str, Implementation], name: str, operands: Operands, direction: Direction, *,
    case: Case[RowsShape], names: tuple[str, ...], n_bytes: int, wide: torch.dtype | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a `Measurement`, but for its subject.

    names: of the results, or of the gradients of the inputs. n_bytes: moved at least. wide: the dtype of the truth,
    which is plain PyTorch's; None for that of `truth_dtype`.
    """

    def round_of(implementation: str, given: Operands = operands) -> Prepare:
        return make_round(implementations[implementation].fresh(), given, direction)

    @cache
    def truth() -> Any:
        return round_of("plain", operands.to(wide or truth_dtype(case.dtype)))()()

    def errors(found: Any) -> Errors:
        return relative_errors(names, found, truth())

    return dict(
        case=case,
        implementation=implementations[name],
        prepare=round_of(name),
        reference=round_of("fused"),
        errors=errors,
        plain=lambda: errors(round_of("plain")()()),
        work=Work(n_bytes / 1e9, "GB/s", lambda: copy_roof(n_bytes)),
    )
