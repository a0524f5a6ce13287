"""Implementations of the per-loop readout, each in its own best form: norm, logits, cross-entropy, all gradients.

Every one takes the same inputs and leaves gradients in their `.grad`.  An implementation that cannot run here says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from looped.kernels import looped_cross_entropy
from torch import Tensor, nn

from bench.measure.accuracy import Errors, relative_error, truth_dtype
from bench.measure.implementation import Implementation, by_name, compiled, why_missing, with_fresh_compiler
from bench.shapes import DEVICE, ReadoutShape

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


def concatenated(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The normed rows [K N, d] of all loops, which share the head, and their targets."""
    return torch.cat(inputs.normed()), inputs.targets.repeat(len(inputs.states))


def plain_concatenated(inputs: Inputs) -> Tensor:
    rows, targets = concatenated(inputs)
    return F.cross_entropy(F.linear(rows, inputs.head), targets)


def torch_chunked(inputs: Inputs) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    losses = [F.linear_cross_entropy(y, inputs.head, inputs.targets, options=options) for y in inputs.normed()]
    return torch.stack(losses).mean()


def torch_chunked_concatenated(inputs: Inputs) -> Tensor:
    rows, targets = concatenated(inputs)
    return F.linear_cross_entropy(rows, inputs.head, targets, options=nn.LinearCrossEntropyOptions())


def cut_cross_entropy(inputs: Inputs) -> Tensor:
    """Without its filter, which drops gradients below 2.4e-4: more than a uniform probability at V = 20,000."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "torch_compile"} if DEVICE.type == "cpu" else {"filter_eps": None}
    rows, targets = concatenated(inputs)
    return linear_cross_entropy(rows, inputs.head, targets, **options)


def liger_normed(inputs: Inputs) -> list[Tensor]:
    from liger_kernel.transformers.functional import liger_rms_norm

    return [liger_rms_norm(state, inputs.weight, EPS, in_place=False) for state in inputs.states]


def liger(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    losses = [liger_fused_linear_cross_entropy(y, inputs.head, inputs.targets) for y in liger_normed(inputs)]
    return torch.stack(losses).mean()


def liger_concatenated(inputs: Inputs, accumulator: torch.dtype | None = None) -> Tensor:
    """accumulator: of dW's sum over its chunks; None: the head's dtype."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows, targets = torch.cat(liger_normed(inputs)), inputs.targets.repeat(len(inputs.states))
    return liger_fused_linear_cross_entropy(rows, inputs.head, targets, accum_dtype=accumulator)


TORCH_MISSING = None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none"
LIGER_MISSING = why_missing("liger_kernel", needs_gpu=True)
CUT_MISSING = why_missing("cut_cross_entropy")
IMPLEMENTATIONS = by_name(
    [
        Implementation("fused", lambda: fused),
        Implementation("plain", lambda: plain),
        compiled("compiled", plain),
        compiled("compiled-concatenated", plain_concatenated),
        Implementation("torch-chunked", lambda: torch_chunked, TORCH_MISSING),
        Implementation("torch-chunked-concatenated", lambda: torch_chunked_concatenated, TORCH_MISSING),
        Implementation(
            "cut-cross-entropy-unfiltered", lambda: with_fresh_compiler(cut_cross_entropy), CUT_MISSING, compiles=True
        ),
        Implementation("liger", lambda: liger, LIGER_MISSING),
        Implementation("liger-concatenated", lambda: liger_concatenated, LIGER_MISSING),
        Implementation(
            "liger-concatenated-fp32-dW", lambda: partial(liger_concatenated, accumulator=torch.float32), LIGER_MISSING
        ),
    ]
)


def run(loss: Loss, inputs: Inputs) -> Tensor:
    """Forward and backward; the gradients are left in `.grad`, where there must be none before."""
    result = loss(inputs)
    result.backward()
    return result.detach()


def make_round(loss: Loss, inputs: Inputs) -> Callable[[], Callable[[], Tensor]]:
    """Forward and backward, the gradients of the round before forgotten."""

    def prepare() -> Callable[[], Tensor]:
        inputs.forget_gradients()
        return lambda: run(loss, inputs)

    return prepare


def gradients(inputs: Inputs) -> dict[str, Tensor | None]:
    """Every gradient that was left in `.grad`, by name; the K states' as one."""
    states = [state.grad for state in inputs.states if state.grad is not None]
    return {
        "dstates": torch.stack(states) if len(states) == len(inputs.states) else None,
        "dhead": inputs.head.grad,
        "dweight": inputs.weight.grad,
    }


def truth(inputs: Inputs) -> dict[str, Tensor | None]:
    """The loss and every gradient, of plain PyTorch in a wider dtype; one loop at a time, to hold one's logits."""
    wide = inputs.to(truth_dtype(inputs.head.dtype))
    losses = []
    for state in wide.states:
        one = Inputs([state], wide.head, wide.weight, wide.targets)
        loss = plain(one) / len(wide.states)
        loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses).sum(), **gradients(wide)}


def errors(loss: Tensor, inputs: Inputs, expected: dict[str, Tensor | None]) -> Errors:
    """Relative errors of a loss and of the gradients that were left in `.grad`."""
    found = {"loss": loss, **gradients(inputs)}
    return {name: relative_error(found[name], value) for name, value in expected.items() if value is not None}
