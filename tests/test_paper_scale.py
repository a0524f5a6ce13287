import json
from pathlib import Path

import pytest

from train.config import complete, preset_config
from train.paper.conditions import CONDITIONS
from train.paper.paper_scale import GPUS, MFU, PAPER_PRESETS, RUNS, paper_scale, predict

COUNTED = Path(__file__).parents[1] / "bench" / "results" / "gpu_static.json"


def test_a_step_as_it_was_counted_call_by_call():
    """On stand-in tensors, with every live buffer, for one GPU step of the fused trainer."""
    step = next(one for one in json.loads(COUNTED.read_text())["steps"] if one["fused"] and one["gpu"] == "H100")
    config, one = complete(preset_config("paper-129m")), predict("paper-129m")
    assert one.bytes / 2**20 == pytest.approx(step["peak_MiB"], rel=0.1)
    assert one.flops * config.batch_size * config.seq_len / one.tokens == pytest.approx(
        step["model_teraflops"] * 1e12, rel=1e-6
    )


@pytest.mark.parametrize(("preset", "parameters"), [("paper-44m", 43_934_208), ("paper-129m", 128_822_016)])
def test_prediction(preset, parameters):
    one = predict(preset)
    assert one.parameters == parameters
    assert one.tokens == 4 * 2 * 2 * 103_227_021  # epochs, overlapping windows, words and gaps
    for gpu, rate in GPUS.items():
        for hours, share in zip(one.hours[gpu], reversed(MFU[gpu]), strict=True):
            assert hours * 3600 * rate * share == pytest.approx(one.flops)


def test_terminal_supervision_reads_out_once():
    """Three readouts fewer, forward and backward, of 2 V d FLOPs a token each."""
    per_loop, terminal = predict("paper-129m"), predict("paper-129m", "terminal")
    assert per_loop.flops - terminal.flops == 3 * 3 * 2 * 20_000 * 768 * per_loop.tokens


def test_runs_are_those_of_the_sweep():
    placed = [values["supervision"] for values in CONDITIONS.values()]
    assert {kind: 3 * placed.count(kind) for kind in RUNS} == RUNS


def test_the_range_is_what_was_predicted_for_gpus():
    steps = json.loads(COUNTED.read_text())["steps"]
    for gpu, (low, high) in MFU.items():
        plain, fused = (
            next(one["predicted_mfu"] for one in steps if one["gpu"] == gpu and one["fused"] is kind)
            for kind in (False, True)
        )
        assert (low, high) == pytest.approx((plain, fused), abs=0.02)


def test_only_lengths_in_epochs():
    with pytest.raises(ValueError, match=r"epochs\. Got preset='demo'"):
        predict("demo")


def test_section():
    text = paper_scale()
    for preset in PAPER_PRESETS:
        assert f"train.paper sweep --preset {preset} " in text
        for supervision in RUNS:
            assert f"| {preset} | {supervision} | {predict(preset).parameters:,} |" in text
        assert f"| {preset} | all 27 runs |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "*predicted*" in rows[0]
