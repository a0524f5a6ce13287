"""What every Triton module here shares: the launch of a kernel, and the radial fraction of a row."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .device import Function

PLAIN = (torch.Tensor, torch.nn.Parameter)
MAX_KEPT = 4096  # launches that are remembered: shapes may differ from call to call


class Launch:
    """A kernel, with its grid, the numbers that are its last arguments, and how it is compiled.

    Called with tensors, the kernel's first arguments, it runs on their GPU.  Triton itself launches on the current GPU,
    whatever tensors it is given, and looks a kernel up by arguments that it classifies anew each time.  Here a compiled
    kernel is looked up by the GPU, the tensors' dtypes, and which addresses are multiples of 16, where not all are.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, num_warps: int, **options: Any) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.options = {"num_warps": num_warps, **options}
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        addresses, on = 0, None
        key: list[Any] = []
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            else:
                on = tensor
                addresses |= tensor.data_ptr()
                key.append(tensor.dtype)
        assert on is not None  # every kernel writes a tensor
        device = on.device.index if on.is_cuda else None
        if device is not None and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(tensors)
            return
        if type(on) not in PLAIN or torch.version.hip or not isinstance(self.kernel, triton.JITFunction):
            # for AMD Triton also compiles for the size of a tensor's storage
            self.kernel[self.grid](*tensors, *self.numbers, **self.options)
            return
        key.append(device)
        key.append(addresses % 16 == 0 or tuple([tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors]))
        run = self.compiled.get(tuple(key))
        if run is not None:
            run(*tensors, *self.numbers)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
        if compiled is not None:  # a hook of Triton's may hold a kernel back
            self.compiled[tuple(key)] = compiled[(*self.grid, 1, 1)[:3]]


def remembered(function: Function) -> Function:
    """Remember a function's results by its arguments and their types: to a dict, 1 is 1.0 and True."""
    return functools.lru_cache(MAX_KEPT, typed=True)(function)  # type: ignore[return-value]


_launch = remembered(Launch)


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[torch.Tensor | None], *numbers: Any, **options: Any
) -> None:
    """Run a kernel, whose arguments are the tensors and then the numbers, on the tensors' GPU."""
    _launch(kernel, grid, *numbers, **options)(tensors)


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up.  (Triton's own function takes the host as long as a launch.)"""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def radial_fraction(g, h):
    """|<g, h>| / (|g| |h|) of rows [BLOCK_ROWS, BLOCK_COLUMNS]; 0 where g or h is 0, nan where either has a nan.

    Both are divided by their largest element first, so that no square leaves float32's range.
    """
    g_peak, h_peak = tl.max(tl.abs(g), axis=1), tl.max(tl.abs(h), axis=1)
    g /= tl.where(g_peak > 0, g_peak, 1.0)[:, None]
    h /= tl.where(h_peak > 0, h_peak, 1.0)[:, None]
    norms = tl.sqrt(tl.sum(g * g, axis=1)) * tl.sqrt(tl.sum(h * h, axis=1))
    return tl.where(norms == 0, 0.0, tl.abs(tl.sum(g * h, axis=1)) / tl.where(norms == 0, 1.0, norms))
