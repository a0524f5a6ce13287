"""Norm + penalty, with and without the residual add, forward and backward apart: GB/s of the least possible traffic.

Each tensor counts once. Forward: x (+ residual) read, y (+ sum) written; backward: h, dy (+ dsum) read, dh written.
"""

from functools import lru_cache

import pytest

from bench.competitors.norms import IMPLEMENTATIONS, random_operands
from bench.measure.measurement import cases
from bench.measure.rows import Direction, of_rows
from bench.shapes import ROWS

operands_of = lru_cache(maxsize=1)(random_operands)
NAMES = {"forward": ("y", "mean square", "sum"), "backward": ("dx", "dweight", "dresidual")}
TENSORS = {("forward", False): 2, ("forward", True): 4, ("backward", False): 3, ("backward", True): 4}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add-norm"])
@cases(ROWS)
def bench_norm(measure, case: str, residual: bool, direction: Direction, implementation: str) -> None:
    rows = ROWS[case]
    row_bytes = TENSORS[direction, residual] * rows.shape.d * rows.dtype.itemsize + 4
    measure(
        subject=f"{'add + ' if residual else ''}norm + penalty {direction}",
        **of_rows(
            IMPLEMENTATIONS, implementation, operands_of(rows.shape, rows.dtype, residual=residual), direction,
            case=rows, names=NAMES[direction][: 3 if residual else 2], n_bytes=rows.shape.n_rows * row_bytes,
        ),
    )  # fmt: skip
