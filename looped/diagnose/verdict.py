"""One paragraph on what a loss controls, from the numbers alone, with the thresholds that decide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from looped.diagnose.depth import Depth
from looped.diagnose.dynamics import Norms, Updates
from looped.diagnose.halting import Halt, Halting
from looped.diagnose.interventions import AlphaSweep, RadialClamp
from looped.diagnose.radial import RadialFractions

# A readout is blind to the scale if both hold; a model that grows fast enough has "run away".
BLIND_RANGE = 0.01  # nats, over alpha in [0.1, 10]
BLIND_FRACTION = 1e-4  # mean radial fraction of the immediate gradient; two random directions of 128 channels have 0.07
CARRIED = 0.01  # scale response above which the next loop still sees the scale
UNUSED = 0.01  # nats, change of the cross-entropy under the radial clamp below which the scale is not used
GROWTH = 1.5  # of the mean norm over the trained loops, above which it grows
WORSE = 0.01  # nats, above the cross-entropy at K

THRESHOLDS = (
    "A readout counts as blind where scaling its state by 0.1 to 10 moves the cross-entropy by less than "
    f"{BLIND_RANGE} nats and the mean radial fraction of the immediate gradient is below {BLIND_FRACTION:g}; the scale "
    "as held by the penalty where that lifts the fraction of the training gradient above this at the last loop read; "
    f"as fed back where the next loop's response to twice the state is above {CARRIED}; as hardly used where the "
    f"radial clamp in both its parts moves the cross-entropy at K by less than {UNUSED} nats; as growing where the "
    f"mean norm after K loops is over {GROWTH} times that after one; depth beyond K as changing the cross-entropy "
    f"above {WORSE} nats."
)

Control = Literal["free", "penalised", "removed", "visible"]
CONTROLS: dict[Control, str] = {
    "free": "blind, scale free",
    "penalised": "blind, held by the penalty",
    "removed": "blind, scale not fed back",
    "visible": "scale visible",
}


@dataclass(frozen=True)
class Measurements:
    """Everything that is measured of one model. response: of `scale_response`, [K-1]."""

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


@dataclass(frozen=True)
class Verdict:
    """control: what holds the scale. blind: [K], which readouts cannot see it. text: the paragraph."""

    control: Control
    blind: list[bool]
    text: str


def judge(measured: Measurements) -> Verdict:
    """The verdict on one model."""
    blind = [
        spread < BLIND_RANGE and fraction < BLIND_FRACTION
        for spread, fraction in zip(measured.alpha.ranges, measured.radial.immediate, strict=True)
    ]
    read = [loop for loop, weight in enumerate(measured.weights) if weight > 0]
    if not all(blind[loop] for loop in read):
        control: Control = "visible"
    elif measured.penalty > 0 and measured.radial.training[read[-1]] > BLIND_FRACTION:
        control = "penalised"
    elif measured.response and max(measured.response) <= CARRIED:
        control = "removed"
    else:
        control = "free"
    sentences = (
        _visibility(measured, blind, read), _gradient(measured), _growth(measured), _use(measured), _depth(measured),
        _halting(measured), _advice(measured, control),
    )  # fmt: skip
    return Verdict(control, blind, " ".join(sentence for sentence in sentences if sentence))


def _visibility(measured: Measurements, blind: list[bool], read: list[int]) -> str:
    ranges, fractions = measured.alpha.ranges, measured.radial.immediate
    parts = []
    for sees, loops in (
        ("cannot see the scale of", [loop for loop in read if blind[loop]]),
        ("sees the scale of", [loop for loop in read if not blind[loop]]),
    ):
        if loops:
            parts.append(
                f"{sees} {_states(loops)} (scaled by 0.1 to 10 before the readout, the cross-entropy moves by "
                f"{_span([ranges[loop] for loop in loops])} nats; radial fraction of the immediate gradient "
                f"{_span([fractions[loop] for loop in loops])})"
            )
    unread = [loop for loop in range(measured.n_loops) if loop not in read]
    rest = f" Training does not read {_states(unread)}." if unread else ""
    return f"The cross-entropy controls the direction of {_states(read)}; it {' and '.join(parts)}.{rest}"


def _gradient(measured: Measurements) -> str:
    text = f"With what comes back from later loops, its gradient is radial to {_span(measured.radial.total)}"
    if measured.penalty > 0:
        return f"{text}; with the penalty of {measured.penalty:g}, to {_span(measured.radial.training)}."
    return f"{text}."


def _growth(measured: Measurements) -> str:
    mean, updates, last = measured.norms.mean, measured.updates, measured.n_loops - 1
    grows = "grows" if _grows(measured) else "hardly grows"
    return (
        f"The mean norm {grows}, from ||H_1|| = {mean[0]:.3g} to ||H_{last + 1}|| = {mean[last]:.3g} "
        f"({mean[last] / mean[0]:.2f} times), and is {mean[-1]:.3g} after {len(mean)} loops. The update after loop "
        f"{last + 1} adds {updates.increment[last]:.3g} to the scale (predicted to first order "
        f"{updates.first_order[last]:.3g}, to second {updates.second_order[last]:.3g}) and turns the direction by "
        f"{updates.angular[last]:.3g}, that after loop 1 by {updates.angular[0]:.3g}."
    )


def _grows(measured: Measurements) -> bool:
    return measured.norms.mean[measured.n_loops - 1] > GROWTH * measured.norms.mean[0]


def _use(measured: Measurements) -> str:
    if measured.n_loops == 1:
        return ""
    fed = "is fed back" if max(measured.response) > CARRIED else "is not fed back"
    used = "the loops hardly use it" if abs(measured.clamp.change) < UNUSED else "the loops do use it"
    clamp = measured.clamp
    return (
        f"The scale {fed} (response of the next loop to twice the state: {_span(measured.response)}); freezing it "
        "after loop 1 and taking the radial part from every later update changes the cross-entropy at "
        f"K = {measured.n_loops} by {clamp.change:+.4f} nats (standard error {clamp.both.error[-1]:.4f}; freezing "
        f"alone {clamp.frozen.change[-1]:+.4f}, taking the radial part alone {clamp.tangential.change[-1]:+.4f}): "
        f"{used}."
    )


def _depth(measured: Measurements) -> str:
    ce, n_loops = measured.depth.ce, measured.n_loops
    best = min(range(n_loops), key=ce.__getitem__)
    text = f"The cross-entropy is {ce[n_loops - 1]:.3f} at K = {n_loops}"
    if best != n_loops - 1:
        text += f", and least at K = {best + 1} ({ce[best]:.3f})"
    if measured.depth.two_readings:
        before = f"K = 1 to {n_loops - 1}" if n_loops > 2 else "K = 1"
        text += (
            f"; at {before} it is {_span(ce[: n_loops - 1], 3)} through the last loop's norm and "
            f"{_span(measured.depth.as_trained[:-1], 3)} without it, as training read those loops"
        )
    beyond = ce[-1] - ce[n_loops - 1]
    if abs(beyond) <= WORSE:
        return f"{text}; {len(ce)} loops change it by no more than {WORSE}."
    return f"{text}; going on to {len(ce)} loops {'costs' if beyond > 0 else 'gains'} {abs(beyond):.3f} nats."


def _halting(measured: Measurements) -> str:
    if measured.n_loops == 1:
        return ""
    halting = measured.halting

    def outcome(halt: Halt) -> str:
        return f"{halt.loops:.2f} loops (perplexity there {halt.ratio:.4f} times that at K = {measured.n_loops})"

    other = f"; each loop read as the last, {outcome(halting.as_last)}" if measured.depth.two_readings else ""
    return (
        f"Stopped at the first loop whose margin is large enough, calibrated on half of the windows to cost at most "
        f"{halting.tolerance - 1:.0%} of perplexity, a token of the other half takes {outcome(halting.as_trained)}"
        f"{other}."
    )


def _advice(measured: Measurements, control: Control) -> str:
    if control == "free":
        urgency = "" if _grows(measured) else " It does not grow much yet, but nothing keeps it from doing so."
        return (
            f"So the scale is free: no readout that is trained on sees it.{urgency} To change: add a norm penalty "
            "(0.01 on the mean of H_k^2), read the loops before the last without a norm (final-only) or all of them "
            "(raw), or normalise the state between loops."
        )
    if control == "penalised":
        return (
            "So the cross-entropy is blind, and the penalty alone holds the scale: keep it, or read the loops before "
            "the last without a norm."
        )
    if control == "removed":
        return _removed(measured.norms)
    grown = " It grows all the same; a norm penalty would hold it." if _grows(measured) else ""
    return f"So the cross-entropy itself holds the scale, where its readout sees it: nothing to change.{grown}"


def _removed(norms: Norms) -> str:
    text = (
        "So the readout is blind, and the recurrence removes the scale between loops, so that it does not build up "
        f"from one to the next. Within a loop it is free: the first takes ||H_0|| = {norms.entered[0]:.3g} to "
        f"||H_1|| = {norms.mean[0]:.3g} ({norms.within[0]:.3g} times, token by token)"
    )
    if len(norms.within) > 1:
        text += f", the second {norms.entered[1]:.3g} to {norms.mean[1]:.3g}"
    if norms.within[0] <= GROWTH:
        return f"{text}: nothing to change."
    return f"{text}. Nothing that is trained on sees that growth; a norm penalty would hold it."


def _states(loops: Sequence[int]) -> str:
    """H_1, H_2 and H_4 for 0-based loops 0, 1 and 3; H_1..H_4 for a run of three or more."""
    names = [f"H_{loop + 1}" for loop in loops]
    if len(loops) > 2 and loops[-1] - loops[0] == len(loops) - 1:
        return f"{names[0]}..{names[-1]}"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _span(values: Sequence[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}g}", f"{max(values):.{digits}g}"
    return low if low == high else f"{low} to {high}"
