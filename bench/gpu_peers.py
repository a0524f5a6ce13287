"""The readouts of other libraries, and ours, on GPUs that are not there: what their installed Python would launch.

Every implementation does the same job on the same inputs, K states [N, d] in bfloat16: RMSNorm, logits, the mean over
loops of the mean cross-entropy, and the gradients of states, head and norm weight.  Each runs its own code on fake CUDA
tensors (bench/fake_gpu.py): launches, FLOPs, memory and the tensors' bytes are counted, no kernel of it is run.
cut-cross-entropy keeps all gradients (`filter_eps=None`).  Where a library reads values of tensors, the host waits:
that is counted too, but no time is charged for it.  With an upstream gradient other than 1 Liger scales its gradients
in a pass of its own, which it skips otherwise; ours are always scaled.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.fake_gpu import TARGETS, fake_gpu
from bench.gpu_record import Record
from bench.shapes import ReadoutShape
from looped.kernels import looped_cross_entropy

EPS = 1e-6


@dataclass
class Inputs:
    """K states [N, d], the head [V, d], the norm's weight [d], targets [N] and weights [K, N] of their losses."""

    states: list[Tensor]
    head: Tensor
    norm_weight: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def random(cls, shape: ReadoutShape, dtype: torch.dtype = torch.bfloat16) -> "Inputs":
        on_gpu: dict[str, Any] = {"device": "cuda", "requires_grad": True}
        return cls(
            [torch.randn(shape.n_tokens, shape.d, dtype=dtype, **on_gpu) for _ in range(shape.n_loops)],
            torch.randn(shape.vocabulary, shape.d, dtype=dtype, **on_gpu),
            torch.ones(shape.d, dtype=dtype, **on_gpu),
            torch.randint(shape.vocabulary, (shape.n_tokens,), device="cuda"),
            torch.ones(shape.n_loops, shape.n_tokens, **on_gpu),
        )

    @property
    def all_targets(self) -> Tensor:
        return self.targets.repeat(len(self.states))


Loss = Callable[[Inputs], Tensor]


def fused(inputs: Inputs, **options: Any) -> Tensor:
    return looped_cross_entropy(
        inputs.states, inputs.head, inputs.targets, norm_weight=inputs.norm_weight, eps=EPS, **options
    ).loss


def fused_penalty(inputs: Inputs) -> Tensor:
    return fused(inputs, penalty=0.01)


def fused_weights(inputs: Inputs) -> Tensor:
    return fused(inputs, weights=inputs.weights)


def _norm(inputs: Inputs, states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:], inputs.norm_weight, EPS)


def plain(inputs: Inputs) -> Tensor:
    logits = [F.linear(_norm(inputs, state), inputs.head) for state in inputs.states]
    return torch.stack([F.cross_entropy(z, inputs.targets) for z in logits]).mean()


def torch_chunked(inputs: Inputs) -> Tensor:
    options, targets = nn.LinearCrossEntropyOptions(), inputs.targets
    rows = [_norm(inputs, state) for state in inputs.states]
    return torch.stack([F.linear_cross_entropy(y, inputs.head, targets, options=options) for y in rows]).mean()


def torch_chunked_concatenated(inputs: Inputs) -> Tensor:
    rows, options = _norm(inputs, torch.cat(inputs.states)), nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(rows, inputs.head, inputs.all_targets, options=options)


