"""Models small enough to diagnose in a test, none of them a LoopedLM, and a measured model to judge."""

import dataclasses
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped.diagnose import Batch, LoopedModel
from looped.diagnose.depth import Depth
from looped.diagnose.dynamics import Norms, Updates
from looped.diagnose.halting import Halt, Halting
from looped.diagnose.interventions import AlphaSweep, Clamped, RadialClamp
from looped.diagnose.radial import RadialFractions
from looped.diagnose.skipping import NO_POLICY, Skipped
from looped.diagnose.verdict import Measurements

VOCABULARY, CHANNELS, N_LOOPS = 11, 6, 3


class Recurrence(nn.Module):
    """`H_{k+1} = H_k + tanh(A Norm(H_k) + B H_0)` and a linear head: a recurrent model with input injection."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, CHANNELS)
        self.mix = nn.Linear(CHANNELS, CHANNELS)
        self.inject = nn.Linear(CHANNELS, CHANNELS)
        self.norm = nn.RMSNorm(CHANNELS, eps=1e-2)  # large, so that what eps leaves is seen
        self.layer_norm = nn.LayerNorm(CHANNELS, eps=1e-2)
        self.head = nn.Linear(CHANNELS, VOCABULARY)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.layer_norm.weight, 0.5, 1.5)
        self.to(dtype)

    def advance(self, state: Tensor, embedded: Tensor, done: int) -> Tensor:
        return state + torch.tanh(self.mix(F.rms_norm(state, (CHANNELS,))) + self.inject(embedded))

    def described(self, **changes) -> LoopedModel:
        """As a LoopedModel, with an RMSNorm readout of every loop unless `changes` say otherwise."""
        fields = {
            "n_loops": N_LOOPS, "embed": self.embedding, "loop": self.advance, "head": self.head, "norm": self.norm,
        }  # fmt: skip
        return LoopedModel(**(fields | changes))


def batches(sizes: tuple[int, ...] = (2, 1), length: int = 5) -> list[Batch]:
    """Of unequal size, so that a mean over batches is not the mean over tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (size, length + 1), generator=generator) for size in sizes]
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def rows_of(model: Recurrence, n_loops: int) -> tuple[list[Tensor], Tensor]:
    """H_1..H_n [tokens, d] and targets [tokens] of `batches`, one token after the other."""
    inputs, targets = (torch.cat([part.flatten() for part in parts]) for parts in zip(*batches(), strict=True))
    embedded = state = model.embedding(inputs)
    states = []
    for _ in range(n_loops):
        state = model.advance(state, embedded, 0)
        states.append(state)
    return states, targets


def clamp(both: float, frozen: float = 0.0005, tangential: float = 0.0002) -> RadialClamp:
    """Of four loops, with these changes at the last one."""
    forms = [Clamped([0.0, 0.0, 0.0, change], [0.0, 0.0, 0.0, 0.0001]) for change in (frozen, tangential, both)]
    return RadialClamp([5.0, 4.9, 4.8, 4.7], *forms)


def halting(as_trained: float, as_last: float | None = None) -> Halting:
    """Of four loops, with these mean loops on the report slice."""
    readings = [
        Halt(0.5, loops, 1.008, loops, 1.009, [0.7, 0.1, 0.1, 0.1])
        for loops in (as_trained, as_trained if as_last is None else as_last)
    ]
    policies = {"margin": readings[0], "state-change": dataclasses.replace(readings[0], tau=-0.03, loops=1.5)}
    skipped = {
        name: Skipped(loops, [0.7, 0.1, 0.1, 0.1], 1.002, 3000.0, 4.0 / loops)
        for name, loops in ((NO_POLICY, 4.0), ("margin", as_trained), ("state-change", 1.6))
    }
    return Halting(1.01, 8, 1024, 8, 1024, *readings, exit_gap=0.02, policies=policies, skipped=skipped)


def measurements(**changes) -> Measurements:
    """Those of a model whose readouts are blind and whose scale is free and grows; `changes` replace fields."""
    mean = [10.0, 20.0, 30.0, 40.0, 80.0]
    whole = [0.02, 0.01, 0.005, 1e-8]
    update = [after - before for before, after in pairwise(mean)]
    blind = Measurements(
        n_loops=4,
        weights=(0.25,) * 4,
        penalty=0.0,
        norms=Norms(mean, [[value] * 9 for value in mean], mean, [1.0, *mean[:-1]], [10.0, 2.0, 1.5, 1.3, 2.0]),
        updates=Updates(*[update] * 8),
        radial=RadialFractions([1e-8] * 4, [1e-12] * 4, [1e-12] * 4, whole, whole),
        clamp=clamp(0.001),
        alpha=AlphaSweep([0.1, 1, 10], [[5.0, 5.0001, 5.0]] * 4),
        response=[0.9, 0.9, 0.9],
        depth=Depth([5.0, 4.9, 4.8, 4.7, 4.9], [148.0, 134.0, 121.0, 110.0, 134.0], [1.0] * 5, [5.0, 4.9, 4.8, 4.7]),
        halting=halting(1.0),
    )
    return dataclasses.replace(blind, **changes)
