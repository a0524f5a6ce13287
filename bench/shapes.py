"""The only list of shapes that are measured, with the dtypes and the number of timed rounds of each.

Cases whose name starts with `smoke` are tiny; they run when `-k smoke` asks for them, and never enter a record.
"""

from typing import Generic, NamedTuple, TypeVar

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ReadoutShape(NamedTuple):
    """K loops of N tokens, d channels, a vocabulary of V."""

    n_loops: int
    n_tokens: int
    d: int
    vocabulary: int

    def __str__(self) -> str:
        return f"K{self.n_loops}-N{self.n_tokens}-d{self.d}-V{self.vocabulary}"

    @property
    def flops(self) -> int:
        """Of the three products of the readout, forward and backward: 6 K N d V."""
        return 6 * self.n_loops * self.n_tokens * self.d * self.vocabulary


class RowsShape(NamedTuple):
    """Rows of d channels, for the operations that work on rows alone."""

    n_rows: int
    d: int

    def __str__(self) -> str:
        return f"{self.n_rows}x{self.d}"


class DecoderShape(NamedTuple):
    """A batch of sequences through a preset of `looped.config`, K loops."""

    preset: str
    batch: int
    seq_len: int
    n_loops: int = 4

    def __str__(self) -> str:
        return f"{self.preset}-{self.batch}x{self.seq_len}-K{self.n_loops}"

    @property
    def n_tokens(self) -> int:
        return self.batch * self.seq_len


Shape = TypeVar("Shape", ReadoutShape, RowsShape, DecoderShape)


class Case(NamedTuple, Generic[Shape]):
    """A shape in one dtype, timed `rounds` times."""

    shape: Shape
    dtype_name: str
    rounds: int
    smoke: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def __str__(self) -> str:
        return f"{'smoke-' if self.smoke else ''}{self.shape}-{self.dtype_name}"


ROWS: list[Case[RowsShape]] = [
    *{
        "cpu": [Case(RowsShape(8192, 512), dtype, 20) for dtype in DTYPES],
        "cuda": [Case(RowsShape(32_768, d), dtype, 100) for d in (768, 2048, 4096) for dtype in DTYPES],
    }[DEVICE.type],
    Case(RowsShape(96, 64), "fp32", 1, smoke=True),
]

READOUTS: list[Case[ReadoutShape]] = [
    *{
        "cpu": [
            Case(ReadoutShape(4, 2048, 512, 20_000), "bf16", 3),
            Case(ReadoutShape(4, 2048, 512, 20_000), "fp32", 2),
            Case(ReadoutShape(4, 2048, 512, 50_257), "bf16", 3),
            Case(ReadoutShape(4, 2048, 512, 50_257), "fp32", 2),
            *(Case(ReadoutShape(n_loops, 256, 512, 20_000), "bf16", 3) for n_loops in (1, 2, 8)),
        ],
        "cuda": [
            *(Case(ReadoutShape(n_loops, 8192, 768, 20_000), "bf16", 20) for n_loops in (1, 2, 4, 8)),
            Case(ReadoutShape(4, 8192, 768, 20_000), "fp32", 10),
            Case(ReadoutShape(4, 8192, 2048, 128_256), "bf16", 10),
        ],
    }[DEVICE.type],
    Case(ReadoutShape(2, 96, 64, 1000), "fp32", 1, smoke=True),
]

FORWARDS: list[Case[DecoderShape]] = [
    *{
        "cpu": [Case(DecoderShape("paper-44m", 4, 256, n_loops), "bf16", 2) for n_loops in (1, 2, 3, 4)],
        "cuda": [
            Case(DecoderShape(preset, batch, 256, n_loops), "bf16", 20)
            for preset, batch in (("paper-44m", 64), ("paper-129m", 32))
            for n_loops in (1, 2, 3, 4)
        ],
    }[DEVICE.type],
    Case(DecoderShape("demo", 2, 16, 2), "fp32", 1, smoke=True),
]

STEPS: list[Case[DecoderShape]] = [
    *{
        "cpu": [Case(DecoderShape("paper-44m", 4, 256), dtype, 3) for dtype in DTYPES],
        "cuda": [
            Case(DecoderShape(preset, batch, 256), dtype, 10)
            for preset, batch in (("paper-44m", 64), ("paper-129m", 32))
            for dtype in DTYPES
        ],
    }[DEVICE.type],
    Case(DecoderShape("demo", 2, 16, 2), "fp32", 1, smoke=True),
]

LARGE_VOCABULARY = 20_000  # on a CPU, an implementation that says it is slow is not timed above

# Forward only. On a CPU without the largest vocabulary: it would take minutes and scales as the readout with gradients.
STATISTICS = [case for case in READOUTS if DEVICE.type == "cuda" or case.shape.vocabulary <= LARGE_VOCABULARY]

# Around which bench/scaling.py varies one size at a time; for real, and for a look whether it works.
SCALING_READOUT = (
    Case(
        ReadoutShape(4, 512, 512, 20_000) if DEVICE.type == "cpu" else ReadoutShape(4, 8192, 768, 20_000),
        "bf16",
        3,
    ),
    Case(ReadoutShape(2, 64, 32, 400), "fp32", 1, smoke=True),
)
SCALING_STEP = (
    Case(DecoderShape("paper-44m", 1 if DEVICE.type == "cpu" else 16, 256), "bf16", 3),
    Case(DecoderShape("demo", 1, 16, 2), "fp32", 1, smoke=True),
)
