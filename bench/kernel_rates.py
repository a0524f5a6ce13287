"""The kernels that memory limits, each alone: its rate, and how many copies of what it moves take as long.

    python -m bench.kernel_rates     # on a GPU; also a part of `make gpu`

Bytes are the least possible, each tensor read or written once.  A CUDA graph holds many calls in a row, over more
buffers than the L2 cache has room for, so that neither the host nor a launch's own time counts.  The norms are those of
a training step under autocast ("step": bfloat16 beside a float32 residual stream) and of bfloat16 rows with a norm
penalty; backward passes include the sum of the weight's partial gradients.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure.graphs import Replay
from bench.measure.pivot import table
from bench.measure.records import Results
from bench.measure.timing import Call, Instant
from bench.shapes import DEVICE
from looped.kernels.cross_entropy import LossOptions, RowResults, cross_entropy_
from looped.kernels.row_norm import NormBackward, NormForward, norm_backward, norm_forward, partial_sums, summed
from looped.kernels.row_weights import scaled
from looped.kernels.swiglu_triton import swiglu_backward, swiglu_forward

BUFFERS, CALLS, ROUNDS = 3, 12, 7
BF16, FP32 = torch.bfloat16, torch.float32


class Subject(NamedTuple):
    """make: a call on tensors of its own.  n_bytes: that a call moves at least."""

    kernel: str
    case: str
    make: Callable[[], Call]
    n_bytes: int


class Rate(NamedTuple):
    kernel: str
    case: str
    kernel_microseconds: float
    terabytes_per_second: float
    copies: float


def _random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _norm(n_rows: int, d: int, in_step: bool, backward: bool) -> Call:
    stream = FP32 if in_step else BF16
    x, weight = _random(n_rows, d), _random(d, dtype=stream)
    residual = _random(n_rows, d, dtype=FP32) if in_step else None
    square = None if in_step else torch.empty(n_rows, device=DEVICE)
    if not backward:
        total = None if residual is None else torch.empty_like(residual)
        tensors = NormForward(x, residual, weight, y=torch.empty_like(x), total=total, mean_square=square)
        return partial(norm_forward, tensors, 1e-6, "rmsnorm")
    h, dx = _random(n_rows, d, dtype=stream), torch.empty_like(x) if in_step else None
    sums = partial_sums(h)
    of_norm = NormBackward(
        x, h, weight, dmean_square=square, dtotal=residual, dh=torch.empty_like(h), dx=dx, dweight=sums
    )

    def call() -> Tensor:
        norm_backward(of_norm, 1e-6, "rmsnorm")
        return summed(sums, weight)

    return call


def _pass(n_rows: int, vocabulary: int, kind: str) -> Call:
    logits = _random(n_rows, -(-vocabulary // 16) * 16)[:, :vocabulary]
    targets = torch.randint(vocabulary, (n_rows,), device=DEVICE)
    bias = _random(vocabulary, dtype=FP32) if kind == "bias" else None
    options = LossOptions(softcap=30.0 if kind == "softcap" else None, bias=bias)
    results = RowResults(torch.empty(n_rows, device=DEVICE))
    if kind == "statistics":
        space = torch.empty(3, n_rows, device=DEVICE)
        results = RowResults(results.loss, space, torch.empty(n_rows, dtype=torch.int64, device=DEVICE))
    return partial(cross_entropy_, logits, targets, None, options, results, 0, gradient=True)


def _swiglu(n_rows: int, d_ff: int, backward: bool) -> Call:
    """As in the decoder, whose W1 and W3 are one matrix."""
    dy, both, gradients = _random(n_rows, d_ff), _random(n_rows, 2 * d_ff), _random(n_rows, 2 * d_ff)
    if backward:
        return partial(swiglu_backward, (dy, *both.chunk(2, -1), *gradients.chunk(2, -1)), d_ff, 2 * d_ff, 2 * d_ff)
    return partial(swiglu_forward, (*both.chunk(2, -1), dy), d_ff, 2 * d_ff)


def _scaled(n_rows: int, d: int) -> Call:
    return partial(scaled, _random(n_rows, d, dtype=FP32), torch.ones((), device=DEVICE), BF16)


def subjects(shrink: int) -> Iterator[Subject]:
    """Of the shapes, a `shrink`-th of the rows."""
    for n_rows, d, in_step in ((8192, 768, True), (32_768, 768, False), (32_768, 2048, False), (32_768, 4096, False)):
        rows, case = n_rows // shrink, f"{n_rows} x {d}, {'step' if in_step else 'bf16'}"
        of_forward, of_backward = (12, 16) if in_step else (4, 6)
        yield Subject("norm forward", case, partial(_norm, rows, d, in_step, False), rows * d * of_forward)
        yield Subject("norm backward", case, partial(_norm, rows, d, in_step, True), rows * d * of_backward)
    rows = 4096 // shrink
    for vocabulary in (20_000, 128_256):
        for kind in ("plain", "bias", "softcap", "statistics"):
            make = partial(_pass, rows, vocabulary, kind)
            yield Subject(f"pass over logits, {kind}", f"4096 x {vocabulary}", make, 4 * rows * vocabulary)
    rows = 8192 // shrink
    yield Subject("SwiGLU forward", "8192 x 3072", partial(_swiglu, rows, 3072, False), rows * 3072 * 6)
    yield Subject("SwiGLU backward", "8192 x 3072", partial(_swiglu, rows, 3072, True), rows * 3072 * 10)
    rows = 128_256 // shrink
    yield Subject("rounding of dW", "128256 x 2048", partial(_scaled, rows, 2048), rows * 2048 * 6)


def microseconds(make: Callable[[], Call], rounds: int) -> float:
    """Of one call, the median of so many rounds."""

    def prepare() -> Call:
        calls = [make() for _ in range(BUFFERS)]
        return lambda: [calls[i % BUFFERS]() for i in range(CALLS)]

    replay, times = Replay(prepare), []
    for _ in range(rounds):
        start = Instant()
        replay()
        times.append((Instant() - start) / CALLS * 1e6)
    return median(times)


def _copy(n_bytes: int) -> Call:
    source = torch.empty(max(1, n_bytes // 8), device=DEVICE)
    return partial(torch.empty_like(source).copy_, source)


def measured(rounds: int = ROUNDS, shrink: int = 1) -> Iterator[Rate]:
    """Each kernel and, just after it, a copy that reads and writes as many bytes in all."""
    for kernel, case, make, n_bytes in subjects(shrink):
        taken, copy = microseconds(make, rounds), microseconds(partial(_copy, n_bytes), rounds)
        yield Rate(kernel, case, taken, n_bytes / taken / 1e6, taken / copy)


def main() -> None:
    if DEVICE.type != "cuda":
        sys.exit(f"bench.kernel_rates needs a GPU. Got torch {torch.__version__}, for which there is none.")
    print(table(Results(facts=[rate._asdict() for rate in measured()])))


if __name__ == "__main__":
    main()
