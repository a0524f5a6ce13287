"""What may change when a run is continued, what it says of that, and what steps that were not taken leave."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hostile import assert_rejected
from test_trainer import assert_same_run, rows_of
from tiny_run import arguments, text

from train import trainer
from train.metrics import read_metrics
from train.run import main
from train.step import learning_rate

pytestmark = pytest.mark.usefixtures("no_picture")


def step_of(run: Path) -> int:
    return json.loads((run / "checkpoint" / "checkpoint.json").read_text())["step"]


def poisoned(monkeypatch, *steps: int) -> None:
    """Have the gradient of ``steps`` (from 1) not be finite."""
    take = trainer._step

    def step(run, measure):
        weight = run.model.blocks[1].mlp.w2.weight
        hook = weight.register_hook(lambda gradient: gradient * (math.nan if run.step + 1 in steps else 1.0))
        try:
            return take(run, measure)
        finally:
            hook.remove()

    monkeypatch.setattr(trainer, "_step", step)


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_bad_steps_are_skipped_counted_and_shown(tmp_path, monkeypatch, capsys, fused):
    run = tmp_path / "run"
    poisoned(monkeypatch, 2, 3, 6)
    options = ("--log-every", "4", "--max-bad-steps", "3", "--save-every", "5", "--schedule", "constant", fused)
    assert main(arguments(tmp_path, "--out", str(run), *options)) == 0
    output = capsys.readouterr().out
    assert re.search(r"step 4/8 .*  bad steps 2  ", output)
    assert "bad steps 3, not taken: their loss or gradient was not finite" in output
    assert [(row["step"], row["bad_steps"]) for row in rows_of(run)] == [(1, 0), (4, 2), (8, 3)]
    assert json.loads((run / "summary.json").read_text())["bad_steps"] == 3
    assert math.isfinite(rows_of(run)[-1]["loss"])
    assert main(["--resume", str(run), "--steps", "9"]) == 0
    assert rows_of(run)[-1]["bad_steps"] == 3  # continued, too


def test_too_many_in_a_row_stop_and_the_run_goes_on_with_another_rate(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    options = ("--log-every", "100", "--max-bad-steps", "2", "--save-every", "3", "--learning-rate", "0.02")
    with monkeypatch.context() as patch:
        poisoned(patch, 2, *range(5, 9))
        assert main(arguments(tmp_path, "--out", str(run), *options)) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "in 2 steps in a row, 5 to 6, which were not taken. At step 5 it began at a place that did not" in error
    assert "The checkpoint of step 3 is whole. To continue from it: " in error
    assert error.endswith(f"train/run.py --resume {run} --learning-rate 0.01")
    assert (step_of(run), rows_of(run)[-1]["step"]) == (3, 6)  # the row says how it ended
    assert not (run / "summary.json").exists()
    diverged = json.loads((run / "diverged.json").read_text())
    assert diverged["step"] == 6
    assert error.startswith(f"error: {diverged['reason']} ")
    changed = ["--learning-rate", "0.01", "--grad-clip", "0.5", "--weight-decay", "0.1"]
    assert main(["--resume", str(run), *changed]) == 0
    assert not (run / "diverged.json").exists()
    output = capsys.readouterr().out
    for line in ("learning_rate from 0.02 to 0.01", "grad_clip from 1.0 to 0.5", "weight_decay from 0.01 to 0.1"):
        assert f"changed   {line}, from step 4 on\n" in output
    stored = json.loads((run / "config.json").read_text())["train"]
    assert (stored["learning_rate"], stored["grad_clip"], stored["weight_decay"]) == (0.01, 0.5, 0.1)
    row = rows_of(run)[-1]
    assert row["lr"] == pytest.approx(0.01 * 8 / 40)  # of 40 steps of warm-up
    assert main(["--resume", str(run), "--steps", "9"]) == 0
    assert "changed" not in capsys.readouterr().out


def test_a_changed_weight_decay_and_rate_are_used(tmp_path):
    """Half a run, continued with other values, is not the run that was begun with the old ones."""
    assert main(arguments(tmp_path, "--out", str(tmp_path / "half"), "--steps", "4")) == 0
    for name, options in (("a", []), ("b", ["--weight-decay", "0.5"]), ("c", ["--grad-clip", "0.01"])):
        run = shutil.copytree(tmp_path / "half", tmp_path / name)
        assert main(["--resume", str(run), "--steps", "8", *options]) == 0
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in "abc"]
    assert losses[0][:5] == losses[1][:5] == losses[2][:5]
    assert losses[0][5:] != losses[1][5:]
    assert losses[0][5:] != losses[2][5:]


@pytest.mark.parametrize(("save_every", "steps"), [("6", [6, 12]), ("0", [15]), ("7", [7, 14])])
def test_when_checkpoints_are_written(tmp_path, monkeypatch, save_every, steps):
    saved, save = [], trainer.save
    monkeypatch.setattr(trainer, "save", lambda run: saved.append(run.step) or save(run))
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"), "--save-every", save_every, "--n-loops", "1")
    assert main([*argv, "--steps", "15"]) == 0
    assert saved == sorted({*steps, 15})


def test_the_first_checkpoint_comes_early(tmp_path, monkeypatch):
    saved, save = [], trainer.save
    monkeypatch.setattr(trainer, "save", lambda run: saved.append(run.step) or save(run))
    options = ("--log-every", "60", "--steps", "60", "--n-loops", "1", "--n-layers", "1")
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"), *options)) == 0
    assert saved == [50, 60]


def test_rows_stay_when_fewer_are_logged(tmp_path):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "--out", str(run), "--steps", "5")) == 0
    before = rows_of(run)
    assert main(["--resume", str(run), "--log-every", "3", "--steps", "6"]) == 0
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 6]
    assert rows_of(run)[:4] == before[:4]


COSINE = ("--schedule", "warmup-cosine", "--warmup-steps", "2")


@pytest.mark.parametrize("length", [["--steps", "6"], ["--epochs", "0.016"]])
def test_the_schedule_keeps_its_length(tmp_path, capsys, length):
    run = tmp_path / "run"
    argv = arguments(tmp_path, "--out", str(run), *COSINE)
    del argv[argv.index("--steps") : argv.index("--steps") + 2]
    assert main([*argv, *length]) == 0
    n = rows_of(run)[-1]["step"]
    assert f"schedule  warmup-cosine over {n} steps\n" in capsys.readouterr().out
    for more in (3, 5):  # twice, so that the length is kept by what the first has written
        assert main(["--resume", str(run), "--steps", str(n + more)]) == 0
        output = capsys.readouterr().out
        assert f"schedule  warmup-cosine over {n} steps, then constant to step {n + more}\n" in output
        assert "changed" not in output
    rates = [row["lr"] for row in rows_of(run)]
    schedule = {"peak": 3e-3, "schedule": "warmup-cosine", "warmup_steps": 2, "steps": n}
    assert rates == [learning_rate(step, **schedule) for step in range(1, n + 6)]
    assert rates[n - 1 :] == pytest.approx([3e-4] * 6)
    asked = str(n + 10)
    assert main(["--resume", str(run), "--steps", asked, "--schedule-steps", asked]) == 0
    assert f"changed   schedule_steps from {n} to {asked}, from step {n + 6} on\n" in capsys.readouterr().out
    assert rows_of(run)[-1]["lr"] == pytest.approx(3e-4)
    assert rows_of(run)[n + 5]["lr"] > 6e-4
    assert main(["--resume", str(run), "--steps", str(n + 11), "--schedule-steps", "1234567"]) == 0
    assert f" schedule_steps from {asked} to 1234567, " in capsys.readouterr().out


def test_a_schedule_longer_than_the_run(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(arguments(tmp_path, "--out", str(whole), *COSINE)) == 0
    assert main(arguments(tmp_path, "--out", str(halves), *COSINE, "--steps", "5", "--schedule-steps", "8")) == 0
    assert main(["--resume", str(halves), "--steps", "8"]) == 0
    assert_same_run(whole, halves)
    assert main(arguments(tmp_path, "--out", str(tmp_path / "no"), "--schedule-steps", "0")) == 2


def test_the_same_text_at_another_place(tmp_path, capsys):
    """Text and tokenizer, moved and named anew; then other text of that name."""
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"))
    assert main(argv) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "elsewhere" / "corpus.txt")
    assert main(["--resume", str(tmp_path / "run"), "--steps", "9"]) == 2  # it is not there any more
    capsys.readouterr()
    data = str(tmp_path / "elsewhere" / "corpus.txt")
    assert main(["--resume", str(tmp_path / "run"), "--steps", "9", "--data", data]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["data"] == data
    shutil.copy(tmp_path / "run" / "tokenizer.json", tmp_path / "made.json")
    run = tmp_path / "other"
    made = ["--data", data, "--tokenizer", str(tmp_path / "made.json"), "--out", str(run)]
    assert main([*argv, *made]) == 0
    (tmp_path / "made.json").rename(tmp_path / "moved.json")
    moved = ["--tokenizer", str(tmp_path / "moved.json")]
    assert main(["--resume", str(run), "--steps", "9", *moved]) == 0
    (tmp_path / "elsewhere" / "corpus.txt").write_text(text(6000, seed=3), encoding="utf-8")
    assert_rejected(main, ["--resume", str(run), "--steps", "10"], run, "is not the one that", capsys)


def test_foreign_lines_of_the_log_are_dropped_and_told(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "--out", str(run), "--steps", "4")) == 0
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff\xfe not text\n", *lines[1:3], b'{"step": 3}\n', lines[3], b'{"st']))
    capsys.readouterr()
    assert main(["--resume", str(run), "--steps", "6"]) == 0
    assert f"dropped   2 lines of {path} that are no rows of training, the first line 2\n" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
