"""Implementations of the per-loop readout, each in its own best form: norm, logits, cross-entropy, all gradients.

Every one takes the same inputs and leaves gradients in their `.grad`.  An implementation that cannot run here says why;
a library is imported when its function is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.competitors.norms import EPS, LIGER_MISSING, QUACK_MISSING, liger_norm, quack_norm, torch_norm
from bench.measure.accuracy import Errors, relative_error, truth_dtype
from bench.measure.implementation import Implementation, by_name, fused_plain_compiled, why_missing
from bench.measure.timing import Call, Prepare
from bench.shapes import DEVICE, ReadoutShape
from looped.kernels import looped_cross_entropy

LIGER_CUTE_MISSING = LIGER_MISSING or why_missing("cutlass", needs_gpu=True)
CUT_MISSING = why_missing("cut_cross_entropy")
TORCH_CHUNKED_MISSING = None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none"
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
        *states, head, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in self.differentiated)
        return Inputs(states, head, weight, self.targets)

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


def per_loop(cross_entropy: LinearCrossEntropy, norm: Norm = torch_norm) -> Loss:
    """The mean over loops of one call a loop."""

    def loss(inputs: Inputs) -> Tensor:
        return torch.stack([cross_entropy(y, inputs.head, inputs.targets) for y in inputs.normed(norm)]).mean()

    return loss


def concatenated(inputs: Inputs, norm: Norm = torch_norm) -> tuple[Tensor, Tensor]:
    """The normed rows [K N, d] of all loops, which share the head, and their targets."""
    return torch.cat(inputs.normed(norm)), inputs.targets.repeat(len(inputs.states))


def of_all_loops(cross_entropy: LinearCrossEntropy, norm: Norm = torch_norm) -> Loss:
    """One call for the rows of all loops."""

    def loss(inputs: Inputs) -> Tensor:
        rows, targets = concatenated(inputs, norm)
        return cross_entropy(rows, inputs.head, targets)

    return loss


def of_logits(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, head), targets)


plain = per_loop(of_logits)


# Of others: the mean cross-entropy of rows [N, d] against a head [V, d], the logits never all in memory --------------


def torch_chunked(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(rows, head, targets, options=nn.LinearCrossEntropyOptions())


def cut_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor, **options: object) -> Tensor:
    """`filter_eps=None` keeps gradients below 2.4e-4: more than a uniform probability at V = 20,000."""
    from cut_cross_entropy import linear_cross_entropy

    if DEVICE.type == "cpu":
        options = {"impl": "torch_compile"} | {k: v for k, v in options.items() if k != "filter_eps"}
    return linear_cross_entropy(rows, head, targets, **options)


def liger_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor, accumulator: torch.dtype | None = None) -> Tensor:
    """accumulator: of dW's sum over its chunks; None: the head's dtype."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(rows, head, targets, accum_dtype=accumulator)


def liger_cute_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Liger's kernels for Hopper: bfloat16, logits computed again in the backward pass, dW rounded to bfloat16 between
    waves of 1024 tokens."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    return LigerFusedScaledCrossEntropySM90Function.apply(rows, head, targets).mean()


def quack_cross_entropy(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """quack chooses: on Hopper, for vocabularies of whole tiles, softmax in the products' epilogues."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(rows, head, targets)


cut_unfiltered = partial(cut_cross_entropy, filter_eps=None)
liger_float32 = partial(liger_cross_entropy, accumulator=torch.float32)
IMPLEMENTATIONS = by_name(
    [
        *fused_plain_compiled(fused, plain),
        Implementation("compiled-concatenated", of_all_loops(of_logits), compiles="whole"),
        Implementation("torch-chunked", per_loop(torch_chunked), TORCH_CHUNKED_MISSING),
        Implementation("torch-chunked-concatenated", of_all_loops(torch_chunked), TORCH_CHUNKED_MISSING),
        Implementation("cut-cross-entropy-unfiltered", of_all_loops(cut_unfiltered), CUT_MISSING, compiles="inside"),
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
        single_loop = Inputs([state], wide.head, wide.weight, wide.targets)
        loss = plain(single_loop) / len(wide.states)
        loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses).sum(), **gradients(wide)}


def errors(loss: Tensor, inputs: Inputs) -> Errors:
    """Relative errors of a loss and of the gradients that were left in `.grad`."""
    found, expected = {"loss": loss, **gradients(inputs)}, truth(inputs)
    return {name: relative_error(found[name], value) for name, value in expected.items() if value is not None}
