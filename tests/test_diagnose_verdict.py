"""The verdict of measurements that are made up: every judgement on both sides of its threshold."""

import dataclasses

import pytest
from diagnosed_models import clamp, halting, measurements

from looped.diagnose.findings import Finding, findings
from looped.diagnose.interventions import AlphaSweep, Clamped, RadialClamp
from looped.diagnose.radial import RadialFractions
from looped.diagnose.verdict import Measurements, judge

SEEN = AlphaSweep([0.1, 1, 10], [[5.0, 4.5, 9.0]] * 4)
RADIAL = RadialFractions([0.2] * 4, [0.2] * 4, [float("nan")] * 4, [0.2] * 4, [0.2] * 4)

VISIBILITY = "Can the loss see how large the state is?"
PENALTY = "Does a norm penalty hold the size?"
PASSED_ON = "Does a larger state make the next loop's result larger?"
GROWTH = "Does the state grow from loop to loop?"
GROWTH_WITHIN = "Does the state grow within one loop?"
USE = "Do the loops make use of the size?"
DEPTH = "Do more loops than were trained help?"
HALTING = "Can tokens stop early?"


def finding(measured: Measurements, question: str) -> Finding:
    (found,) = (each for each in findings(measured) if each.question == question)
    return found


def norms(**changes):
    return dataclasses.replace(measurements().norms, **changes)


def radial(**changes):
    return dataclasses.replace(measurements().radial, **changes)


def sweep(ce_range: float) -> AlphaSweep:
    return AlphaSweep([0.1, 1, 10], [[5.0, 5.0 + ce_range, 5.0]] * 4)


def final_only() -> Measurements:
    """Blind at the last loop alone."""
    alpha = AlphaSweep([0.1, 1, 10], [*SEEN.ce[:3], measurements().alpha.ce[3]])
    return measurements(alpha=alpha, radial=dataclasses.replace(RADIAL, immediate=[0.2, 0.2, 0.2, 1e-8]))


def test_what_is_asked_of_every_model_in_this_order():
    questions = [VISIBILITY, PENALTY, PASSED_ON, GROWTH, USE, DEPTH, HALTING]
    assert [found.question for found in findings(measurements())] == questions
    removed = findings(measurements(response=[0.0] * 3))
    assert [found.question for found in removed] == [*questions[:4], GROWTH_WITHIN, *questions[4:]]
    for found in (*removed, *findings(final_only())):
        assert all(dataclasses.astuple(found))


def test_a_blind_readout_leaves_the_scale_free():
    verdict = judge(measurements())
    assert verdict.control == "free"
    assert verdict.blind == [True] * 4
    assert verdict.advice == (
        "Train with a norm penalty: nothing in training limits how large the state is, "
        "and it grows 4.00 times over the 4 loops."
    )
    actions = {found.question: found.action for found in findings(measurements())}
    assert "readout raw), or all but the last (readout final-only)" in actions[VISIBILITY]
    assert "add a penalty of 0.01" in actions[PENALTY]
    assert "normalise the state between loops" in actions[PASSED_ON]


def test_a_raw_readout_controls_the_scale():
    measured = measurements(alpha=SEEN, radial=RADIAL)
    assert judge(measured).control == "visible"
    assert judge(measured).blind == [False] * 4
    assert finding(measured, VISIBILITY) == Finding(
        VISIBILITY,
        "Yes",
        "H_1..H_4 scaled by 0.1 to 10: the cross-entropy moves by 4.5 nats, "
        "the radial fraction of its gradient is 0.2.",
        "no if below both 0.01 nats and 0.0001",
        "Nothing.",
    )
    still = measurements(alpha=SEEN, radial=RADIAL, norms=norms(mean=[10.0] * 5))
    assert judge(still).advice == "Nothing to change: the loss sees how large the state is, and holds it."


def test_a_scale_that_is_seen_and_grows_all_the_same():
    for penalty, remedy in ((0.0, "a norm penalty"), (0.01, "a larger norm penalty")):
        measured = measurements(alpha=SEEN, radial=RADIAL, penalty=penalty)
        expected = f"Consider {remedy}: the loss sees how large the state is, yet it grows 4.00 times over the 4 loops."
        assert judge(measured).advice == expected
        assert finding(measured, GROWTH).action == f"Train with {remedy}."


@pytest.mark.parametrize(
    ("ce_range", "fraction", "blind"),
    [(0.0099, 0.9e-4, True), (0.0101, 0.9e-4, False), (0.0099, 1.1e-4, False), (0.0101, 1.1e-4, False)],
)
def test_a_readout_is_blind_only_if_both_signs_say_so(ce_range, fraction, blind):
    measured = measurements(alpha=sweep(ce_range), radial=radial(immediate=[fraction] * 4))
    assert judge(measured).blind == [blind] * 4
    assert judge(measured).control == ("free" if blind else "visible")
    assert finding(measured, VISIBILITY).answer == ("No" if blind else "Yes")


