"""What the loss of a model controls, and one sentence of advice: judged from the measurements alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from looped.diagnose.depth import Depth
from looped.diagnose.dynamics import Norms, Updates
from looped.diagnose.halting import Halt, Halting
from looped.diagnose.interventions import AlphaSweep, RadialClamp
from looped.diagnose.radial import RadialFractions


@dataclass(frozen=True)
class Thresholds:
    """What decides an answer. A readout is blind to the scale if it is below both of the first two."""

    blind_range: float = 0.01  # nats, by which the cross-entropy moves as alpha goes from 0.1 to 10
    blind_fraction: float = 1e-4  # radial, of the immediate gradient; random directions of 128 channels have 0.07
    passed_on: float = 0.01  # scale response above which the next loop still sees the scale
    used: float = 0.01  # nats: the radial clamp changes the cross-entropy by at least this where loops use the scale
    growth: float = 1.5  # a mean norm that is multiplied by more than this grows
    depth_change: float = 0.01  # nats: loops beyond K that change the cross-entropy by more than this matter


THRESHOLDS = Thresholds()

Control = Literal["free", "penalised", "removed", "visible"]
CONTROLS: dict[Control, str] = {
    "free": "nothing holds the size",
    "penalised": "the penalty holds the size",
    "removed": "the size is removed between loops",
    "visible": "the loss sees the size",
}


@dataclass(frozen=True)
class Measurements:
    """Everything that is measured of one model.

    weights: [K], of each loop's cross-entropy in the training loss. response: [K-1], from `scale_response`.
    """

    n_loops: int
    weights: tuple[float, ...]
    penalty: float
    norms: Norms
    updates: Updates
    radial: RadialFractions
    clamp: RadialClamp
    alpha: AlphaSweep
    response: list[float]
    depth: Depth
    halting: Halting

    @property
    def loops_read(self) -> list[int]:
        """The loops (0-based) whose readout is part of the training loss."""
        return [loop for loop, weight in enumerate(self.weights) if weight > 0]

    @property
    def growth(self) -> float:
        """The mean norm after the last trained loop, divided by that after the first."""
        return self.norms.mean[self.n_loops - 1] / self.norms.mean[0]

    @property
    def passes_scale_on(self) -> bool:
        """Whether some loop's result depends on the scale of the state before it. False for a single loop."""
        return max(self.response, default=0.0) > THRESHOLDS.passed_on

    @property
    def suggested_penalty(self) -> str:
        """What to train with where the state grows, in words."""
        return "a norm penalty" if self.penalty == 0 else "a larger norm penalty"

    @property
    def halting_readings(self) -> dict[str, Halt]:
        """Calibrated halting by how the loops are read: in one way, or in two where training reads them differently."""
        if not self.depth.two_readings:
            return {"as trained": self.halting.as_trained}
        return {"as trained": self.halting.as_trained, "as the last": self.halting.as_last}


@dataclass(frozen=True)
class Verdict:
    """control: what holds the scale. blind: [K], which readouts cannot see it. advice: one sentence."""

    control: Control
    blind: list[bool]
    advice: str


def judge(measured: Measurements) -> Verdict:
    """The verdict on one model."""
    blind = [
        ce_range < THRESHOLDS.blind_range and fraction < THRESHOLDS.blind_fraction
        for ce_range, fraction in zip(measured.alpha.ranges, measured.radial.immediate, strict=True)
    ]
    control = _control(measured, blind)
    return Verdict(control, blind, _advice(measured, blind, control))


def _control(measured: Measurements, blind: Sequence[bool]) -> Control:
    if not all(blind[loop] for loop in measured.loops_read):
        return "visible"
    if measured.penalty > 0 and measured.radial.training[measured.loops_read[-1]] > THRESHOLDS.blind_fraction:
        return "penalised"
    if measured.n_loops > 1 and not measured.passes_scale_on:
        return "removed"
    return "free"


def _advice(measured: Measurements, blind: Sequence[bool], control: Control) -> str:
    grows = measured.growth > THRESHOLDS.growth
    growth = f"grows {measured.growth:.2f} times over the {measured.n_loops} loops"
    if control == "free":
        so_far = f"and it {growth}" if grows else "though it hardly grows yet"
        return f"Train with {measured.suggested_penalty}: nothing in training limits how large the state is, {so_far}."
    if control == "penalised":
        return "Keep the norm penalty: it alone holds the size of the state, which the cross-entropy cannot see."
    if control == "removed":
        within = measured.norms.within[0]
        if within > THRESHOLDS.growth:
            return (
                f"Consider {measured.suggested_penalty}: size does not build up from loop to loop, but nothing limits "
                f"it within one (the first makes the state {within:.3g} times as large)."
            )
        return "Nothing to change: the size of the state is removed between loops, so it does not build up."
    seen = [loop for loop in measured.loops_read if not blind[loop]]
    where = "" if len(seen) == len(measured.loops_read) else f" at {state_names(seen)}"
    if grows:
        return f"Consider {measured.suggested_penalty}: the loss sees how large the state is{where}, yet it {growth}."
    return f"Nothing to change: the loss sees how large the state is{where}, and holds it."


def state_names(loops: Sequence[int]) -> str:
    """H_1, H_2 and H_4 for the 0-based loops 0, 1 and 3; H_1..H_4 for three or more in a row."""
    names = [f"H_{loop + 1}" for loop in loops]
    if len(loops) > 2 and loops[-1] - loops[0] == len(loops) - 1:
        return f"{names[0]}..{names[-1]}"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
