"""The only list of shapes that are measured, with the dtypes of each.

Cases whose name starts with `smoke` are tiny; they run when `-k smoke` asks for them, and never enter a record.

On a CPU whose instructions have no bf16 products PyTorch emulates them, at about a hundredth of the fp32 rate: there
the work that matrix products bound is measured in fp32, on smaller shapes so that the suite stays under 15 minutes, and
in bf16 on one small readout and one small step.
"""

from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BF16_IS_EMULATED = (
    DEVICE.type == "cpu"
    and torch.backends.mkldnn.is_available()
    and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # what PyTorch itself decides by
)
MACHINE = "cpu-fp32" if BF16_IS_EMULATED else DEVICE.type  # which list of each subject is measured here
MAIN_DTYPE = "fp32" if BF16_IS_EMULATED else "bf16"


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
    """A batch of sequences through a preset of `looped.config`, K loops, with another recurrence of `RECURRENCES`."""

    preset: str
    batch: int
    seq_len: int
    n_loops: int = 4
    recurrence: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.preset, self.recurrence, f"{self.batch}x{self.seq_len}-K{self.n_loops}")))

    @property
    def n_tokens(self) -> int:
        return self.batch * self.seq_len


class RecurrentShape(NamedTuple):
    """A batch of sequences through a model of `bench.competitors.recurrent_models`, at a size of its `Size`."""

    model: str
    batch: int
    seq_len: int
    n_loops: int
    d: int
    vocabulary: int
    n_layers: int = 2

    def __str__(self) -> str:
        size = f"K{self.n_loops}-L{self.n_layers}-d{self.d}-V{self.vocabulary}"
        return f"{self.model}-{self.batch}x{self.seq_len}-{size}"

    @property
    def n_tokens(self) -> int:
        return self.batch * self.seq_len


Shape = TypeVar("Shape", ReadoutShape, RowsShape, DecoderShape, RecurrentShape)


class Case(NamedTuple, Generic[Shape]):
    """A shape in one dtype. compiles: whether implementations that compile take part; where they would not differ from
    plain PyTorch, or the measurement is short, they would take most of the time. long: measured only with `-m long`."""

    shape: Shape
    dtype_name: str
    smoke: bool = False
    compiles: bool = True
    long: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def __str__(self) -> str:
        return f"{'smoke-' if self.smoke else ''}{self.shape}-{self.dtype_name}"


def named(cases: Iterable[Case[Shape]]) -> dict[str, Case[Shape]]:
    """Tests are parametrised by the names, which pytest-benchmark can group by and write."""
    return {str(case): case for case in cases}


LOOPS = (1, 2, 4, 8)

_ROWS = [RowsShape(32_768, d) for d in (768, 2048, 4096)] if MACHINE == "cuda" else [RowsShape(8192, 512)]
ROWS: dict[str, Case[RowsShape]] = named(
    [
        *(Case(shape, dtype) for shape in _ROWS for dtype in DTYPES),
        Case(RowsShape(96, 64), "fp32", smoke=True),
    ]
)

# Rows of the MLP's hidden channels: d is d_ff. On CUDA those of a step of paper-129m.
HIDDEN_ROWS: dict[str, Case[RowsShape]] = named(
    [
        *(Case(RowsShape(8192, 3072) if MACHINE == "cuda" else RowsShape(1024, 2048), dtype) for dtype in DTYPES),
        Case(RowsShape(96, 64), "fp32", smoke=True),
    ]
)

READOUTS: dict[str, Case[ReadoutShape]] = named(
    [
        *{
            "cpu": [
                *(Case(ReadoutShape(4, 2048, 512, v), dtype) for v in (20_000, 50_257) for dtype in DTYPES),
                *(Case(ReadoutShape(n_loops, 256, 512, 20_000), "bf16") for n_loops in LOOPS),
            ],
            "cpu-fp32": [
                *(Case(ReadoutShape(4, 2048, 512, v), "fp32", long=True) for v in (20_000, 50_257)),
                Case(ReadoutShape(4, 64, 512, 20_000), "bf16", long=True),
                Case(ReadoutShape(4, 1024, 512, 20_000), "fp32"),
                Case(ReadoutShape(4, 256, 512, 50_257), "fp32"),
                *(Case(ReadoutShape(n_loops, 64, 512, 20_000), "fp32", compiles=n_loops == 4) for n_loops in LOOPS),
                Case(ReadoutShape(4, 64, 512, 2048), "bf16", compiles=False),
            ],
            "cuda": [
                *(Case(ReadoutShape(n_loops, 8192, 768, 20_000), "bf16") for n_loops in LOOPS),
                Case(ReadoutShape(4, 8192, 768, 20_000), "fp32"),
                Case(ReadoutShape(4, 8192, 2048, 128_256), "bf16"),
            ],
        }[MACHINE],
        Case(ReadoutShape(2, 96, 64, 1000), "fp32", smoke=True),
        Case(ReadoutShape(2, 32, 64, 500), "bf16", smoke=True, compiles=False),
    ]
)

