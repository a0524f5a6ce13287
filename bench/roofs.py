"""What the machine allows, measured: the products of the readout alone, in the best layout and chunk found."""

import itertools
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from bench.records import synchronised
from bench.shapes import DEVICE, ReadoutShape

CHUNKS = (512, 1024, 2048, 4096)


def seconds(function: Callable[[], object], rounds: int = 3) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    function = synchronised(function)
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _layouts(matrix: Tensor) -> list[Tensor]:
    """The matrix as it is, and with its elements in memory in the other order."""
    return [matrix, matrix.t().contiguous().t()]


def best_product(a: Tensor, b: Tensor) -> float:
    """Seconds of the fastest way to form a @ b over the layouts of a, b and the result."""
    rows, columns = a.shape[0], b.shape[1]
    results = _layouts(torch.empty(rows, columns, dtype=a.dtype, device=a.device))
    ways = itertools.product(_layouts(a), _layouts(b), results)
    return min(seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for a, b, out in ways)  # type: ignore[misc]


def readout_floor(shape: ReadoutShape, dtype: torch.dtype) -> float:
    """Seconds of the three products `h W^T`, `g W`, `g^T h` over all K N rows, each in its best layout and chunk."""
    n_rows = shape.n_loops * shape.n_tokens
    best = [float("inf")] * 3
    for rows in CHUNKS:
        if rows > n_rows and rows != CHUNKS[0]:
            continue
        rows = min(rows, n_rows)
        h = torch.randn(rows, shape.d, dtype=torch.float32).to(DEVICE, dtype)
        head = torch.randn(shape.vocabulary, shape.d, dtype=torch.float32).to(DEVICE, dtype)
        g = torch.randn(rows, shape.vocabulary, dtype=torch.float32).to(DEVICE, dtype)
        for index, (a, b) in enumerate(((h, head.t()), (g, head), (g.t(), h))):
            best[index] = min(best[index], best_product(a, b) * n_rows / rows)
    return sum(best)