def test_final_only_is_blind_at_the_last_loop_and_that_does_not_matter():
    verdict = judge(final_only())
    assert verdict.control == "visible"
    assert verdict.blind == [False, False, False, True]
    found = finding(final_only(), VISIBILITY)
    assert (found.answer, found.action) == ("At H_1..H_3, not at H_4", "Nothing.")
    assert found.number.startswith("H_1..H_3 scaled by 0.1 to 10: the cross-entropy moves by 4.5 nats")
    assert "H_4 scaled by 0.1 to 10: the cross-entropy moves by 0.0001 nats" in found.number
    assert "how large the state is at H_1..H_3, yet" in verdict.advice


def test_what_is_not_trained_on_does_not_count():
    """Terminal supervision through an RMSNorm at K alone, with earlier readouts that would see the scale."""
    alpha = AlphaSweep([0.1, 1, 10], [*SEEN.ce[:3], measurements().alpha.ce[3]])
    measured = measurements(weights=(0.0, 0.0, 0.0, 1.0), alpha=alpha)
    assert judge(measured).control == "free"
    found = finding(measured, VISIBILITY)
    assert found.answer == "No"
    assert found.number.endswith("Training does not read H_1..H_3.")
    assert "final-only" not in found.action  # which is about the loops that are not read


@pytest.mark.parametrize(("fraction", "holds"), [(1.1e-4, True), (0.9e-4, False)])
def test_the_penalty_holds_what_the_readout_does_not_see(fraction, holds):
    measured = measurements(penalty=0.02, radial=radial(training=[0.3, 0.3, 0.3, fraction]))
    verdict, found = judge(measured), finding(measured, PENALTY)
    assert verdict.control == ("penalised" if holds else "free")
    assert found.answer == ("Yes" if holds else "No, it is too weak")
    assert f"the penalty of 0.02 the gradient at H_4 has a radial fraction of {fraction:.2g} (" in found.number
    assert "to 0.3 over the loops; 1e-08 to 0.02 without" in found.number
    assert verdict.advice.startswith("Keep the norm penalty" if holds else "Train with a larger norm penalty")
    assert found.action.startswith("Keep it" if holds else "The simplest way to hold it: raise the penalty")


def test_the_penalty_counts_at_the_last_loop_that_is_read():
    whole = radial(training=[0.3, 1e-8, 0.3, 0.3])
    assert judge(measurements(weights=(0.5, 0.5, 0.0, 0.0), penalty=0.01, radial=whole)).control == "free"


def test_what_is_said_of_a_penalty():
    assert finding(measurements(), PENALTY).answer == "No, there is none"
    assert judge(measurements(radial=radial(training=[0.3] * 4))).control == "free"
    seen = finding(measurements(alpha=SEEN, radial=RADIAL, penalty=0.01), PENALTY)
    assert (seen.answer, seen.action) == ("In part: the loss sees the size too", "Nothing.")


@pytest.mark.parametrize(("response", "loops"), [(0.5, 1), (0.9, 7), (0.02, 1)])
def test_a_decay_makes_the_memory_of_the_scale_finite(response, loops):
    number = finding(measurements(response=[0.0, response, 0.0]), PASSED_ON).number
    assert number.endswith(f"at most half is left after {loops} loops.")


@pytest.mark.parametrize("response", [1.0, 1.2, 0.0])
def test_a_scale_that_is_passed_on_whole_or_not_at_all_does_not_fade(response):
    assert "half is left" not in finding(measurements(response=[response] * 3), PASSED_ON).number


@pytest.mark.parametrize(("response", "passed_on"), [(0.011, True), (0.009, False)])
def test_a_recurrence_passes_the_scale_on_or_removes_it(response, passed_on):
    measured = measurements(response=[0.0, response, 0.0])
    assert judge(measured).control == ("free" if passed_on else "removed")
    found = finding(measured, PASSED_ON)
    assert found.answer == ("Yes, size is passed on" if passed_on else "No, size is removed between loops")
    assert f"by 0 to {response} times its size" in found.number


@pytest.mark.parametrize(("times", "grows"), [(1.49, False), (1.51, True)])
def test_a_scale_that_is_removed_between_loops_may_grow_within_one(times, grows):
    entered, within = [9.0, *[8.0] * 4], [times, *[5.0] * 4]
    measured = measurements(response=[0.0] * 3, norms=norms(mean=[10.0] * 5, entered=entered, within=within))
    found = finding(measured, GROWTH_WITHIN)
    assert found.answer == f"{'Yes' if grows else 'Hardly'}, {times} times"
    assert found.number == "Loop 1 takes the mean norm from 9 to 10, loop 2 from 8 to 10."
    assert (found.action == "Nothing.") != grows
    start = "Consider a norm penalty: size does not build up" if grows else "Nothing to change: the size of the state"
    assert judge(measured).advice.startswith(start)


