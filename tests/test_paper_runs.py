"""How far a run of a sweep got, by what it has left."""

import pytest

from train.metrics import MetricsLog
from train.paper.runs import Run, read_run

ROW = {"step": 3, "tokens": 90, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 30.0, "ce": [1.0],
       "state_norm": [1.0], "radial_fraction": [0.0]}  # fmt: skip


@pytest.mark.parametrize("last", [{"loss": 1.0}, {"loss": None, "bad_steps": 7}, {"loss": None}])
def test_a_run_has_diverged_if_it_ended_so_and_not_if_it_was_killed(tmp_path, last):
    run = Run("per-loop-raw", 7, tmp_path)
    assert run.status == "absent"
    MetricsLog(tmp_path / "metrics.jsonl").append(ROW | last)
    (tmp_path / "config.json").write_text("{")  # it has no part in that
    assert run.status == "unfinished"
    (tmp_path / "checkpoint").mkdir()
    assert run.status == "checkpoint"
    assert read_run(run).minutes == 3 / 60
    (tmp_path / "diverged.json").touch()
    assert run.status == "diverged"
    assert read_run(run).minutes == 3 / 60


@pytest.mark.parametrize("rate", [None, 0.0])
def test_steps_of_no_known_speed_take_no_time(tmp_path, rate):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(ROW | {"loss": 1.0})
    log.append(ROW | {"loss": 1.0, "step": 6, "tokens": 180, "tokens_per_second": rate})
    assert read_run(Run("per-loop-raw", 7, tmp_path)).minutes == 3 / 60
