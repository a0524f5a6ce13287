"""What every Triton module here shares: the launch of a kernel, and the radial fraction of a row."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

PLAIN = (torch.Tensor, torch.nn.Parameter)
COMPILED: dict[tuple[Any, ...], Any] = {}  # kernels by everything that Triton compiles for
MAX_COMPILED = 4096


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor | None],
    *numbers: Any,
    num_warps: int,
    **options: Any,
) -> None:
    """Run a kernel, whose arguments are the tensors and then the numbers, on the tensors' GPU.

    Triton itself launches on the current GPU, whatever tensors it is given, and looks a kernel up by arguments that it
    classifies anew each time.  Here a kernel is looked up by its grid, the numbers, the tensors' dtypes, and which
    addresses are multiples of 16, where not all are.
    """
    addresses, on = 0, None
    dtypes: list[torch.dtype | None] = []
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            on = tensor
            addresses |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
    assert on is not None  # every kernel writes a tensor
    device = on.device.index if on.is_cuda else None
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, *numbers, num_warps=num_warps, **options)
        return
    plain = type(on) in PLAIN and isinstance(kernel, triton.JITFunction)
    if not plain or torch.version.hip:  # for AMD Triton also compiles for the size of a tensor's storage
        kernel[grid](*tensors, *numbers, num_warps=num_warps, **options)
        return
    aligned = addresses % 16 == 0 or tuple(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    # to a dict, 1 is 1.0 and True
    key = (kernel, device, grid, num_warps, aligned, numbers, *map(type, numbers), *dtypes)
    run = COMPILED.get(key)
    if run is not None:
        run(*tensors, *numbers)
        return
    if len(COMPILED) >= MAX_COMPILED:
        COMPILED.clear()
    compiled = kernel[grid](*tensors, *numbers, num_warps=num_warps, **options)
    if compiled is not None:  # a hook of Triton's may hold a kernel back
        COMPILED[key] = compiled[(*grid, 1, 1)[:3]]


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
