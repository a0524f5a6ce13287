"""The radial gradient, <g, h>, |g|^2 and |h|^2 of every row: GB/s of reading both tensors once."""

from functools import lru_cache

import pytest
import torch

from bench.measure.implementation import by_name, fused_plain_compiled
from bench.measure.measurement import cases
from bench.measure.rows import Operands, of_rows
from bench.shapes import DEVICE, ROWS, Case, RowsShape
from looped.kernels import radial_gradient
from looped.kernels.radial import RadialGradient, radial_gradient_reference

IMPLEMENTATIONS = by_name(fused_plain_compiled(radial_gradient, radial_gradient_reference))


@lru_cache(maxsize=1)
def operands_of(case: Case[RowsShape]) -> Operands:
    """h and g, [N, d]."""
    generator = torch.Generator().manual_seed(0)
    h, g = torch.randn(2, case.shape.n_rows, case.shape.d, generator=generator).to(DEVICE, case.dtype)
    return Operands([h, g], [])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@cases(ROWS)
def bench_radial(measure, case: str, implementation: str) -> None:
    rows = ROWS[case]
    measure(
        subject="radial gradient",
        **of_rows(
            IMPLEMENTATIONS, implementation, operands_of(rows), "forward",
            case=rows, names=RadialGradient._fields, wide=torch.float64,
            n_bytes=rows.shape.n_rows * (2 * rows.shape.d * rows.dtype.itemsize + 12),
        ),
    )  # fmt: skip
