"""How far a run of a sweep got, by what it has left."""

import dataclasses

import pytest

from looped.run_directory import write_config
from train.config import complete, model_config, preset_config
from train.metrics import MetricsLog
from train.paper.runs import Run, read_run

ROW = {"step": 3, "tokens": 90, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 30.0, "ce": [1.0],
       "state_norm": [1.0], "radial_fraction": [0.0]}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Run:
    config = complete(preset_config("demo"))
    fields = dataclasses.asdict(config) | {"out": None}
    write_config(tmp_path, fields, model_config(config, 4096))
    return Run("per-loop-raw", 7, tmp_path)


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ({"loss": 1.0}, "unfinished"),
        ({"loss": None, "bad_steps": 5}, "diverged"),
        ({"loss": None, "bad_steps": 4}, "unfinished"),
        ({"loss": None}, "diverged"),  # of a run from before bad steps were counted
    ],
)
def test_a_run_killed_at_a_bad_step_has_not_diverged(run, last, status):
    """It stops itself after max_bad_steps, 5, in a row."""
    MetricsLog(run.directory / "metrics.jsonl").append(ROW | last)
    assert run.status == status
    (run.directory / "checkpoint").mkdir()
    assert run.status == status.replace("unfinished", "checkpoint")
    assert read_run(run).minutes == 3 / 60
