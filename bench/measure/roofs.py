"""What the machine allows: products in the best form found, and copies, timed in turn with what they are a roof for."""

import itertools
from collections.abc import Iterable
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure.timing import Call, seconds_of
from bench.shapes import BF16_IS_EMULATED, DEVICE, ReadoutShape
from looped.kernels.device import product_dtype

CHUNK_ROWS = (512, 2048, 8192) if DEVICE.type == "cuda" else (512, 2048)
CHUNK_VOCABULARY = 8192  # rows of the head of one product at most: larger ones run at the same rate
ROUNDS = 3
SHORT = 0.1  # seconds; the first call of a shorter product may have spent them on preparing it


class Roof(NamedTuple):
    """A call of the fastest way known to do `share` times the least that a task asks of the machine."""

    call: Call
    share: float


class Product(NamedTuple):
    """A product in the best form found: its FLOPs and the shortest time of its call."""

    call: Call
    flops: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.flops / self.seconds


def _layouts(matrix: Tensor) -> list[Tensor]:
    """The matrix as it is, and with its elements in memory in the other order."""
    return [matrix, matrix.t().contiguous().t()]


def best_product(a: Tensor, b: Tensor) -> Product:
    """The fastest way to form a @ b over the layouts of a, b and the result."""
    found: list[tuple[float, Call]] = []
    results = _layouts(torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device))
    for left, right, out in itertools.product(_layouts(a), _layouts(b), results):
        call = partial(torch.mm, left, right, out=out)
        first = seconds_of(call)
        best = min((seconds for seconds, _ in found), default=first)
        if first < max(SHORT, 2 * best):  # one call tells that a layout is slow, if it does not start something up
            found.append((min(seconds_of(call) for _ in range(ROUNDS)), call))
    seconds, call = min(found, key=lambda one: one[0])
    return Product(call, 2 * a.shape[0] * a.shape[1] * b.shape[1], seconds)


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(dtype)


def product_of(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Product:
    """A [rows, inner] times [inner, columns] product of `dtype` in the best layout, and in the better of two dtypes:
    its own and the one in which the kernels form such products here.  Emulated products are not tried."""
    formed = product_dtype(torch.empty(0, device=DEVICE), dtype)
    tried = {formed} if dtype == torch.bfloat16 and BF16_IS_EMULATED else {dtype, formed}
    return _fastest(best_product(_random(rows, inner, each), _random(inner, columns, each)) for each in tried)


def _fastest(products: Iterable[Product]) -> Product:
    return max(products, key=lambda product: product.rate)


@lru_cache(maxsize=2)  # they hold their matrices
def _readout_products(d: int, vocabulary: int, dtype: torch.dtype) -> tuple[Product, Product, Product]:
    """`h W^T`, `g W` and `g^T h`, each in its best layout and chunk of rows."""
    return (
        _fastest(product_of(rows, d, vocabulary, dtype) for rows in CHUNK_ROWS),
        _fastest(product_of(rows, vocabulary, d, dtype) for rows in CHUNK_ROWS),
        _fastest(product_of(vocabulary, rows, d, dtype) for rows in CHUNK_ROWS),
    )


def _repeated(products: tuple[Product, ...], flops: float) -> Roof:
    """Every product again and again for about `flops` FLOPs each."""
    times = [max(1, round(flops / product.flops)) for product in products]

    def call() -> None:
        for product, n in zip(products, times, strict=True):
            for _ in range(n):
                product.call()

    taken = sum(n * product.seconds for product, n in zip(products, times, strict=True))
    return Roof(call, taken / sum(flops / product.rate for product in products))


def readout_roof(shape: ReadoutShape, dtype: torch.dtype, *, backward: bool) -> Roof:
    """The readout's products over all K N rows and nothing else: three of them, or `h W^T` alone."""
    products = _readout_products(shape.d, min(shape.vocabulary, CHUNK_VOCABULARY), dtype)
    return _repeated(products if backward else products[:1], shape.flops / 3)


_projection = lru_cache(maxsize=2)(product_of)


def projection_roof(rows: int, inner: int, columns: int, dtype: torch.dtype, flops: float) -> Roof:
    """So many FLOPs as a [rows, inner] times [inner, columns] product, again and again."""
    return _repeated((_projection(rows, inner, columns, dtype),), flops)


@cache
def copy_roof(n_bytes: int) -> Roof:
    """A copy that reads and writes `n_bytes` in all."""
    source = torch.randn(max(1, n_bytes // 8), device=DEVICE)
    target = torch.empty_like(source)
    return Roof(lambda: target.copy_(source), 2 * source.nbytes / n_bytes)
