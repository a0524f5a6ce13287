"""What the loss of a model controls, judged from its measurements alone.

A verdict is one sentence of advice and a short list of findings. A finding is a question, its answer, the measured
number that decides, the threshold that it is compared with, and what to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from looped.diagnose.depth import Depth
from looped.diagnose.dynamics import Norms, Updates
from looped.diagnose.halting import Halt, Halting
from looped.diagnose.interventions import AlphaSweep, RadialClamp
from looped.diagnose.radial import RadialFractions

# A readout is blind to the scale if both of these hold.
BLIND_RANGE = 0.01  # nats: the cross-entropy moves by less as alpha goes from 0.1 to 10
BLIND_FRACTION = 1e-4  # the immediate gradient's mean radial fraction is smaller; random directions of 128 have 0.07
PASSED_ON = 0.01  # scale response above which the next loop still sees the scale
USED = 0.01  # nats: the radial clamp changes the cross-entropy by at least this where the loops use the scale
GROWTH = 1.5  # a mean norm that is multiplied by more than this grows
DEPTH_CHANGE = 0.01  # nats: loops beyond K that change the cross-entropy by more than this matter

THRESHOLDS = {
    "blind_range": BLIND_RANGE,
    "blind_fraction": BLIND_FRACTION,
    "passed_on": PASSED_ON,
    "used": USED,
    "growth": GROWTH,
    "depth_change": DEPTH_CHANGE,
}

NOTHING = "Nothing."

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
class Finding:
    """One question about a model, in plain words. number: what was measured. threshold: what decides the answer."""

    question: str
    answer: str
    number: str
    threshold: str
    action: str


@dataclass(frozen=True)
class Verdict:
    """control: what holds the scale. blind: [K], which readouts cannot see it. advice: one sentence."""

    control: Control
    blind: list[bool]
    advice: str
    findings: list[Finding]


def judge(measured: Measurements) -> Verdict:
    """The verdict on one model. A model with a single loop has no findings about the next loop or about halting."""
    blind = [
        ce_range < BLIND_RANGE and fraction < BLIND_FRACTION
        for ce_range, fraction in zip(measured.alpha.ranges, measured.radial.immediate, strict=True)
    ]
    control = _control(measured, blind)
    findings = [_visibility(measured, blind, control), _penalty(measured, control)]
    if measured.n_loops > 1:
        findings.append(_passing_on(measured, control))
    findings.append(_growth(measured, control))
    if control == "removed":
        findings.append(_growth_within_a_loop(measured))
    if measured.n_loops > 1:
        findings.append(_use(measured))
    findings.append(_depth(measured))
    if measured.n_loops > 1:
        findings.append(_halting(measured))
    return Verdict(control, blind, _advice(measured, blind, control), findings)


def _control(measured: Measurements, blind: Sequence[bool]) -> Control:
    if not all(blind[loop] for loop in measured.loops_read):
        return "visible"
    if _penalty_is_felt(measured):
        return "penalised"
    if measured.n_loops > 1 and not _is_passed_on(measured):
        return "removed"
    return "free"


def _penalty_is_felt(measured: Measurements) -> bool:
    return measured.penalty > 0 and measured.radial.training[measured.loops_read[-1]] > BLIND_FRACTION


def _is_passed_on(measured: Measurements) -> bool:
    return max(measured.response) > PASSED_ON


def _visibility(measured: Measurements, blind: Sequence[bool], control: Control) -> Finding:
    seen = [loop for loop in measured.loops_read if not blind[loop]]
    unseen = [loop for loop in measured.loops_read if blind[loop]]
    answer = "No" if not seen else "Yes" if not unseen else f"At {_states(seen)}, not at {_states(unseen)}"
    numbers = [
        f"{_states(loops)} scaled by 0.1 to 10: the cross-entropy moves by "
        f"{_span([measured.alpha.ranges[loop] for loop in loops])} nats, the radial fraction of its gradient is "
        f"{_span([measured.radial.immediate[loop] for loop in loops])}."
        for loops in (seen, unseen)
        if loops
    ]
    unread = [loop for loop in range(measured.n_loops) if loop not in measured.loops_read]
    if unread:
        numbers.append(f"Training does not read {_states(unread)}.")
    action = NOTHING
    if control == "free":
        all_but_last = ", or all but the last (readout final-only)" if len(measured.loops_read) > 1 else ""
        action = f"One way to hold it: read the states without a norm (readout raw){all_but_last}."
    elif control == "penalised":
        action = "Nothing while the penalty stays."
    threshold = f"no if below both {BLIND_RANGE} nats and {BLIND_FRACTION:g}"
    return Finding("Can the loss see how large the state is?", answer, " ".join(numbers), threshold, action)


def _penalty(measured: Measurements, control: Control) -> Finding:
    last_read = measured.loops_read[-1]
    number = (
        f"No penalty in the training loss. The cross-entropy's own gradient has a radial fraction of "
        f"{_span(measured.radial.total)} over the loops."
    )
    if measured.penalty > 0:
        number = (
            f"With the penalty of {measured.penalty:g} the gradient at H_{last_read + 1} has a radial fraction of "
            f"{measured.radial.training[last_read]:.2g} ({_span(measured.radial.training)} over the loops; "
            f"{_span(measured.radial.total)} without the penalty)."
        )
    if measured.penalty == 0:
        answer = "No, there is none"
    elif control == "visible":
        answer = "In part: the loss sees the size too"
    else:
        answer = "Yes" if control == "penalised" else "No, it is too weak"
    action = NOTHING
    if control == "penalised":
        action = "Keep it, or read the loops before the last without a norm (readout final-only)."
    elif control == "free":
        change = "add a penalty of" if measured.penalty == 0 else "raise the penalty, for example to"
        action = f"The simplest way to hold it: {change} 0.01 on the mean of H_k^2."
    threshold = f"yes if a penalty lifts the fraction at H_{last_read + 1} above {BLIND_FRACTION:g}"
    return Finding("Does a norm penalty hold the size?", answer, number, threshold, action)


def _passing_on(measured: Measurements, control: Control) -> Finding:
    return Finding(
        "Does a larger state make the next loop's result larger?",
        "Yes, size is passed on" if _is_passed_on(measured) else "No, size is removed between loops",
        f"A state twice as large changes the next loop's result by {_span(measured.response)} times its size.",
        f"yes if above {PASSED_ON}",
        "Another way to hold it: normalise the state between loops." if control == "free" else NOTHING,
    )


def _growth(measured: Measurements, control: Control) -> Finding:
    norms, n_loops = measured.norms.mean, measured.n_loops
    grows = measured.growth > GROWTH
    action = NOTHING
    if control == "free":
        action = (
            "Hold it in one of the ways above." if grows else "Hold it all the same: nothing keeps it from growing."
        )
    elif grows:
        action = {
            "penalised": "Nothing while the penalty stays.",
            "removed": "Nothing: the next loop does not see it.",
            "visible": f"Train with {measured.suggested_penalty}.",
        }[control]
    return Finding(
        "Does the state grow from loop to loop?",
        f"Yes, {measured.growth:.2f} times" if grows else f"Hardly, {measured.growth:.2f} times",
        f"Mean norm {norms[0]:.3g} after loop 1, {norms[n_loops - 1]:.3g} after loop {n_loops}, the last one trained, "
        f"{norms[-1]:.3g} after {len(norms)} loops.",
        f"yes if above {GROWTH} times, from loop 1 to {n_loops}",
        action,
    )


def _growth_within_a_loop(measured: Measurements) -> Finding:
    norms = measured.norms
    grows = norms.within[0] > GROWTH
    number = f"Loop 1 takes the mean norm from {norms.entered[0]:.3g} to {norms.mean[0]:.3g}"
    if len(norms.within) > 1:
        number += f", loop 2 from {norms.entered[1]:.3g} to {norms.mean[1]:.3g}"
    return Finding(
        "Does the state grow within one loop?",
        f"Yes, {norms.within[0]:.3g} times" if grows else f"Hardly, {norms.within[0]:.3g} times",
        f"{number}.",
        f"yes if above {GROWTH} times in loop 1, token by token",
        f"Train with {measured.suggested_penalty}: no readout that training uses sees it." if grows else NOTHING,
    )


def _use(measured: Measurements) -> Finding:
    clamp = measured.clamp
    used = abs(clamp.change) >= USED
    return Finding(
        "Do the loops make use of the size?",
        "Yes" if used else "Hardly",
        f"The cross-entropy at K = {measured.n_loops} changes by {clamp.change:+.4f} nats (standard error "
        f"{clamp.both.error[-1]:.4f}) when every token keeps the size it has after loop 1 (section 4: both).",
        f"yes if {USED} nats or more, up or down",
        "Compare the loss before and after any change that holds the size." if used else NOTHING,
    )


def _depth(measured: Measurements) -> Finding:
    depth, n_loops = measured.depth, measured.n_loops
    ce = depth.ce
    best = min(range(n_loops), key=ce.__getitem__)
    change = ce[-1] - ce[n_loops - 1]
    number = f"Cross-entropy {ce[n_loops - 1]:.3f} at K = {n_loops}, {change:+.3f} nats at {len(ce)} loops."
    if best != n_loops - 1:
        number += f" Of the trained loops the best is K = {best + 1} ({ce[best]:.3f})."
    if depth.two_readings:
        before = f"K = 1 to {n_loops - 1}" if n_loops > 2 else "K = 1"
        number += (
            f" At {before} it is {_span(ce[: n_loops - 1], 3)} through the last loop's norm, "
            f"{_span(depth.as_trained[:-1], 3)} without it, as training read those loops."
        )
    if abs(change) <= DEPTH_CHANGE:
        answer, action = "No difference", f"Do not spend more than {n_loops} loops."
    elif change > 0:
        answer, action = "No, they cost", f"Do not run more than {n_loops} loops."
    else:
        answer, action = "Yes", f"Try up to {len(ce)} loops (section 6)."
    threshold = f"no difference if {DEPTH_CHANGE} nats or less"
    return Finding("Do more loops than were trained help?", answer, number, threshold, action)


def _halting(measured: Measurements) -> Finding:
    halting, n_loops = measured.halting, measured.n_loops

    def outcome(halt: Halt) -> str:
        return f"{halt.loops:.2f} loops a token, at {halt.ratio:.4f} times the perplexity of {n_loops} loops"

    halt = halting.as_trained
    number = f"{outcome(halt)}."
    if measured.depth.two_readings:
        number += f" Each loop read as the last: {outcome(halting.as_last)}."
    early = halt.tau is not None
    return Finding(
        "Can tokens stop early?",
        f"Yes, after {halt.loops:.2f} of {n_loops} loops" if early else f"No, all need {n_loops} loops",
        number,
        f"yes if that costs at most {halting.tolerance - 1:.0%} of perplexity on the other half of the text",
        "Compare fewer loops (section 6): halting itself saves no time." if early else NOTHING,
    )


def _advice(measured: Measurements, blind: Sequence[bool], control: Control) -> str:
    grows = measured.growth > GROWTH
    growth = f"grows {measured.growth:.2f} times over the {measured.n_loops} loops"
    if control == "free":
        so_far = f"and it {growth}" if grows else "though it hardly grows yet"
        return f"Train with {measured.suggested_penalty}: nothing in training limits how large the state is, {so_far}."
    if control == "penalised":
        return "Keep the norm penalty: it alone holds the size of the state, which the cross-entropy cannot see."
    if control == "removed":
        within = measured.norms.within[0]
        if within > GROWTH:
            return (
                f"Consider {measured.suggested_penalty}: size does not build up from loop to loop, but nothing limits "
                f"it within one (the first makes the state {within:.3g} times as large)."
            )
        return "Nothing to change: the size of the state is removed between loops, so it does not build up."
    seen = [loop for loop in measured.loops_read if not blind[loop]]
    where = "" if len(seen) == len(measured.loops_read) else f" at {_states(seen)}"
    if grows:
        return f"Consider {measured.suggested_penalty}: the loss sees how large the state is{where}, yet it {growth}."
    return f"Nothing to change: the loss sees how large the state is{where}, and holds it."


def _states(loops: Sequence[int]) -> str:
    """H_1, H_2 and H_4 for the 0-based loops 0, 1 and 3; H_1..H_4 for three or more in a row."""
    names = [f"H_{loop + 1}" for loop in loops]
    if len(loops) > 2 and loops[-1] - loops[0] == len(loops) - 1:
        return f"{names[0]}..{names[-1]}"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _span(values: Sequence[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}g}", f"{max(values):.{digits}g}"
    return low if low == high else f"{low} to {high}"
