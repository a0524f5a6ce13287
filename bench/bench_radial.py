"""The radial gradient, <g, h>, |g|^2 and |h|^2 of every row: GB/s of reading both tensors once."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.accuracy import Errors, relative_error
from bench.implementations import Implementation, freshly_compiled
from bench.measurement import Measurement, Work
from bench.roofs import copy_rate
from bench.shapes import DEVICE, ROWS, Case, RowsShape
from kernels import radial_gradient
from kernels.radial import radial_gradient_reference

IMPLEMENTATIONS = [
    Implementation("fused", lambda: radial_gradient),
    Implementation("plain", lambda: radial_gradient_reference),
    Implementation("compiled", lambda: freshly_compiled(radial_gradient_reference)),
]


@lru_cache(maxsize=1)
def inputs_of(case: Case[RowsShape]) -> tuple[Tensor, Tensor]:
    """h and g, [N, d]."""
    generator = torch.Generator().manual_seed(0)
    rows = (2, case.shape.n_rows, case.shape.d)
    h, g = torch.randn(rows, generator=generator).to(DEVICE, case.dtype)
    return h, g


def errors(radial, inputs: tuple[Tensor, Tensor]) -> Errors:
    """Relative errors against plain PyTorch on the same numbers in float64."""
    truth = radial_gradient_reference(*(tensor.double() for tensor in inputs))
    return {name: relative_error(a, b) for name, a, b in zip(truth._fields, radial(*inputs), truth, strict=True)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("case", ROWS, ids=str)
def bench_radial(measure, case: Case[RowsShape], implementation: Implementation) -> None:
    inputs, radial = inputs_of(case), implementation.make()
    n_bytes = case.shape.n_rows * (2 * case.shape.d * case.dtype.itemsize + 12)
    measure(
        Measurement(
            group="radial gradient",
            case=case,
            implementation=implementation,
            errors=lambda: errors(radial, inputs),
            allowed=lambda: errors(radial_gradient_reference, inputs),
            prepare=lambda: lambda: radial(*inputs),
            reference=lambda: lambda: radial_gradient(*inputs),
            work=Work(n_bytes / 1e9, "GB/s", lambda: n_bytes / copy_rate(n_bytes)),
        )
    )
