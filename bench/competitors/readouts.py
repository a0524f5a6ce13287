"""Implementations of the per-loop readout, each in its own best form: norm, logits, cross-entropy, all gradients.

Every one takes the same inputs and leaves gradients in their `.grad`.  An implementation that cannot run here says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.competitors.libraries import (
    CUT_MISSING,
    LIGER_CUTE_MISSING,
    LIGER_MISSING,
    QUACK_MISSING,
    TORCH_CHUNKED_MISSING,
    cut_cross_entropy,
    liger_cross_entropy,
    liger_cute_cross_entropy,
    liger_norm,
    quack_cross_entropy,
    quack_norm,
    torch_chunked,
)
from bench.competitors.norms import torch_norm
from bench.measure.accuracy import Errors, relative_error, truth_dtype
from bench.measure.implementation import Implementation, by_name, compiled, fused_plain_compiled
from bench.measure.timing import Call, Prepare
from bench.shapes import DEVICE, ReadoutShape
from looped.kernels import looped_cross_entropy

EPS = 1e-6
Norm = Callable[[Tensor, Tensor, float], Tensor]  # rows [N, d], weight [d], eps
LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [N, d], head [V, d], targets [N]


@dataclass(eq=False)  # one is what it is, however it changes: `truth` is kept by it
class Inputs:
    """K states [N, d], the head [V, d], the norm's weight [d], the targets [N]."""

    states: list[Tensor]
    head: Tensor
    weight: Tensor
    targets: Tensor

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

    def normed(self, norm: Norm = torch_norm) -> list[Tensor]:
        return [norm(state, self.weight, EPS) for state in self.states]


@lru_cache(maxsize=1)
def inputs_of(shape: ReadoutShape, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    return Inputs(
        [(random(shape.n_tokens, shape.d) * 3).requires_grad_() for _ in range(shape.n_loops)],
        (random(shape.vocabulary, shape.d) * (2 / shape.d**0.5)).requires_grad_(),
        torch.ones(shape.d, device=DEVICE, dtype=dtype, requires_grad=True),
        torch.randint(shape.vocabulary, (shape.n_tokens,), generator=generator).to(DEVICE),
    )


Loss = Callable[[Inputs], Tensor]


def fused(inputs: Inputs) -> Tensor:
    return looped_cross_entropy(
        inputs.states, inputs.head, inputs.targets, norm_weight=inputs.weight, eps=EPS, weights=None
    ).loss


def plain(inputs: Inputs) -> Tensor:
    losses = [F.cross_entropy(F.linear(y, inputs.head), inputs.targets) for y in inputs.normed()]
    return torch.stack(losses).mean()


def concatenated(inputs: Inputs, norm: Norm = torch_norm) -> tuple[Tensor, Tensor]:
    """The normed rows [K N, d] of all loops, which share the head, and their targets."""
    return torch.cat(inputs.normed(norm)), inputs.targets.repeat(len(inputs.states))


def plain_concatenated(inputs: Inputs) -> Tensor:
    rows, targets = concatenated(inputs)
    return F.cross_entropy(F.linear(rows, inputs.head), targets)


def per_loop(cross_entropy: LinearCrossEntropy, norm: Norm = torch_norm) -> Loss:
    """The mean over loops of one call a loop, by a library's norm and cross-entropy."""

    def loss(inputs: Inputs) -> Tensor:
        return torch.stack([cross_entropy(y, inputs.head, inputs.targets) for y in inputs.normed(norm)]).mean()

    return loss


def of_all_loops(cross_entropy: LinearCrossEntropy, norm: Norm = torch_norm) -> Loss:
    """One call for the rows of all loops."""

    def loss(inputs: Inputs) -> Tensor:
        rows, targets = concatenated(inputs, norm)
        return cross_entropy(rows, inputs.head, targets)

    return loss


cut_unfiltered = partial(cut_cross_entropy, filter_eps=None)
liger_float32 = partial(liger_cross_entropy, accumulator=torch.float32)
IMPLEMENTATIONS = by_name(
    [
        *fused_plain_compiled(fused, plain),
        compiled("compiled-concatenated", plain_concatenated),
        Implementation("torch-chunked", per_loop(torch_chunked), TORCH_CHUNKED_MISSING),
        Implementation("torch-chunked-concatenated", of_all_loops(torch_chunked), TORCH_CHUNKED_MISSING),
        Implementation("cut-cross-entropy-unfiltered", of_all_loops(cut_unfiltered), CUT_MISSING, compiles=True),
        Implementation("liger", per_loop(liger_cross_entropy, liger_norm), LIGER_MISSING),
        Implementation("liger-concatenated", of_all_loops(liger_cross_entropy, liger_norm), LIGER_MISSING),
        Implementation("liger-concatenated-fp32-dW", of_all_loops(liger_float32, liger_norm), LIGER_MISSING),
        Implementation(
            "liger-cute-concatenated", of_all_loops(liger_cute_cross_entropy, liger_norm), LIGER_CUTE_MISSING
        ),
        Implementation("quack-concatenated", of_all_loops(quack_cross_entropy, quack_norm), QUACK_MISSING),
    ]
)


def make_round(loss: Loss, inputs: Inputs) -> Prepare:
    """Forward and backward, the gradients of the round before forgotten. New ones are left in `.grad`."""

    def run() -> Tensor:
        result = loss(inputs)
        result.backward()
        return result.detach()

    def prepare() -> Call:
        for tensor in inputs.differentiated:
            tensor.grad = None
        return run

    return prepare


def gradients(inputs: Inputs) -> dict[str, Tensor | None]:
    """Every gradient that was left in `.grad`, by name; the K states' as one."""
    states = [state.grad for state in inputs.states if state.grad is not None]
    return {
        "dstates": torch.stack(states) if len(states) == len(inputs.states) else None,
        "dhead": inputs.head.grad,
        "dweight": inputs.weight.grad,
    }


@lru_cache(maxsize=1)
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


def errors(loss: Tensor, inputs: Inputs) -> Errors:
    """Relative errors of a loss and of the gradients that were left in `.grad`."""
    found, expected = {"loss": loss, **gradients(inputs)}, truth(inputs)
    return {name: relative_error(found[name], value) for name, value in expected.items() if value is not None}