@pytest.mark.parametrize(("times", "grows"), [(1.49, False), (1.51, True)])
def test_growth_over_the_trained_loops(times, grows):
    measured = measurements(norms=norms(mean=[10.0, 99.0, 99.0, 10.0 * times, 800.0]))
    found = finding(measured, GROWTH)
    assert found.answer == f"{'Yes' if grows else 'Hardly'}, {times} times"
    assert (
        found.number
        == f"Mean norm 10 after loop 1, {10 * times} after loop 4, the last one trained, 800 after 5 loops."
    )
    assert found.action.startswith("Hold it in one of" if grows else "Hold it all the same")
    assert (f"it grows {times} times over the 4 loops" in judge(measured).advice) == grows
    assert ("it hardly grows yet" in judge(measured).advice) != grows


def test_what_to_do_about_growth_that_is_held():
    whole = radial(training=[0.3] * 4)
    assert finding(measurements(penalty=0.01, radial=whole), GROWTH).action == "Nothing while the penalty stays."
    assert finding(measurements(response=[0.0] * 3), GROWTH).action == "Nothing: the next loop does not see it."
    level = norms(mean=[10.0] * 5)
    assert finding(measurements(penalty=0.01, radial=whole, norms=level), GROWTH).action == "Nothing."


@pytest.mark.parametrize(("change", "used"), [(0.0099, False), (0.0101, True), (-0.0099, False), (-0.0101, True)])
def test_the_loops_use_the_scale_if_the_clamp_changes_the_loss(change, used):
    measured = measurements(clamp=clamp(change, frozen=0.5, tangential=0.5))
    found = finding(measured, USE)
    assert found.answer == ("Yes" if used else "Hardly")
    assert (found.action == "Nothing.") != used
    assert f"at K = 4 changes by {change:+.4f} nats (standard error 0.0001)" in found.number


@pytest.mark.parametrize(
    ("change", "answer", "action"),
    [
        (0.0101, "No, they cost", "Do not run more than 4"),
        (0.0099, "No difference", "Do not spend more than 4"),
        (-0.0099, "No difference", "Do not spend more than 4"),
        (-0.0101, "Yes", "Try up to 5"),
    ],
)
def test_loops_beyond_the_trained_ones(change, answer, action):
    ce = [5.0, 4.6, 4.8, 4.7, 4.7 + change]
    measured = measurements(depth=dataclasses.replace(measurements().depth, ce=ce, as_trained=ce[:4]))
    found = finding(measured, DEPTH)
    assert found.answer == answer
    assert found.action.startswith(action)
    assert found.number == (
        f"Cross-entropy 4.700 at K = 4, {change:+.3f} nats at 5 loops. Of the trained loops the best is K = 2 (4.600)."
    )
    assert "best" not in finding(measurements(), DEPTH).number  # where it is the last


def test_tokens_stop_early_where_a_threshold_was_found():
    measured = measurements(halting=halting(2.5))
    found = finding(measured, HALTING)
    assert found.answer == "Yes, after 2.50 of 4 loops"
    assert found.number == "2.50 loops a token, at 1.0090 times the perplexity of 4 loops."
    assert "at most 1% of perplexity" in found.threshold
    never = dataclasses.replace(measured.halting.as_trained, tau=None, loops=4.0)
    found = finding(measurements(halting=dataclasses.replace(measured.halting, as_trained=never)), HALTING)
    assert (found.answer, found.action) == ("No, all need 4 loops", "Nothing.")


def test_two_readings_are_both_told():
    two = dataclasses.replace(measurements().depth, as_trained=[4.8, 4.75, 4.72, 4.7])
    measured = measurements(depth=two, halting=halting(1.5, 2.5))
    told = "At K = 1 to 3 it is 4.8 to 5 through the last loop's norm, 4.72 to 4.8 without it, as training read"
    assert told in finding(measured, DEPTH).number
    assert finding(measured, HALTING).number.startswith("1.50 loops")
    assert "Each loop read as the last: 2.50 loops" in finding(measured, HALTING).number
    assert list(measured.halting_readings) == ["as trained", "as the last"]
    assert "as the last" not in finding(measurements(), HALTING).number
    assert list(measurements().halting_readings) == ["as trained"]


def test_a_single_loop_has_no_recurrence():
    single = measurements(
        n_loops=1,
        weights=(1.0,),
        radial=RadialFractions([1e-8], [1e-12], [1e-12], [1e-8], [1e-8]),
        alpha=AlphaSweep([0.1, 1, 10], measurements().alpha.ce[:1]),
        clamp=RadialClamp([5.0], *[Clamped([0.0], [0.0])] * 3),
        response=[],
    )
    assert judge(single).control == "free"
    assert [found.question for found in findings(single)] == [VISIBILITY, PENALTY, GROWTH, DEPTH]
