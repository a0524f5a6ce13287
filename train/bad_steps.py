"""Steps that are not taken because the loss or the gradient is not finite: how many, and where the first began."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from looped.model import LoopedLM, LoopedOutput
from looped.recurrence import first_with_gradient
from looped.supervision import Gated, Supervision
from train.step import autocast

NOWHERE = "at a place that did not show again: the step, repeated, was finite"


class BadSteps:
    """Counts bad steps on the device. The host sees the count a step or two late, and never waits for it.

    total: 0-dim int64 on the device, all so far. limit: how many in a row end the run.
    """

    def __init__(self, limit: int, device: torch.device, total: int = 0) -> None:
        self.limit = limit
        self.total = torch.full((), total, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        seen = torch.zeros((), dtype=torch.int64)
        self._seen = seen.pin_memory() if device.type == "cuda" else seen

    def add(self, bad: Tensor) -> None:
        """Count a step. Once the limit is reached, every later step counts as one of the row."""
        self.total += bad
        self._in_a_row.add_(1).mul_(bad | (self._in_a_row > self.limit))
        self._seen.copy_(self._in_a_row, non_blocking=True)

    def too_many(self) -> bool:
        """Whether the limit is reached, as far as the host knows."""
        return int(self._seen) >= self.limit

    def in_a_row(self) -> int:
        """Bad steps up to the last one taken. Waits for the device."""
        return int(self._in_a_row)


def locate(
    model: LoopedLM,
    inputs: Tensor,
    targets: Tensor,
    *,
    supervision: Supervision | Gated,
    penalty: float,
    dtype: torch.dtype,
    n_loops: int | None = None,
    backprop_loops: int | None = None,
    grad_accumulation: int,
) -> str:
    """Where the first number that is not finite appears when a bad step is repeated, its update left out.

    Waits for the device. Dropout draws other numbers than it did.
    """
    for name, weight in model.named_parameters():
        if not _is_finite(weight):
            return f"in the weight {name}"
    model.zero_grad(set_to_none=True)
    for part_inputs, part_targets in zip(
        inputs.chunk(grad_accumulation), targets.chunk(grad_accumulation), strict=True
    ):
        with autocast(inputs.device, dtype):
            outputs, result = _watched(
                model, part_inputs, part_targets,
                supervision=supervision, penalty=penalty, n_loops=n_loops, backprop_loops=backprop_loops,
            )  # fmt: skip
        for place, tensor in outputs:
            if not _is_finite(tensor):
                return f"in the forward pass at {place}"
        assert result.loss is not None
        assert result.per_loop is not None
        last = len(result.states) - 1
        first = last if supervision == "terminal" else first_with_gradient(last + 1, backprop_loops)
        for loop in range(first, last + 1):
            if not _is_finite(result.per_loop[loop]):
                return f"in the readout of loop {loop + 1}"
        if result.log_exits is not None and not _is_finite(result.log_exits):
            return "in the exit gate"
        if not _is_finite(result.loss):
            return "in the norm penalty"
        began = _first_of_backward(result.loss, outputs)
        if began is not None:
            return f"in the backward pass at {began}"
        for name, weight in model.named_parameters():
            if weight.grad is not None and not _is_finite(weight.grad):
                return f"in the gradient of {name}"
    if not _is_finite(get_total_norm([w.grad for w in model.parameters() if w.grad is not None])):
        return "in the norm of the gradient, whose elements are finite"
    return NOWHERE


def _watched(
    model: LoopedLM, inputs: Tensor, targets: Tensor, **options: Any
) -> tuple[list[tuple[str, Tensor]], LoopedOutput]:
    """What the blocks give in a forward pass, in order and with loop and layer, both from 1; and the model's output."""
    outputs: list[tuple[str, Tensor]] = []
    blocks = list(model.blocks)
    n_calls = 0

    def note(block: nn.Module, given: Any, output: tuple[Tensor, Tensor | None]) -> None:
        nonlocal n_calls
        loop, layer = divmod(n_calls, len(blocks))
        outputs.extend((f"loop {loop + 1}, layer {layer + 1}", x) for x in output if x is not None)
        n_calls += 1

    def noting(place: str) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor | None]], None]:
        return lambda block, given, output: outputs.extend((place, x) for x in output if x is not None)

    hooks = [block.register_forward_hook(note) for block in blocks]
    for part, outside in (("the prelude", model.prelude), ("the coda", model.coda)):
        for layer, block in enumerate(outside, start=1):
            hooks.append(block.register_forward_hook(noting(f"{part}, layer {layer}")))
    try:
        result = model.forward(inputs, targets, **options)  # not model(...), which may be compiled and call no hooks
    finally:
        for hook in hooks:
            hook.remove()
    outputs += [(f"the end of loop {loop}", state) for loop, state in enumerate(result.states, start=1)]
    return outputs, result


def _first_of_backward(loss: Tensor, outputs: list[tuple[str, Tensor]]) -> str | None:
    """The first of the outputs, on the way back, whose gradient is not finite."""
    found: list[str] = []

    def note(place: str) -> Callable[[Tensor], None]:
        return lambda gradient: None if _is_finite(gradient) else found.append(place)

    for place, tensor in outputs:
        if tensor.requires_grad:
            tensor.register_hook(note(place))
    loss.backward()
    return found[0] if found else None


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
