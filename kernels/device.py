"""Which implementation a tensor takes, and in which dtypes its products and sums are formed."""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch

CPU_BLOCK_BYTES = 4 << 20

Function = TypeVar("Function", bound=Callable[..., Any])


def interprets() -> bool:
    """Whether TRITON_INTERPRET asks for Triton kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def uses_triton(tensor: torch.Tensor) -> bool:
    """True for CUDA and ROCm tensors; under TRITON_INTERPRET=1 for CPU tensors too."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and interprets())


@functools.cache
def implementation(name: str) -> ModuleType:
    """The module of that name here, imported where it is used first: Triton is not there on every machine."""
    return importlib.import_module(f".{name}", __package__)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: float32, and float64 for float64 (CPU only)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; 2 in the interpreter, so that programs that share rows are tested there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def multiplies_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype`, bfloat16 or float16, faster than float32.

    Intel's bfloat16 dot product without AMX issues at half the rate of a float32 multiply-add and gains nothing (165
    against 300 GFLOP/s on two Sapphire Rapids cores); AMD's issues at the full rate.  Without either it is emulated.
    """
    has = torch.cpu.get_capabilities()
    if dtype == torch.float16:
        return has.get("amx_fp16", False)
    return has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and "Intel" not in has.get("cpu_name", ""))


def constant_in_graphs(function: Function) -> Function:
    """The function, whose result torch.compile takes for a constant: a compiled graph is for one machine.

    torch.compiler.assume_constant_result does nothing else, but it imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def _widened_on_cpu(dtype: torch.dtype) -> bool:
    return not interprets() and not multiplies_faster(dtype)


def product_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype products of operands of `dtype` are formed: float32 on a CPU that gains nothing by less."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and tensor.device.type == "cpu" and _widened_on_cpu(dtype) else dtype


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast decides now in which dtype a matrix product of `tensor` runs."""
    kind = tensor.device.type
    if kind in ("cpu", "cuda") and not torch._C._is_any_autocast_enabled():  # the quickest question
        return False
    return kind != "meta" and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `tensor` runs now: autocast's, or its own."""
    return torch.get_autocast_dtype(tensor.device.type) if autocasts(tensor) else tensor.dtype


def product_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Autocast as it is now for products of `tensor`, but off on a CPU that gains nothing by its dtype.

    Where bfloat16 is emulated its products take tens of times as long as those of float32.
    """
    dtype = autocast_dtype(tensor)
    if product_dtype(tensor, dtype) == dtype:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def cpu_blocks(n_rows: int, row_bytes: int) -> Iterator[slice]:
    """The rows of a CPU pass in blocks whose `row_bytes` fit the second-level caches of the threads that share it.

    Where those are small, CPU_BLOCK_BYTES: with less work an operation, starting the threads takes most of the time.
    """
    cache = torch.get_num_threads() * torch.cpu.get_capabilities().get("l2_cache_size", 1 << 20)
    size = max(1, max(cache, CPU_BLOCK_BYTES) // max(1, row_bytes))
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))
