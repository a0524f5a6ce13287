"""The radial gradient, <g, h>, |g|^2 and |h|^2 of every row: GB/s of reading both tensors once."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.measure.accuracy import Errors, limits, relative_error
from bench.measure.implementation import Implementation, by_name, compiled
from bench.measure.measurement import Measurement, Work
from bench.measure.roofs import copy_roof
from bench.shapes import DEVICE, ROWS
from looped.kernels import radial_gradient
from looped.kernels.radial import RadialGradient, radial_gradient_reference

IMPLEMENTATIONS = by_name(
    [
        Implementation("fused", lambda: radial_gradient),
        Implementation("plain", lambda: radial_gradient_reference),
        compiled("compiled", radial_gradient_reference),
    ]
)


@lru_cache(maxsize=1)
def inputs_of(case: str) -> tuple[Tensor, Tensor]:
    """h and g, [N, d]."""
    generator = torch.Generator().manual_seed(0)
    shape = ROWS[case].shape
    h, g = torch.randn(2, shape.n_rows, shape.d, generator=generator).to(DEVICE, ROWS[case].dtype)
    return h, g


def errors(found: RadialGradient, inputs: tuple[Tensor, Tensor]) -> Errors:
    """Relative errors against plain PyTorch on the same numbers in float64."""
    truth = radial_gradient_reference(*(tensor.double() for tensor in inputs))
    return {name: relative_error(a, b) for name, a, b in zip(truth._fields, found, truth, strict=True)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ROWS)
def bench_radial(measure, case: str, implementation: str) -> None:
    inputs, radial = inputs_of(case), IMPLEMENTATIONS[implementation].make()
    shape, dtype = ROWS[case].shape, ROWS[case].dtype
    n_bytes = shape.n_rows * (2 * shape.d * dtype.itemsize + 12)
    measure(
        Measurement(
            subject="radial gradient",
            case=ROWS[case],
            implementation=IMPLEMENTATIONS[implementation],
            prepare=lambda: lambda: radial(*inputs),
            reference=lambda: lambda: radial_gradient(*inputs),
            errors=lambda found: errors(found, inputs),
            allowed=lambda: limits(errors(radial_gradient_reference(*inputs), inputs)),
            work=Work(n_bytes / 1e9, "GB/s", lambda: copy_roof(n_bytes)),
        )
    )
