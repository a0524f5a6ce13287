"""The host's time for one call, in microseconds: what Python, PyTorch and Triton do before the GPU has its work.

    python -m bench.bench_host                                 # a table
    python -m pytest bench/bench_host.py --benchmark-only      # the same by pytest-benchmark

It needs no GPU; where one is there, it is used.  Three columns: the forward pass without gradients, the forward pass
that records its graph, and the backward pass alone (`torch.autograd.grad`, the graph kept).  A fourth one has a whole
training step of a decoder with the loops and layers of paper-129m and almost no channels, fused and plain, in float32
and under autocast, as training runs; a fifth the median, over rounds in which they take turns, of its share of plain's.

**Included**, with and without a GPU: the public function with its checks, torch.library's dispatch, autograd, the
allocation of results, every launcher, and Triton's own path of a launch with its binder and cache.

**Without a GPU** (bench/offline/host_only.py) tensors live on the CPU and are taken down the path of CUDA tensors.
Left out are Triton's compiled launcher and the CUDA driver's launch, the caching allocator in place of which the CPU's
allocates, the thread in which autograd runs a GPU's backward pass, and waits.  ATen's operations, products among them,
run on the CPU on tensors so small that they take about what their launch would.  `F.rms_norm` is one operation on a
GPU and several on a CPU: there `F.layer_norm`, one on both, stands for it.

Time is the thread's own, so that other programs on the machine are not counted, though they may slow it down.

**With a GPU** all of it is included, by the wall clock.  The shapes are so small that the GPU waits for the host, never
the host for the GPU.

Compare rows of one run only: hosts differ in speed.  One with an H200 took 2.1 to 2.4 times as long as a CPU without
a GPU for a bare launch, `F.rms_norm` forward and `rms_norm_penalty` in its three modes: the proportions are those of a
GPU's host.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bench.measure.markdown import crossed
from bench.offline.host_only import host_only
from looped.config import PRESETS
from looped.kernels import looped_cross_entropy, radial_gradient, readout_statistics, rms_norm_penalty, swiglu
from looped.model import LoopedLM
from train.step import training_step

ON_GPU = torch.cuda.is_available()
PLACE = "cuda" if ON_GPU else "cpu"
ROWS, D, VOCABULARY, LOOPS, CHUNKS = 64, 64, 128, 4, 8
ROUNDS, CALLS, WARM_UPS = 15, 30, 10
CLOCK = time.perf_counter if ON_GPU else time.thread_time  # without a GPU all is in one thread, which never waits
Call = Callable[[], Any]
MODES = ("no gradient", "forward", "backward")
STEP, STEP_CALLS = "training step", 2


class Subject(NamedTuple):
    """A call that gives tensors, its inputs, and whether it has a backward pass; or what makes a training step."""

    call: Callable[..., Any]
    inputs: tuple[Tensor, ...] = ()
    differentiable: bool = True


class Bare(torch.autograd.Function):
    """Nothing but an allocation each way: what autograd costs whoever is written in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return torch.empty_like(dy)


@triton.jit
def bare_kernel(out_ptr, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, index.to(tl.float32), mask=index < n)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=PLACE).to(dtype)


