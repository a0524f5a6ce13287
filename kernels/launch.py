"""What every Triton module here shares: the launch of a kernel, and the radial fraction of a row."""

from typing import Any

import torch
import triton
import triton.language as tl


def launch(kernel: Any, grid: tuple[int, ...], on: torch.Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the GPU of the tensor `on`; Triton itself takes the current one, whatever it is given.

    Arguments go by position: each keyword costs the host as much as a specialised integer does.
    """
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


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
