"""SwiGLU's product silu(gate) * up, forward and backward apart: GB/s of reading and writing each tensor once."""

from functools import lru_cache

import pytest
import torch

from bench.measure.implementation import by_name, fused_plain_compiled
from bench.measure.measurement import cases
from bench.measure.rows import Direction, Operands, of_rows
from bench.shapes import DEVICE, HIDDEN_ROWS, Case, RowsShape
from looped.kernels import swiglu
from looped.kernels.swiglu import swiglu_reference

IMPLEMENTATIONS = by_name(fused_plain_compiled(swiglu, swiglu_reference))
NAMES = {"forward": ("y",), "backward": ("dgate", "dup")}
TENSORS = {"forward": 3, "backward": 5}  # read and written


@lru_cache(maxsize=1)
def operands_of(case: Case[RowsShape], direction: Direction) -> Operands:
    """gate and up; dy, [N, d_ff]."""
    generator = torch.Generator().manual_seed(0)
    gate, up, dy = torch.randn(3, case.shape.n_rows, case.shape.d, generator=generator).to(DEVICE, case.dtype)
    return Operands([x.detach().requires_grad_(direction == "backward") for x in (gate, up)], [dy])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@cases(HIDDEN_ROWS)
def bench_swiglu(measure, case: str, direction: Direction, implementation: str) -> None:
    rows = HIDDEN_ROWS[case]
    n_bytes = TENSORS[direction] * rows.shape.n_rows * rows.shape.d * rows.dtype.itemsize
    measure(
        subject=f"SwiGLU {direction}",
        **of_rows(
            IMPLEMENTATIONS, implementation, operands_of(rows, direction), direction,
            case=rows, names=NAMES[direction], n_bytes=n_bytes,
        ),
    )  # fmt: skip
