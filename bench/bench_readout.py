"""Readout, forward and backward: fused against every competitor, in one process, on the same inputs, in turn.

`ratio_to_fused` is the median of paired quotients: above 1, the fused readout is that much faster.
"""

from functools import cache

import pytest
import torch

from bench.readouts import IMPLEMENTATIONS, Errors, Implementation, Inputs, errors, fused, plain, run
from bench.records import environment, time_in_turn
from bench.roofs import readout_floor
from bench.shapes import READOUTS, SMOKE_READOUT, ReadoutShape

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


def judge(found: Errors, allowed: Errors) -> bool:
    """No worse than plain PyTorch in the same dtype by more than a factor of 2."""
    return all(a <= 2 * b + 1e-5 for a, b in zip(found, allowed, strict=True))


def measure(benchmark, implementation: Implementation, shape: ReadoutShape, dtype: torch.dtype, rounds: int) -> None:
    if implementation.missing:
        pytest.skip(f"{implementation.name}: {implementation.missing}")
    inputs = inputs_of(shape, dtype)
    loss = implementation.make()
    found = errors(loss, inputs)
    correct = judge(found, plain_errors(shape, dtype))
    assert correct or loss is not fused, f"fused is wrong: {found}, plain PyTorch {plain_errors(shape, dtype)}"
    paired = time_in_turn(benchmark, lambda: run(loss, inputs), lambda: run(fused, inputs), rounds)
    benchmark.extra_info.update(
        environment(),
        gflops_per_second=round(shape.flops / paired.seconds / 1e9, 1),
        share_of_gemm_floor=round(floor_of(shape, dtype) / paired.seconds, 3),
        ratio_to_fused=round(paired.ratio, 3),
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
