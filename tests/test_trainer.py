import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from forked_runs import rows_of, weights_of
from tiny_run import arguments

from train import config, prepare, progress, trainer
from train.picture import draw
from train.run import main
from train.text import data
from train.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("no_picture")


def assert_same_run(a: Path, b: Path) -> None:
    assert rows_of(a) == rows_of(b)
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    evaluations = [json.loads((run / "summary.json").read_text())["evaluation"] for run in (a, b)]
    for one, other in zip(*evaluations, strict=True):
        assert one["ce"] == other["ce"]


def signal_at(step: int, signum: int, monkeypatch) -> None:
    """Have a signal arrive while ``step`` is being taken."""
    take_step = trainer._step

    def wrapped(run, measure):
        if run.step + 1 == step:
            signal.raise_signal(signum)
        return take_step(run, measure)

    monkeypatch.setattr(trainer, "_step", wrapped)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, no_picture) -> Path:
    """A run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    assert main(arguments(directory, "--out", str(directory / "run"))) == 0
    return directory / "run"


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("bpe", "300"), ("paper", "100")])
def test_the_run_keeps_its_validation_split(tmp_path, tokenizer, vocab_size):
    run = tmp_path / "run"
    options = ["--tokenizer", tokenizer, "--vocab-size", vocab_size, "--steps", "1", "--out", str(run)]
    assert main(arguments(tmp_path, *options)) == 0
    kept = safetensors.numpy.load_file(run / "validation.safetensors")
    entry = next((tmp_path / "cache").iterdir())
    assert np.array_equal(kept["tokens"], np.fromfile(entry / "validation-00000.tokens", dtype=np.uint16))
    assert np.array_equal(kept["bounds"], np.fromfile(entry / "validation-00000.bounds", dtype=np.int64))
    assert kept["tokens"].dtype == (np.uint16 if tokenizer == "bpe" else np.uint8)
    assert kept["bounds"].dtype == np.uint16
    assert kept.keys() == {"tokens", "bounds"} | ({"bytes_per_token"} if tokenizer == "bpe" else set())
    if tokenizer == "bpe":
        documents = (tmp_path / "text.txt").read_bytes()
        decoded = load_tokenizer(run / "tokenizer.json").decode(kept["tokens"][:-1])
        assert decoded.encode() in documents
        assert kept["bytes_per_token"][kept["tokens"]].sum() == len(decoded.encode())


@pytest.mark.parametrize("options", [("--fused", "--log-every", "3"), ("--no-fused", "--log-every", "1")])
def test_half_and_resumed_half_are_the_whole(tmp_path, options):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(arguments(tmp_path, *options, "--out", str(whole))) == 0
    assert main(arguments(tmp_path, *options, "--out", str(halves), "--steps", "4")) == 0
    assert rows_of(halves)[-1]["step"] == 4  # the last step is logged, whatever its number
    assert main(["--resume", str(halves), "--steps", "8"]) == 0
    assert_same_run(whole, halves)
    assert json.loads((halves / "config.json").read_text())["train"]["steps"] == 8


def test_a_gated_run_says_where_tokens_exit_and_continues(tmp_path, capsys):
    options = ("--supervision", "gated", "--gate-beta", "0.2", "--gate-prior", "geometric:0.3", "--penalty", "0")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(arguments(tmp_path, *options, "--out", str(whole))) == 0
    output = capsys.readouterr().out
    rows = rows_of(whole)
    assert all(1 < row["exit_loop"] < 3 and 0 < row["exit_entropy"] < math.log(3) + 1e-6 for row in rows)
    assert len({row["exit_loop"] for row in rows}) == 8
    # At first lambda is 2/5 for every loop and token.
    p, q = np.array([0.4, 0.24, 0.36]), np.array([1, 0.7, 0.49]) / 2.19
    loss = (p * rows[0]["ce"]).sum() + 0.2 * (p * np.log(p / q)).sum()
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert "gated supervision (beta 0.2, geometric:0.3 prior)" in output
    assert f"  exit {rows[4]['exit_loop']:.2f}  " in output
    assert f"exits     after {rows[-1]['exit_loop']:.2f} loops on average" in output
    assert main(arguments(tmp_path, *options, "--out", str(halves), "--steps", "4")) == 0
    assert main(["--resume", str(halves), "--steps", "8"]) == 0
    assert_same_run(whole, halves)
    assert weights_of(whole)["exit_gate.weight"].any()
    written = json.loads((whole / "config.json").read_text())
    assert written["train"]["exit_gate"]
    assert written["model"]["exit_gate"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_the_run_can_be_continued(tmp_path, monkeypatch, capsys, signum):
    options = ("--schedule", "warmup-cosine", "--warmup-steps", "2", "--log-every", "2")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(tmp_path, *options, "--out", str(whole))) == 0
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as context:
        signal_at(5, signum, context)
        assert main(arguments(tmp_path, *options, "--out", str(stopped))) == 128 + signum
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    output = capsys.readouterr().out
    assert "stopped at step 5 of 8" in output
    assert output.rstrip().endswith(f"train/run.py --resume {stopped}")
    assert json.loads((stopped / "checkpoint" / "checkpoint.json").read_text())["step"] == 5
    assert not (stopped / "summary.json").exists()
    assert main(["--resume", str(stopped)]) == 0
    assert_same_run(whole, stopped)


def test_a_run_killed_after_its_last_checkpoint_repeats_the_steps_since(whole, tmp_path, monkeypatch):
    killed = tmp_path / "killed"

    class Killed(BaseException):
        pass

    def die(run, measure, take_step=trainer._step):
        if run.step == 5:
            raise Killed
        return take_step(run, measure)

    with monkeypatch.context() as context:
        context.setattr(trainer, "_step", die)
        with pytest.raises(Killed):
            main(arguments(tmp_path, "--out", str(killed), "--save-every", "3"))
    assert json.loads((killed / "checkpoint" / "checkpoint.json").read_text())["step"] == 3
    assert rows_of(killed)[-1]["step"] == 5
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert main(["--resume", str(killed)]) == 0
    assert rows_of(killed) == rows_of(whole)
    assert all(torch.equal(value, weights_of(killed)[name]) for name, value in weights_of(whole).items())


def test_interrupted_evaluation_is_all_that_is_repeated(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(trainer, "_evaluate", lambda run: signal.raise_signal(signal.SIGTERM))
        assert main(arguments(tmp_path, "--out", str(run))) == 128 + signal.SIGTERM
    assert f"To continue from it: {progress.resume_command(run)}\n" in capsys.readouterr().out
    before = rows_of(run)
    assert main(["--resume", str(run)]) == 0
    assert rows_of(run) == before
    assert (run / "summary.json").exists()


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, capsys):
    def signals(run, measure):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer, "_step", signals)
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"))) == 128 + signal.SIGTERM
    assert "before the first checkpoint" in capsys.readouterr().out


def test_stopped_while_checkpoints_change_places(tmp_path, monkeypatch, capsys):
    """What says how to go on knows the one that stays meanwhile."""
    run, take_step = tmp_path / "run", trainer._step

    def signals(state, measure):
        if state.step == 4:
            (run / "checkpoint").rename(run / "checkpoint.old")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        return take_step(state, measure)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_step", signals)
        assert main(arguments(tmp_path, "--out", str(run), "--save-every", "2")) == 128 + signal.SIGTERM
    assert "checkpoint of step 4 is whole. To continue" in capsys.readouterr().out
    assert main(["--resume", str(run)]) == 0


def test_a_signal_while_setting_up_leaves_what_was_encoded_alone(tmp_path, monkeypatch, capsys):
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"))
    monkeypatch.setattr(data, "_check_length", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    assert main(argv) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: SIGTERM\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]
    (unfinished,) = (tmp_path / "cache").iterdir()
    assert unfinished.name.startswith("unfinished-tokens-")


def test_runs_continue_fused_or_not(whole, tmp_path):
    mixed = tmp_path / "mixed"
    assert main(arguments(tmp_path, "--out", str(mixed), "--no-fused", "--steps", "4")) == 0
    assert main(["--resume", str(mixed), "--steps", "8", "--fused"]) == 0
    for one, other in zip(rows_of(whole), rows_of(mixed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpoint-loops"],
        ["--grad-accumulation", "2", "--dropout", "0"],
        ["--log-every", "4"],
    ],
)
def test_options_that_do_not_change_what_is_trained(tmp_path, options):
    shared = ["--dropout", "0"] if "--dropout" in options else []
    assert main(arguments(tmp_path, *shared, "--out", str(tmp_path / "a"))) == 0
    assert main(arguments(tmp_path, *options, "--out", str(tmp_path / "b"))) == 0
    expected = {row["step"]: row["loss"] for row in rows_of(tmp_path / "a")}
    for row in rows_of(tmp_path / "b"):
        assert row["loss"] == pytest.approx(expected[row["step"]], rel=1e-5)


def test_epochs_count_passes_over_the_windows(tmp_path):
    assert main(arguments(tmp_path, "--out", str(tmp_path / "steps"), "--steps", "1")) == 0
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"), "--epochs", "0.02")
    del argv[argv.index("--steps") : argv.index("--steps") + 2]
    assert main(argv) == 0
    entry = next((tmp_path / "cache").iterdir())
    windows = (sum(json.loads((entry / "meta.json").read_text())["train"]) - 17) // 16 + 1
    assert rows_of(tmp_path / "run")[-1]["step"] == math.ceil(0.02 * windows / 4)


def test_divergence_stops_with_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    options = ("--learning-rate", "1e30", "--grad-clip", "1e30", "--warmup-steps", "0")
    assert main(arguments(tmp_path, "--out", str(run), *options)) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the loss or the gradient was not finite in 5 steps in a row, 2 to 6, which were not "
    )
    assert "At step 2 it began in the norm penalty. Lower --learning-rate. That was before the first check" in error
    assert error.count("\n") == 1
    assert not (run / "summary.json").exists()
    assert not (run / "checkpoint").exists()


def test_weights_that_are_no_numbers_do_not_replace_a_checkpoint(tmp_path, monkeypatch, capsys):
    take_step = trainer._step

    def step(run, measure):
        result = take_step(run, measure)
        if run.step == 5:
            run.model.embedding.weight.data[7, 3] = torch.nan
        return result

    monkeypatch.setattr(trainer, "_step", step)
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "--out", str(run), "--save-every", "2", "--log-every", "100")) == 1
    assert "a weight is not finite after step 6. Lower --learning-rate" in capsys.readouterr().err
    assert json.loads((run / "checkpoint" / "checkpoint.json").read_text())["step"] == 4
    assert all(weight.isfinite().all() for weight in weights_of(run).values())


def test_a_run_is_complete_only_with_its_figure(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("train.picture.draw", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    assert main(arguments(tmp_path, "--out", str(run))) == 128 + signal.SIGTERM
    assert not (run / "summary.json").exists()
    monkeypatch.setattr("train.picture.draw", draw)
    assert main(["--resume", str(run)]) == 0
    assert (run / "report.png").exists()
    assert (run / "summary.json").exists()


def test_a_directory_is_one_runs_alone(tmp_path, monkeypatch, capsys):
    """A second process, here a second call, that wants to begin or continue the run leaves it as it is."""
    run, take_step, codes = tmp_path / "run", trainer._step, []
    argv = arguments(tmp_path, "--out", str(run))

    def step(state, measure):
        if state.step == 4:
            monkeypatch.setattr(trainer, "_step", take_step)
            trainer.save(state)
            with monkeypatch.context() as patch:
                patch.setattr(config, "check_out_directory", lambda out: None)  # as if both had begun at once
                codes.append(main([*argv, "--seed", "8"]))
            codes.append(main(["--resume", str(run)]))
        return take_step(state, measure)

    monkeypatch.setattr(trainer, "_step", step)
    assert main(argv) == 0
    assert codes == [2, 2]
    errors = capsys.readouterr().err.splitlines()
    assert all("must not be in use. Another process trains there" in error for error in errors)
    assert len(errors) == 2
    assert json.loads((run / "config.json").read_text())["train"]["seed"] != 8
    assert main(["--resume", str(run), "--steps", "9"]) == 0  # the first has let go


def test_of_two_runs_into_one_directory_the_first_stays(tmp_path, monkeypatch, capsys):
    run, load = tmp_path / "run", prepare.load_data

    def late(*arguments_, **options):
        monkeypatch.setattr(prepare, "load_data", load)
        assert main(arguments(tmp_path, "--out", str(run))) == 0  # begun later, with its text at hand
        return load(*arguments_, **options)

    monkeypatch.setattr(prepare, "load_data", late)
    assert main(arguments(tmp_path, "--out", str(run), "--seed", "8")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["train"]["seed"] != 8
    assert rows_of(run)[-1]["step"] == 8
