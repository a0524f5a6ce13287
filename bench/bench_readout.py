"""Readout, forward and backward: fused against every competitor, in one process, on the same inputs, in turn.

Each benchmark times one implementation and, before each of its rounds, the fused one: `ratio_to_fused` is the median
of the paired quotients, which a busy machine cannot move as it moves absolute times.
"""

import platform
import subprocess
import time
from functools import cache
from statistics import median

import pytest
import torch

from bench.readouts import IMPLEMENTATIONS, Errors, Implementation, Inputs, Loss, errors, fused, plain, run
from bench.roofs import readout_floor
from bench.shapes import DEVICE, READOUTS, SMOKE_READOUT, ReadoutShape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@cache
def inputs_of(shape: ReadoutShape, dtype: torch.dtype) -> Inputs:
    torch.set_flush_denormal(True)
    return Inputs.of(shape, dtype)


@cache
def floor_of(shape: ReadoutShape, dtype: torch.dtype) -> float:
    return readout_floor(shape, dtype)


@cache
def plain_errors(shape: ReadoutShape, dtype: torch.dtype) -> Errors:
    return errors(plain, inputs_of(shape, dtype))


def environment() -> dict[str, str | int]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def judge(found: Errors, allowed: Errors) -> bool:
    """No worse than plain PyTorch in the same dtype by more than a factor of 2."""
    return all(a <= 2 * b + 1e-5 for a, b in zip(found, allowed, strict=True))


def measure(benchmark, implementation: Implementation, shape: ReadoutShape, dtype: torch.dtype, rounds: int) -> None:
    if implementation.missing:
        pytest.skip(f"{implementation.name}: {implementation.missing}")
    inputs = inputs_of(shape, dtype)
    loss: Loss = implementation.make()
    found = errors(loss, inputs)  # which also warms up and compiles
    correct = judge(found, plain_errors(shape, dtype))
    if loss is fused:
        assert correct, f"fused is wrong: {found}, plain PyTorch {plain_errors(shape, dtype)}"
    run(fused, inputs)
    references: list[float] = []

    def time_fused() -> None:
        start = time.perf_counter()
        run(fused, inputs)
        references.append(time.perf_counter() - start)

    benchmark.pedantic(lambda: run(loss, inputs), setup=time_fused, rounds=rounds, warmup_rounds=0)
    times = benchmark.stats.stats.data
    middle = median(times)
    floor = floor_of(shape, dtype)
    benchmark.extra_info.update(
        environment(),
        gflops_per_second=round(shape.flops / middle / 1e9, 1),
        share_of_gemm_floor=round(floor / middle, 3),
        ratio_to_fused=round(median(t / r for t, r in zip(times, references, strict=True)), 3),
        correct=correct,
        loss_error=found.loss,
        states_gradient_error=found.states,
        head_gradient_error=found.head,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", READOUTS, ids=str)
def bench_readout(benchmark, shape: ReadoutShape, dtype: str, implementation: Implementation) -> None:
    benchmark.group = f"readout forward+backward {shape} {dtype}"
    measure(benchmark, implementation, shape, DTYPES[dtype], rounds=5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.name)
def bench_smoke_readout(benchmark, implementation: Implementation) -> None:
    benchmark.group = "smoke"
    measure(benchmark, implementation, SMOKE_READOUT, torch.float32, rounds=1)
