"""The only list of shapes that are measured."""

from typing import NamedTuple

import torch


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


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
READOUTS = {
    "cpu": [ReadoutShape(4, 2048, 512, 20_000), ReadoutShape(4, 2048, 512, 50_257)],
    "cuda": [ReadoutShape(4, 8192, 768, 20_000), ReadoutShape(4, 8192, 2048, 128_256)],
}[DEVICE.type]
SMOKE_READOUT = ReadoutShape(2, 96, 64, 1000)


class StepShape(NamedTuple):
    """An optimisation step of a preset."""

    preset: str
    batch: int
    seq_len: int

    def __str__(self) -> str:
        return f"{self.preset}-{self.batch}x{self.seq_len}"


STEPS = {
    "cpu": [StepShape("paper-44m", 4, 256)],
    "cuda": [StepShape("paper-44m", 64, 256), StepShape("paper-129m", 32, 256)],
}[DEVICE.type]
