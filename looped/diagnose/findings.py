"""What a verdict rests on, as questions in plain words.

A finding is a question about a model, its answer, the measured number that decides it, the threshold that the number is
compared with, and what to do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from looped.diagnose.halting import Halt
from looped.diagnose.verdict import THRESHOLDS, Control, Measurements, Verdict, judge, state_names

NOTHING = "Nothing."


@dataclass(frozen=True)
class Finding:
    """One question about a model, in plain words. number: what was measured. threshold: what decides the answer."""

    question: str
    answer: str
    number: str
    threshold: str
    action: str


def findings(measured: Measurements) -> list[Finding]:
    """The findings on one model. With a single loop there are none about the next loop and about halting."""
    verdict = judge(measured)
    control, recurs = verdict.control, measured.n_loops > 1
    return [
        _visibility(measured, verdict),
        _penalty(measured, control),
        *([_passing_on(measured, control)] if recurs else []),
        _growth(measured, control),
        *([_growth_within_a_loop(measured)] if control == "removed" else []),
        *([_use(measured)] if recurs else []),
        _depth(measured),
        *([_halting(measured)] if recurs else []),
    ]


def _visibility(measured: Measurements, verdict: Verdict) -> Finding:
    seen = [loop for loop in measured.loops_read if not verdict.blind[loop]]
    unseen = [loop for loop in measured.loops_read if verdict.blind[loop]]
    answer = "No" if not seen else "Yes" if not unseen else f"At {state_names(seen)}, not at {state_names(unseen)}"
    numbers = [
        f"{state_names(loops)} scaled by 0.1 to 10: the cross-entropy moves by "
        f"{_span([measured.alpha.ranges[loop] for loop in loops])} nats, the radial fraction of its gradient is "
        f"{_span([measured.radial.immediate[loop] for loop in loops])}."
        for loops in (seen, unseen)
        if loops
    ]
    unread = [loop for loop in range(measured.n_loops) if loop not in measured.loops_read]
    if unread:
        numbers.append(f"Training does not read {state_names(unread)}.")
    action = NOTHING
    if verdict.control == "free":
        all_but_last = ", or all but the last (readout final-only)" if len(measured.loops_read) > 1 else ""
        action = f"One way to hold it: read the states without a norm (readout raw){all_but_last}."
    elif verdict.control == "penalised":
        action = "Nothing while the penalty stays."
    threshold = f"no if below both {THRESHOLDS.blind_range} nats and {THRESHOLDS.blind_fraction:g}"
    return Finding("Can the loss see how large the state is?", answer, " ".join(numbers), threshold, action)


def _penalty(measured: Measurements, control: Control) -> Finding:
    last_read, whole, training = measured.loops_read[-1], _span(measured.radial.total), measured.radial.training
    if measured.penalty == 0:
        answer = "No, there is none"
        number = (
            "No penalty in the training loss. The cross-entropy's own gradient has a radial fraction of "
            f"{whole} over the loops."
        )
    else:
        answers = {"visible": "In part: the loss sees the size too", "penalised": "Yes"}
        answer = answers.get(control, "No, it is too weak")
        number = (
            f"With the penalty of {measured.penalty:g} the gradient at H_{last_read + 1} has a radial fraction of "
            f"{training[last_read]:.2g} ({_span(training)} over the loops; {whole} without the penalty)."
        )
    action = NOTHING
    if control == "penalised":
        action = "Keep it, or read the loops before the last without a norm (readout final-only)."
    elif control == "free":
        change = "add a penalty of" if measured.penalty == 0 else "raise the penalty, for example to"
        action = f"The simplest way to hold it: {change} 0.01 on the mean of H_k^2."
    threshold = f"yes if a penalty lifts the fraction at H_{last_read + 1} above {THRESHOLDS.blind_fraction:g}"
    return Finding("Does a norm penalty hold the size?", answer, number, threshold, action)


def _passing_on(measured: Measurements, control: Control) -> Finding:
    largest = max(measured.response, default=0.0)
    fades = ""
    # As where a decay multiplies the state: what is left shrinks with every loop.
    if THRESHOLDS.passed_on < largest < 1:
        fades = f" Of a change of size at most half is left after {math.ceil(math.log(0.5) / math.log(largest))} loops."
    return Finding(
        "Does a larger state make the next loop's result larger?",
        "Yes, size is passed on" if measured.passes_scale_on else "No, size is removed between loops",
        f"A state twice as large changes the next loop's result by {_span(measured.response)} times its size.{fades}",
        f"yes if above {THRESHOLDS.passed_on}",
        "Another way to hold it: normalise the state between loops." if control == "free" else NOTHING,
    )


def _growth(measured: Measurements, control: Control) -> Finding:
    norms, n_loops = measured.norms.mean, measured.n_loops
    grows = measured.growth > THRESHOLDS.growth
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
        f"yes if above {THRESHOLDS.growth} times, from loop 1 to {n_loops}",
        action,
    )


def _growth_within_a_loop(measured: Measurements) -> Finding:
    norms = measured.norms
    grows = norms.within[0] > THRESHOLDS.growth
    number = f"Loop 1 takes the mean norm from {norms.entered[0]:.3g} to {norms.mean[0]:.3g}"
    if len(norms.within) > 1:
        number += f", loop 2 from {norms.entered[1]:.3g} to {norms.mean[1]:.3g}"
    return Finding(
        "Does the state grow within one loop?",
        f"Yes, {norms.within[0]:.3g} times" if grows else f"Hardly, {norms.within[0]:.3g} times",
        f"{number}.",
        f"yes if above {THRESHOLDS.growth} times in loop 1, token by token",
        f"Train with {measured.suggested_penalty}: no readout that training uses sees it." if grows else NOTHING,
    )


def _use(measured: Measurements) -> Finding:
    clamp = measured.clamp
    used = abs(clamp.change) >= THRESHOLDS.used
    return Finding(
        "Do the loops make use of the size?",
        "Yes" if used else "Hardly",
        f"The cross-entropy at K = {measured.n_loops} changes by {clamp.change:+.4f} nats (standard error "
        f"{clamp.both.error[-1]:.4f}) when every token keeps the size it has after loop 1 (section 4: both).",
        f"yes if {THRESHOLDS.used} nats or more, up or down",
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
    if abs(change) <= THRESHOLDS.depth_change:
        answer, action = "No difference", f"Do not spend more than {n_loops} loops."
    elif change > 0:
        answer, action = "No, they cost", f"Do not run more than {n_loops} loops."
    else:
        answer, action = "Yes", f"Try up to {len(ce)} loops (section 6)."
    threshold = f"no difference if {THRESHOLDS.depth_change} nats or less"
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
        "Compare fewer loops (section 6) and policies that leave loops out (section 8)." if early else NOTHING,
    )


def _span(values: Sequence[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}g}", f"{max(values):.{digits}g}"
    return low if low == high else f"{low} to {high}"
