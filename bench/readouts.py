"""Implementations of the per-loop readout, each in its own best form: norm, logits, cross-entropy, all gradients.

Every one takes the same inputs and leaves gradients in their `.grad`.  An implementation that cannot run here says why.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.accuracy import Errors, relative_error
from bench.implementations import Implementation, freshly_compiled, why_missing, with_fresh_compiler
from bench.shapes import DEVICE, ReadoutShape
from bench.timing import Call, Prepare
from kernels import looped_cross_entropy

EPS = 1e-6


@dataclass
class Inputs:
    """K states [N, d], the head [V, d], the norm's weight [d], the targets [N]."""

    states: list[Tensor]
    head: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def of(cls, shape: ReadoutShape, dtype: torch.dtype) -> "Inputs":
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(DEVICE, dtype)

        return cls(
            [(random(shape.n_tokens, shape.d) * 3).requires_grad_() for _ in range(shape.n_loops)],
            (random(shape.vocabulary, shape.d) * (2 / shape.d**0.5)).requires_grad_(),
            torch.ones(shape.d, device=DEVICE, dtype=dtype, requires_grad=True),
            torch.randint(shape.vocabulary, (shape.n_tokens,), generator=generator).to(DEVICE),
        )

    @property
    def differentiated(self) -> list[Tensor]:
        return [*self.states, self.head, self.weight]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""
        states, head, weight = [s.detach().to(dtype) for s in self.states], self.head, self.weight
        converted = Inputs(states, head.detach().to(dtype), weight.detach().to(dtype), self.targets)
        for tensor in converted.differentiated:
            tensor.requires_grad_()
        return converted

    def normed(self) -> list[Tensor]:
        return [F.rms_norm(state, state.shape[-1:], self.weight, EPS) for state in self.states]

    def forget_gradients(self) -> None:
        for tensor in self.differentiated:
            tensor.grad = None


Loss = Callable[[Inputs], Tensor]


def fused(inputs: Inputs) -> Tensor:
    return looped_cross_entropy(
        inputs.states, inputs.head, inputs.targets, norm_weight=inputs.weight, eps=EPS, weights=None
    ).loss


def plain(inputs: Inputs) -> Tensor:
    losses = [F.cross_entropy(F.linear(y, inputs.head), inputs.targets) for y in inputs.normed()]
    return torch.stack(losses).mean()


def torch_chunked(inputs: Inputs) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    losses = [F.linear_cross_entropy(y, inputs.head, inputs.targets, options=options) for y in inputs.normed()]
    return torch.stack(losses).mean()


def torch_chunked_concatenated(inputs: Inputs) -> Tensor:
    targets = inputs.targets.repeat(len(inputs.states))
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(torch.cat(inputs.normed()), inputs.head, targets, options=options)


def cut_cross_entropy(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "torch_compile"} if DEVICE.type == "cpu" else {"filter_eps": None}
    targets = inputs.targets.repeat(len(inputs.states))
    return linear_cross_entropy(torch.cat(inputs.normed()), inputs.head, targets, **options)


def liger(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    losses = [liger_fused_linear_cross_entropy(y, inputs.head, inputs.targets) for y in inputs.normed()]
    return torch.stack(losses).mean()


def liger_concatenated(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    targets = inputs.targets.repeat(len(inputs.states))
    return liger_fused_linear_cross_entropy(torch.cat(inputs.normed()), inputs.head, targets)


LIGER_MISSING = why_missing("liger_kernel", needs_gpu=True)
CUT_CROSS_ENTROPY = Implementation(
    "cut-cross-entropy", lambda: with_fresh_compiler(cut_cross_entropy), why_missing("cut_cross_entropy")
)
IMPLEMENTATIONS = [
    Implementation("fused", lambda: fused),
    Implementation("plain", lambda: plain),
    Implementation("compiled", lambda: freshly_compiled(plain)),
    Implementation("torch-chunked", lambda: torch_chunked, slow_on_cpu=True),
    Implementation("torch-chunked-concatenated", lambda: torch_chunked_concatenated, slow_on_cpu=True),
    CUT_CROSS_ENTROPY,
    Implementation("liger", lambda: liger, LIGER_MISSING),
    Implementation("liger-concatenated", lambda: liger_concatenated, LIGER_MISSING),
]


def run(loss: Loss, inputs: Inputs) -> Tensor:
    """Forward and backward; the gradients are left in `.grad`, where there must be none before."""
    result = loss(inputs)
    result.backward()
    return result.detach()


def make_round(loss: Loss, inputs: Inputs) -> Prepare:
    """Forward and backward, the gradients of the round before forgotten."""

    def prepare() -> Call:
        inputs.forget_gradients()
        return lambda: run(loss, inputs)

    return prepare


def results(loss: Loss, inputs: Inputs) -> dict[str, Tensor | None]:
    """The loss and every gradient, by name; the K states' as one."""
    inputs.forget_gradients()
    value = run(loss, inputs)
    states = [state.grad for state in inputs.states if state.grad is not None]
    found = {
        "loss": value,
        "dstates": torch.stack(states) if len(states) == len(inputs.states) else None,
        "dhead": inputs.head.grad,
        "dweight": inputs.weight.grad,
    }
    inputs.forget_gradients()
    return found


def errors(loss: Loss, inputs: Inputs, truth: dict[str, Tensor | None]) -> Errors:
    """Relative errors of one run against the truth."""
    found = results(loss, inputs)
    return {name: relative_error(found[name], expected) for name, expected in truth.items() if expected is not None}
