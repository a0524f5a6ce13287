"""Implementations of the per-loop readout, each in its own best form: norm, logits, cross-entropy, all gradients.

Every one takes the same inputs and leaves gradients in their `.grad`.  An implementation that cannot run here says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.shapes import DEVICE, ReadoutShape
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

    targets = inputs.targets.repeat(len(inputs.states))
    return liger_fused_linear_cross_entropy(torch.cat(inputs.normed()), inputs.head, targets)


class Implementation(NamedTuple):
    """`loss(inputs)` is differentiable; `missing` says why it cannot run here, or is None."""

    name: str
    make: Callable[[], Loss]
    missing: str | None = None


def _why_missing(package: str) -> str | None:
    from importlib.util import find_spec

    return None if find_spec(package) else f"{package} is not installed (make bench installs it)"


IMPLEMENTATIONS = [
    Implementation("fused", lambda: fused),
    Implementation("plain", lambda: plain),
    Implementation("compiled", lambda: torch.compile(plain)),
    Implementation("torch-chunked", lambda: torch_chunked),
    Implementation("torch-chunked-concatenated", lambda: torch_chunked_concatenated),
    Implementation("cut-cross-entropy", lambda: cut_cross_entropy, _why_missing("cut_cross_entropy")),
    Implementation(
        "liger-concatenated",
        lambda: liger,
        "needs a GPU" if DEVICE.type == "cpu" else _why_missing("liger_kernel"),
    ),
]


def run(loss: Loss, inputs: Inputs) -> Tensor:
    """Forward and backward; the gradients are left in `.grad`."""
    for tensor in inputs.differentiated:
        tensor.grad = None
    result = loss(inputs)
    result.backward()
    return result.detach()


class Errors(NamedTuple):
    """Relative errors of the loss and of the gradients against plain PyTorch in float32."""

    loss: float
    states: float
    head: float


def errors(loss: Loss, inputs: Inputs) -> Errors:
    """Of one run, the truth being plain PyTorch on the same numbers in float32, loop by loop."""
    wide = inputs.to(torch.float32)
    truth = run(plain, wide)
    value = run(loss, inputs)

    def relative(actual: Tensor | None, expected: Tensor | None) -> float:
        assert actual is not None
        assert expected is not None
        return float((actual.float() - expected).norm() / expected.norm())

    states = max(relative(a.grad, e.grad) for a, e in zip(inputs.states, wide.states, strict=True))
    return Errors(abs(float(value / truth) - 1), states, relative(inputs.head.grad, wide.head.grad))
