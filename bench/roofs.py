"""What the machine allows, measured in the same run: products in the best layout found, and copies."""

import itertools
from functools import cache

import torch
from torch import Tensor

from bench.shapes import DEVICE, ReadoutShape
from bench.timing import Call, seconds_of

CHUNK_ROWS = (512, 2048, 8192) if DEVICE.type == "cuda" else (512, 2048)
CHUNK_VOCABULARY = 8192  # rows of the head of one product at most: larger ones run at the same rate
ROUNDS = 3


def best_seconds(call: Call) -> float:
    """Shortest time of a call, after one that warms up."""
    call()
    return min(seconds_of(call) for _ in range(ROUNDS))


def _layouts(matrix: Tensor) -> list[Tensor]:
    """The matrix as it is, and with its elements in memory in the other order."""
    return [matrix, matrix.t().contiguous().t()]


def _product_seconds(a: Tensor, b: Tensor) -> float:
    """Seconds of the fastest way to form a @ b over the layouts of a, b and the result."""
    results = _layouts(torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device))
    ways = itertools.product(_layouts(a), _layouts(b), results)
    return min(best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for a, b, out in ways)  # type: ignore[misc]


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(dtype)


@cache
def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP/s of a [rows, inner] times [inner, columns] product in its best layout."""
    seconds = _product_seconds(_random(rows, inner, dtype), _random(inner, columns, dtype))
    return 2 * rows * inner * columns / seconds


@cache
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