@cache
def subjects() -> dict[str, Subject]:
    """By name, the yardsticks first."""
    x, residual, weight = _random(ROWS, D, dtype=torch.bfloat16), _random(ROWS, D), torch.ones_like(_random(D))
    states, head = [_random(ROWS, D) for _ in range(LOOPS)], _random(VOCABULARY, D)
    targets = (_random(ROWS).abs() * 10).long() % VOCABULARY

    def read_out(*tensors: Tensor, **options: Any) -> Tensor:
        *loops, w, norm_weight = tensors
        return looped_cross_entropy(loops, w, targets, norm_weight=norm_weight, penalty=0.01, **options).loss

    def read_out_in_chunks(*tensors: Tensor) -> Tensor:
        return read_out(*tensors, chunk_rows=LOOPS * ROWS // CHUNKS)

    return {
        "F.rms_norm": Subject(lambda h, w: F.rms_norm(h, (D,), w, 1e-6), (residual, weight)),
        "bare autograd.Function": Subject(Bare.apply, (residual,)),
        "bare Triton launch": Subject(lambda h: bare_kernel[(1,)](h, D, BLOCK=64), (residual,), False),
        "rms_norm_penalty, y": Subject(lambda h, w: rms_norm_penalty(h, w).y, (residual, weight)),
        "rms_norm_penalty": Subject(lambda h, w: rms_norm_penalty(h, w), (residual, weight)),
        "rms_norm_penalty, residual": Subject(
            lambda h, w, r: rms_norm_penalty(h, w, residual=r), (x, weight, residual)
        ),
        "radial_gradient": Subject(radial_gradient, (residual, _random(ROWS, D))),
        "swiglu": Subject(swiglu, (residual, _random(ROWS, D))),
        "looped_cross_entropy, 1 chunk": Subject(read_out, (*states, head, weight)),
        f"looped_cross_entropy, {CHUNKS} chunks": Subject(read_out_in_chunks, (*states, head, weight)),
        "readout_statistics": Subject(
            lambda *loops: readout_statistics(loops, head, targets, norm_weight=weight), tuple(states), False
        ),
        **{
            f"decoder, {'fused' if fused else 'plain'}, {name}": Subject(partial(stepping, fused, dtype))
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            for fused in (True, False)
        },
    }


def stepping(fused: bool, dtype: torch.dtype) -> Call:
    """A training step without dropout, whose mask a CPU makes in operations that a GPU has not."""
    small = {"d_model": D, "n_heads": 2, "d_ff": D, "vocab_size": VOCABULARY, "max_seq_len": 8, "dropout": 0.0}
    with torch.device(PLACE):
        model = LoopedLM(replace(PRESETS["paper-129m"], **small), fused=fused)
        tokens = torch.zeros(1, 8, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):  # without a GPU
            training_step(model, optimizer, tokens, tokens, supervision="per-loop", penalty=0.01, dtype=dtype)

    return step


def prepared(subject: Subject, mode: str) -> Call:
    """A call of the subject in one of its modes, whose first runs compile."""
    if mode == STEP:
        return subject.call()
    inputs = tuple(tensor.detach().requires_grad_(mode != "no gradient") for tensor in subject.inputs)
    if mode == "no gradient":
        return torch.no_grad()(lambda: subject.call(*inputs))
    if mode == "forward":
        return lambda: subject.call(*inputs)
    results = subject.call(*inputs)
    results = [results] if isinstance(results, Tensor) else [each for each in results if isinstance(each, Tensor)]
    gradients = [torch.ones_like(result) for result in results]
    return lambda: torch.autograd.grad(results, inputs, gradients, retain_graph=True)


def cases() -> list[tuple[str, str]]:
    """Names of subjects, and their modes."""
    found = []
    for name, subject in subjects().items():
        modes = (MODES if subject.differentiable else MODES[:1]) if subject.inputs else (STEP,)
        found += [(name, mode) for mode in modes]
    return found


def path() -> contextlib.AbstractContextManager[None]:
    """The GPU that is there, or the host's part alone, in which products of whatever memory held must not be slow."""
    torch.set_flush_denormal(True)
    return contextlib.nullcontext() if ON_GPU else host_only()


def microseconds(call: Call, rounds: int, calls: int) -> float:
    """Of one call: its mean over so many calls in a row, in the quickest of so many rounds: others run here too."""
    for _ in range(min(calls, WARM_UPS)):
        call()
    means = []
    for _ in range(rounds):
        start = CLOCK()
        for _ in range(calls):
            call()
        means.append((CLOCK() - start) / calls * 1e6)
        if ON_GPU:
            torch.cuda.synchronize()
    return min(means)


def steps_in_turn(rounds: int) -> dict[str, list[float]]:
    """Microseconds of every decoder's step, by name: one of each in every round, as the machine's speed drifts."""
    with path():
        steps = {name: prepared(subjects()[name], STEP) for name, mode in cases() if mode == STEP}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(STEP_CALLS + rounds):
            for name, step in steps.items():
                start = CLOCK()
                step()
                if number >= STEP_CALLS:  # the first ones compile
                    times[name].append((CLOCK() - start) * 1e6)
                if ON_GPU:
                    torch.cuda.synchronize()
    return times


def measured(rounds: int = ROUNDS, calls: int = CALLS) -> Iterator[tuple[str, str, float]]:
    """Subject, mode and microseconds, one after the other; steps are left to `steps_in_turn`."""
    for name, mode in cases():
        if mode != STEP:
            with path():
                taken = microseconds(prepared(subjects()[name], mode), rounds, calls)
            yield name, mode, taken


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    with path():
        yield


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("name", "mode"), cases())
def bench_host(benchmark, as_on_a_gpu, name: str, mode: str) -> None:
    benchmark.group = f"host, {mode}"
    call = prepared(subjects()[name], mode)
    benchmark.pedantic(call, rounds=ROUNDS, iterations=STEP_CALLS if mode == STEP else CALLS, warmup_rounds=1)


def main() -> None:
    title = "host, microseconds a call" + ("" if ON_GPU else " (no GPU: its part alone)")
    values = {(name, mode): f"{value:.1f}" for name, mode, value in measured()}
    times = steps_in_turn(2 * ROUNDS)
    for name, of_name in times.items():
        plain = times[name.replace("fused", "plain")]
        values[name, STEP] = f"{median(of_name):.1f}"
        values[name, "of plain's"] = f"{median(a / b for a, b in zip(of_name, plain, strict=True)):.2f}"
    print("\n".join(crossed(title, values)))


if __name__ == "__main__":
    main()