def cut_cross_entropy(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    rows = _norm(inputs, torch.cat(inputs.states))
    return linear_cross_entropy(rows, inputs.head, inputs.all_targets, filter_eps=None, impl="cce")


def _liger(inputs: Inputs, states: Tensor, targets: Tensor, **options: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_rms_norm

    rows = liger_rms_norm(states, inputs.norm_weight, EPS)
    return liger_fused_linear_cross_entropy(rows, inputs.head, targets, **options)


def liger(inputs: Inputs, **options: Any) -> Tensor:
    return torch.stack([_liger(inputs, state, inputs.targets, **options) for state in inputs.states]).mean()


def liger_float32(inputs: Inputs) -> Tensor:
    return liger(inputs, accum_dtype=torch.float32)


def liger_concatenated(inputs: Inputs, **options: Any) -> Tensor:
    return _liger(inputs, torch.cat(inputs.states), inputs.all_targets, **options)


def liger_concatenated_float32(inputs: Inputs) -> Tensor:
    return liger_concatenated(inputs, accum_dtype=torch.float32)


def liger_scaled(inputs: Inputs) -> Tensor:
    """An upstream gradient that is not 1, as a loss scale or gradient accumulation gives it."""
    return 0.5 * liger_concatenated(inputs)


def liger_weights(inputs: Inputs) -> Tensor:
    losses = liger_concatenated(inputs, reduction="none")
    return (losses * inputs.weights.flatten()).sum() / len(inputs.targets)


class Implementation(NamedTuple):
    """`package`: the one to install. `weighted`: differentiable weights of every loop and token are part of its job.

    rounded_calls: in how many calls it sums dW in bfloat16, rounding after every chunk of rows; 0: dW is summed in
    float32, or it does not say.
    """

    name: str
    loss: Loss
    package: str = "torch"
    weighted: bool = False
    rounded_calls: int = 0

    @property
    def ours(self) -> bool:
        return self.package == "kernels"

    @property
    def missing(self) -> str | None:
        """Why it cannot run, or None."""
        try:
            return None if self.ours else version(self.package) and None
        except PackageNotFoundError:
            return f"{self.package} is not installed"


IMPLEMENTATIONS = (
    Implementation("looped_cross_entropy", fused, "kernels"),
    Implementation("looped_cross_entropy, with the norm penalty", fused_penalty, "kernels"),
    Implementation("looped_cross_entropy, with weights [K, N]", fused_weights, "kernels", weighted=True),
    Implementation("Liger, K calls, bfloat16 dW", liger, "liger-kernel", rounded_calls=4),
    Implementation("Liger, K calls, float32 dW", liger_float32, "liger-kernel"),
    Implementation("Liger, states concatenated, bfloat16 dW", liger_concatenated, "liger-kernel", rounded_calls=1),
    Implementation(
        "Liger, states concatenated, bfloat16 dW, upstream gradient not 1",
        liger_scaled,
        "liger-kernel",
        rounded_calls=1,
    ),
    Implementation("Liger, states concatenated, float32 dW", liger_concatenated_float32, "liger-kernel"),
    Implementation(
        "Liger, states concatenated, bfloat16 dW, with weights [K, N]",
        liger_weights,
        "liger-kernel",
        weighted=True,
        rounded_calls=1,
    ),
    Implementation("cut-cross-entropy, states concatenated", cut_cross_entropy, "cut-cross-entropy"),
    Implementation("F.linear_cross_entropy, chunked, K calls", torch_chunked),
    Implementation("F.linear_cross_entropy, chunked, states concatenated", torch_chunked_concatenated),
    Implementation("plain PyTorch", plain),
)


def _answers(shape: ReadoutShape, loss: Loss) -> dict[Any, Callable[..., Any]]:
    """What the libraries ask of values: how many targets count (all), and whether the upstream gradient is 1."""
    aten = torch.ops.aten
    return {
        aten._local_scalar_dense.default: lambda _: shape.n_tokens,
        aten.equal.default: lambda *_: loss not in (liger, liger_float32, liger_scaled),  # there it is 1 / K or 1 / 2
        aten.nonzero.default: lambda x: torch.empty(x.numel(), x.dim(), dtype=torch.int64, device="cuda"),
    }


class ReadoutRecord(NamedTuple):
    """temporary_bytes: the most memory in use beyond inputs and the gradients that remain."""

    record: Record
    temporary_bytes: int


def readout_record(implementation: Implementation, shape: ReadoutShape, target: str) -> ReadoutRecord:
    """Forward and backward of an implementation on the target."""
    with fake_gpu(TARGETS[target], _answers(shape, implementation.loss)) as record:
        inputs = Inputs.random(shape)
        record.clear()
        implementation.loss(inputs).backward()
        return ReadoutRecord(record, record.peak_bytes - record.live_bytes)


# What it costs to sum dW in bfloat16 ----------------------------------------------------------------------------------


def _rounded_sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum, rounded to bfloat16 after every addition."""
    total = torch.zeros(())
    for part in parts:
        total = (total + part).to(torch.bfloat16).to(part.dtype)
    return total


def _dhead_of_calls(g: Tensor, y: Tensor, n_calls: int, n_chunks: int) -> Tensor:
    """g^T y, rounded after every chunk of rows of a call, and the sum over the calls after every call."""
    chunks = zip(g.tensor_split(n_calls * n_chunks), y.tensor_split(n_calls * n_chunks), strict=True)
    products = [g_chunk.t() @ y_chunk for g_chunk, y_chunk in chunks]
    return _rounded_sum(_rounded_sum(products[call * n_chunks :][:n_chunks]) for call in range(n_calls))


@cache
def dhead_error(n_calls: int, n_chunks: int, *, n_loops: int = 4, n_tokens: int = 8192) -> float:
    """The error of a dW that is summed in bfloat16 in so many calls of so many chunks, over that of plain PyTorch's,
    which rounds the dW of every loop and their sum.

    Measured on a random readout with d = 64 and V = 512, in float64 but for those roundings: 2-norms, relative to the
    dW that is not rounded.  The sizes of dW do not matter to it.
    """
    generator, d, n_columns = torch.Generator().manual_seed(0), 64, 512

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).double()

    y, head = random(n_loops * n_tokens, d), random(n_columns, d) / math.sqrt(d)
    targets = torch.randint(n_columns, (n_tokens,), generator=generator).repeat(n_loops)
    g = (y @ head.t()).softmax(-1) - F.one_hot(targets, n_columns)
    g = g.to(torch.bfloat16).double()
    exact = g.t() @ y
    found, plain = (_dhead_of_calls(g, y, *calls) - exact for calls in ((n_calls, n_chunks), (n_loops, 1)))
    return float(found.norm() / plain.norm())
