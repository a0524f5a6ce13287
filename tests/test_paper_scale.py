import pytest

from train.paper.conditions import CONDITIONS
from train.paper.paper_scale import PAPER_PRESETS, RUNS, estimate, paper_scale


@pytest.mark.parametrize(("preset", "parameters"), [("paper-44m", 43_934_208), ("paper-129m", 128_822_016)])
def test_estimate(preset, parameters):
    run = estimate(preset)
    assert run.parameters == parameters
    assert run.tokens == 4 * 2 * 2 * 103_227_021  # epochs, overlapping windows, words and gaps


def test_terminal_supervision_reads_out_once():
    """Three readouts fewer, forward and backward, of 2 V d FLOPs a token each."""
    per_loop, terminal = estimate("paper-129m"), estimate("paper-129m", "terminal")
    assert per_loop.flops - terminal.flops == 3 * 3 * 2 * 20_000 * 768 * per_loop.tokens


def test_runs_are_those_of_the_sweep():
    placed = [values["supervision"] for values in CONDITIONS.values()]
    assert {kind: 3 * placed.count(kind) for kind in RUNS} == RUNS


def test_only_lengths_in_epochs():
    with pytest.raises(ValueError, match=r"epochs\. Got preset='demo'"):
        estimate("demo")


def test_section():
    text = paper_scale()
    for preset in PAPER_PRESETS:
        assert f"train.paper sweep --preset {preset} " in text
        for supervision in RUNS:
            assert f"| {preset} | {supervision} | {estimate(preset).parameters:,} |" in text
        assert f"| {preset} | all 27 runs |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "*estimated*" in rows[0]