# Forward only. On a CPU without the largest readouts: they would take minutes and scale as those with gradients.
STATISTICS = {
    name: case
    for name, case in READOUTS.items()
    if MACHINE == "cuda"
    or (case.shape.vocabulary <= 20_000 and (MACHINE == "cpu" or case.long or case.shape.n_tokens < 1024))
}

# What is different from a preset's own recurrence. "huginn" and "parcae" have as many blocks in a loop as before.
RECURRENCES: dict[str, dict[str, Any]] = {
    "": {},
    "sandwich": {"block_norm": "sandwich"},
    "add": {"injection": "add"},
    "huginn": {"n_prelude": 1, "n_coda": 1, "injection": "concat", "start": "zero", "block_norm": "sandwich-sum"},
    "parcae": {"n_prelude": 1, "n_coda": 1, "injection": "diagonal", "start": "zero"},
    "loop-rank-8": {"loop_rank": 8, "loop_embedding": True},
}
_RECURRENT_STEPS = [
    *(DecoderShape("demo", 8, 128, 4, recurrence) for recurrence in RECURRENCES),
    *(DecoderShape("demo", 8, 128, n_loops) for n_loops in (1, 2, 8)),
]

FORWARDS: dict[str, Case[DecoderShape]] = named(
    [
        *{
            "cpu": [Case(DecoderShape("paper-44m", 4, 256, n_loops), "bf16") for n_loops in (1, 2, 3, 4)],
            "cpu-fp32": [Case(DecoderShape("paper-44m", 1, 128, k), "fp32", compiles=k == 4) for k in (1, 2, 3, 4)],
            "cuda": [
                Case(DecoderShape(preset, batch, 256, n_loops), "bf16")
                for preset, batch in (("paper-44m", 64), ("paper-129m", 32))
                for n_loops in (1, 2, 3, 4)
            ],
        }[MACHINE],
        Case(DecoderShape("demo", 2, 16, 2), "fp32", smoke=True),
    ]
)

STEPS: dict[str, Case[DecoderShape]] = named(
    [
        *{
            "cpu": [Case(DecoderShape("paper-44m", 4, 256), dtype) for dtype in DTYPES],
            "cpu-fp32": [
                Case(DecoderShape("paper-44m", 4, 256), "fp32", compiles=False, long=True),
                Case(DecoderShape("paper-44m", 1, 256), "fp32"),
                Case(DecoderShape("demo", 1, 64), "bf16", compiles=False),
            ],
            "cuda": [
                Case(DecoderShape(preset, batch, 256), dtype)
                for preset, batch in (("paper-44m", 64), ("paper-129m", 32))
                for dtype in DTYPES
            ]
            + [Case(DecoderShape("paper-129m", 4, 256), "bf16", compiles=False)],  # so small that the host decides
        }[MACHINE],
        *(Case(shape, MAIN_DTYPE, compiles=False) for shape in _RECURRENT_STEPS),
        Case(DecoderShape("demo", 2, 16, 2), "fp32", smoke=True, compiles=False),
        Case(DecoderShape("demo", 2, 16, 2, "huginn"), "fp32", smoke=True, compiles=False),
    ]
)

# Other people's models, narrow and shallow with vocabularies of the originals' order; ALBERT is ALBERT-base.
_MODELS = [  # K, d, V
    ("hrm_text", 2, 512, 49_152),
    ("albert", 12, 768, 30_000),
    ("ouro", 4, 512, 49_152),
    ("nanbeige", 2, 512, 49_152),
    ("huginn", 8, 512, 65_536),
]
_ROWS_OF_MODELS = {"cpu": (4, 256), "cpu-fp32": (2, 256), "cuda": (16, 512)}[MACHINE]
RECURRENT_MODELS: dict[str, Case[RecurrentShape]] = named(
    [
        *(
            Case(RecurrentShape(model, *_ROWS_OF_MODELS, n_loops, d, vocabulary), MAIN_DTYPE, long=MACHINE != "cuda")
            for model, n_loops, d, vocabulary in _MODELS
        ),
        *(Case(RecurrentShape(model, 2, 16, 2, 24, 100), "fp32", smoke=True) for model, *_ in _MODELS),
    ]
)

# Around which bench/scaling.py varies one size at a time; for real, and for a look whether it works.
SCALING_READOUT = (
    Case(
        ReadoutShape(4, 512, 512, 20_000) if DEVICE.type == "cpu" else ReadoutShape(4, 8192, 768, 20_000),
        MAIN_DTYPE,
    ),
    Case(ReadoutShape(2, 64, 32, 400), "fp32", smoke=True),
)
SCALING_STEP = (
    Case(DecoderShape("paper-44m", 1 if DEVICE.type == "cpu" else 16, 256), MAIN_DTYPE),
    Case(DecoderShape("demo", 1, 16, 2), "fp32", smoke=True),
)
