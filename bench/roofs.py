"""What the machine allows, measured in the same run: products in the best layout found, and copies."""

import itertools
import math
from functools import cache, partial

import torch
from torch import Tensor

from bench.shapes import BF16_IS_EMULATED, DEVICE, ReadoutShape
from bench.timing import Call, seconds_of
from kernels.device import product_dtype

CHUNK_ROWS = (512, 2048, 8192) if DEVICE.type == "cuda" else (512, 2048)
CHUNK_VOCABULARY = 8192  # rows of the head of one product at most: larger ones run at the same rate
ROUNDS = 3
SHORT = 0.1  # seconds; the first call of a shorter product may have spent them on preparing it


def best_seconds(call: Call) -> float:
    """Shortest time of a call, after one that warms up."""
    call()
    return min(seconds_of(call) for _ in range(ROUNDS))


def _layouts(matrix: Tensor) -> list[Tensor]:
    """The matrix as it is, and with its elements in memory in the other order."""
    return [matrix, matrix.t().contiguous().t()]


def _product_seconds(a: Tensor, b: Tensor) -> float:
    """Seconds of the fastest way to form a @ b over the layouts of a, b and the result."""
    best = math.inf
    results = _layouts(torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device))
    for left, right, out in itertools.product(_layouts(a), _layouts(b), results):
        call = partial(torch.mm, left, right, out=out)
        first = seconds_of(call)
        if first < max(SHORT, 2 * best):  # one call tells that a layout is slow, if it does not start something up
            best = min(best, *(seconds_of(call) for _ in range(ROUNDS)))
    return best


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(dtype)


@cache
def _rate_in(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    seconds = _product_seconds(_random(rows, inner, dtype), _random(inner, columns, dtype))
    return 2 * rows * inner * columns / seconds


def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP/s of a [rows, inner] times [inner, columns] product of `dtype` in the best layout, and in the better of two
    dtypes: its own and the one in which the kernels form such products here.  Emulated products are not tried."""
    formed = product_dtype(torch.empty(0, device=DEVICE), dtype)
    own = set() if dtype == torch.bfloat16 and BF16_IS_EMULATED else {dtype}
    return max(_rate_in(rows, inner, columns, each) for each in own | {formed})


def _readout_rates(d: int, vocabulary: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """FLOP/s of `h W^T`, `g W` and `g^T h`, each in its best layout and chunk of rows."""
    return (
        max(product_rate(rows, d, vocabulary, dtype) for rows in CHUNK_ROWS),
        max(product_rate(rows, vocabulary, d, dtype) for rows in CHUNK_ROWS),
        max(product_rate(vocabulary, rows, d, dtype) for rows in CHUNK_ROWS),
    )


def readout_floor(shape: ReadoutShape, dtype: torch.dtype, *, backward: bool) -> float:
    """Seconds of the readout's products over all K N rows and nothing else: three of them, or `h W^T` alone."""
    rates = _readout_rates(shape.d, min(shape.vocabulary, CHUNK_VOCABULARY), dtype)
    return sum(shape.flops / 3 / rate for rate in (rates if backward else rates[:1]))


@cache
def copy_rate(n_bytes: int) -> float:
    """Bytes per second, read and written, of a copy that moves `n_bytes` in all."""
    source = torch.randn(max(1, n_bytes // 8), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source))
