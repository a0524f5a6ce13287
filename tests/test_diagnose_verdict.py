import dataclasses

import pytest
from diagnosed_models import clamp, halting, measurements

from looped.diagnose.interventions import AlphaSweep, Clamped, RadialClamp
from looped.diagnose.radial import RadialFractions
from looped.diagnose.verdict import judge

SEEN = AlphaSweep([0.1, 1, 10], [[5.0, 4.5, 9.0]] * 4)
RADIAL = RadialFractions([0.2] * 4, [0.2] * 4, [float("nan")] * 4, [0.2] * 4, [0.2] * 4)


def test_a_blind_readout_leaves_the_scale_free():
    verdict = judge(measurements())
    assert verdict.control == "free"
    assert verdict.blind == [True] * 4
    assert "it cannot see the scale of H_1..H_4 " in verdict.text
    assert "grows, from ||H_1|| = 10 to ||H_4|| = 40 (4.00 times), and is 80 after 5 loops" in verdict.text
    assert (
        "by +0.0010 nats (standard error 0.0001; freezing alone +0.0005, taking the radial part alone +0.0002): "
        "the loops hardly use it"
    ) in verdict.text
    assert "takes 1.00 loops (perplexity there 1.0090 times that at K = 4)." in verdict.text
    assert "4.700 at K = 4; going on to 5 loops costs 0.200 nats" in verdict.text
    assert "add a norm penalty" in verdict.text


def test_a_raw_readout_controls_the_scale():
    verdict = judge(measurements(alpha=SEEN, radial=RADIAL, clamp=clamp(0.5)))
    assert verdict.control == "visible"
    assert verdict.blind == [False] * 4
    assert "it sees the scale of H_1..H_4 (" in verdict.text
    assert "cannot see" not in verdict.text
    assert "taking the radial part alone +0.0002): the loops do use it" in verdict.text
    assert "nothing to change" in verdict.text


@pytest.mark.parametrize(
    ("alpha", "radial"),
    [(SEEN, measurements().radial), (measurements().alpha, RADIAL)],
)
def test_a_readout_is_blind_only_if_both_signs_say_so(alpha, radial):
    assert judge(measurements(alpha=alpha, radial=radial)).blind == [False] * 4


def test_final_only_is_blind_at_the_last_loop_and_that_does_not_matter():
    blind = measurements()
    alpha = AlphaSweep([0.1, 1, 10], [*SEEN.ce[:3], blind.alpha.ce[3]])
    radial = dataclasses.replace(RADIAL, immediate=[0.2, 0.2, 0.2, 1e-8])
    verdict = judge(measurements(alpha=alpha, radial=radial))
    assert verdict.control == "visible"
    assert verdict.blind == [False, False, False, True]
    assert "cannot see the scale of H_4 (" in verdict.text
    assert "sees the scale of H_1..H_3 (" in verdict.text


def test_what_is_not_trained_on_does_not_count():
    """Terminal supervision through an RMSNorm at K alone, with earlier readouts that would see the scale."""
    blind = measurements()
    alpha = AlphaSweep([0.1, 1, 10], [*SEEN.ce[:3], blind.alpha.ce[3]])
    verdict = judge(measurements(weights=(0.0, 0.0, 0.0, 1.0), alpha=alpha))
    assert verdict.control == "free"
    assert "Training does not read H_1..H_3." in verdict.text


def test_the_penalty_holds_what_the_readout_does_not_see():
    whole = dataclasses.replace(measurements().radial, training=[0.3] * 4)
    verdict = judge(measurements(penalty=0.01, radial=whole))
    assert verdict.control == "penalised"
    assert "with the penalty of 0.01, to 0.3" in verdict.text
    assert "keep it" in verdict.text
    assert judge(measurements(penalty=1e-9)).control == "free"  # too small to be seen in the gradient


def test_a_recurrence_that_removes_the_scale_needs_nothing():
    level = dataclasses.replace(measurements().norms, mean=[10.0] * 5, entered=[9.0, *[8.0] * 4], within=[1.1] * 5)
    verdict = judge(measurements(response=[1e-7] * 3, norms=level))
    assert verdict.control == "removed"
    assert "is not fed back" in verdict.text
    assert "removes the scale between loops" in verdict.text
    assert "takes ||H_0|| = 9 to ||H_1|| = 10 (1.1 times, token by token), the second 8 to 10: nothing" in verdict.text


def test_a_scale_that_is_removed_between_loops_is_free_within_one():
    verdict = judge(measurements(response=[1e-7] * 3))
    assert verdict.control == "removed"
    assert "Within a loop it is free: the first takes ||H_0|| = 1 to ||H_1|| = 10 (10 times" in verdict.text
    assert "nothing to change" not in verdict.text
    assert "a norm penalty would hold it" in verdict.text


def test_two_readings_are_both_told():
    two = dataclasses.replace(measurements().depth, as_trained=[4.8, 4.75, 4.72, 4.7])
    text = judge(measurements(depth=two, halting=halting(1.5, 2.5))).text
    assert "at K = 1 to 3 it is 4.8 to 5 through the last loop's norm and 4.72 to 4.8 without it" in text
    assert "takes 1.50 loops" in text
    assert "each loop read as the last, 2.50 loops" in text
    assert "read as the last" not in judge(measurements()).text


def test_a_single_loop_has_no_recurrence():
    one = measurements()
    verdict = judge(
        measurements(
            n_loops=1,
            weights=(1.0,),
            radial=RadialFractions([1e-8], [1e-12], [1e-12], [1e-8], [1e-8]),
            alpha=AlphaSweep([0.1, 1, 10], one.alpha.ce[:1]),
            clamp=RadialClamp([5.0], *[Clamped([0.0], [0.0])] * 3),
            response=[],
        )
    )
    assert verdict.control == "free"
    assert "freezing" not in verdict.text
