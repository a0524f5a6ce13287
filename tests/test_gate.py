"""python -m train.gate: a copy of a run with a trained gate, everything else as it was."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked_runs import weights_of
from tiny_run import arguments

from looped.run_directory import load_run
from train import gate
from train.gate import main
from train.metrics import read_metrics
from train.run import main as train
from train.text.batches import evaluation_windows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a gate."""
    directory = tmp_path_factory.mktemp("finished")
    assert train(arguments(directory, "--out", str(directory / "run"))) == 0
    return directory / "run"


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_gets_a_gate_and_keeps_its_weights(finished, tmp_path, capsys):
    before, out = content(finished), tmp_path / "deep" / "gated"
    assert main([str(finished), "--steps", "30", "--learning-rate", "0.01", "--out", str(out)]) == 0
    assert content(finished) == before
    ours, theirs = weights_of(out), weights_of(finished)
    assert ours.keys() - theirs.keys() == {"exit_gate.weight", "exit_gate.bias"}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert (ours["exit_gate.weight"] != 0).all()

    record = json.loads((out / "gate.json").read_text())
    assert record["after"]["loss"] < record["before"]["loss"] - 0.002
    assert record["after"]["ce"] == record["before"]["ce"]
    assert sum(record["after"]["exit_probability"]) == pytest.approx(1)
    assert (record["steps"], record["batch_size"]) == (30, 4)
    shown = capsys.readouterr().out
    assert "33 of 30,785 parameters" in shown
    assert f"exits after {record['after']['exit_loop']:.2f} of 3 loops" in shown

    run = load_run(out)
    assert run.model.config.exit_gate
    assert (run.step, run.config["train"]["supervision"]) == (8, "per-loop")
    p = run.model.exit_probabilities(run.model(run.validation.tokens[None, :16]).states)
    torch.testing.assert_close(p.sum(0), torch.ones(1, 16))


def test_what_a_gate_does_is_measured_token_by_token(finished, tmp_path):
    out = tmp_path / "gated"
    assert main([str(finished), "--steps", "10", "--learning-rate", "0.05", "--out", str(out)]) == 0
    record, run = json.loads((out / "gate.json").read_text())["after"], load_run(out)
    windows, indices = evaluation_windows(run.validation.tokens.numpy(), 16, 256)
    inputs, targets = windows.gather(indices)
    states = run.model(inputs).states
    p, ce = run.model.exit_probabilities(states), run.model.evaluation_losses(states, targets)
    p, ce = p.flatten(1).double(), ce.flatten(1).double()
    assert record["ce"] == pytest.approx(ce.mean(1).tolist(), rel=1e-4)
    assert record["exit_probability"] == pytest.approx(p.mean(1).tolist(), rel=1e-4)
    assert record["exit_loop"] == pytest.approx((p[0] + 2 * p[1] + 3 * p[2]).mean().item(), rel=1e-4)
    assert record["exit_ce"] == pytest.approx((p * ce).sum(0).mean().item(), rel=1e-4)
    assert record["entropy"] == pytest.approx(torch.special.entr(p).sum(0).mean().item(), rel=1e-4)


def test_the_copy_continues_as_the_run(finished, tmp_path):
    """The same weights after more steps, beside a gate that training leaves alone; its history too."""
    run, out = tmp_path / "run", tmp_path / "gated"
    shutil.copytree(finished, run)
    assert main([str(run), "--steps", "3", "--out", str(out)]) == 0
    learned = weights_of(out)["exit_gate.weight"]
    for directory in (run, out):
        assert train(["--resume", str(directory), "--steps", "10"]) == 0
    ours, theirs = weights_of(out), weights_of(run)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(ours["exit_gate.weight"], learned)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 11))
    assert [row["loss"] for row in read_metrics(out / "metrics.jsonl")] == [
        row["loss"] for row in read_metrics(run / "metrics.jsonl")
    ]


def test_a_gate_that_was_trained_with_the_model_goes_on_from_there(tmp_path):
    run, out = tmp_path / "run", tmp_path / "gated"
    options = ["--supervision", "gated", "--learning-rate", "0.05", "--warmup-steps", "0", "--out", str(run)]
    assert train(arguments(tmp_path, *options)) == 0
    assert main([str(run), "--steps", "1", "--learning-rate", "1e-9", "--out", str(out)]) == 0
    ours, theirs = weights_of(out), weights_of(run)
    assert ours.keys() == theirs.keys()
    assert (theirs["exit_gate.weight"] != 0).any()
    torch.testing.assert_close(ours.pop("exit_gate.weight"), theirs.pop("exit_gate.weight"), atol=1e-8, rtol=0)
    torch.testing.assert_close(ours.pop("exit_gate.bias"), theirs.pop("exit_gate.bias"), atol=1e-8, rtol=0)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert train(["--resume", str(out), "--steps", "9"]) == 0


def test_the_default_place_is_beside_the_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert main([f"{tmp_path / 'run'}/", "--steps", "1"]) == 0
    assert (tmp_path / "run-gate" / "gate.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be at least 1. Got steps=0."),
        (["--batch-size", "0"], "batch_size must be at least 1. Got batch_size=0."),
        (["--learning-rate", "nan"], "learning_rate must be finite and above 0. Got learning_rate=nan."),
        (["--seed", "-1"], "seed must be in [0, 2^63). Got seed=-1."),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N. Got device='tpu'."),
    ],
)
def test_bad_options_are_one_line_before_any_work(finished, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(gate, "load_source", None)
    assert main([str(finished), "--out", str(tmp_path / "gated"), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "gated").exists()


def test_bad_runs_are_one_line(finished, tmp_path, capsys):
    def error(run: Path, *options: str) -> str:
        assert main([str(run), "--out", str(tmp_path / "gated"), *options]) == 2
        assert not (tmp_path / "gated").exists()
        return capsys.readouterr().err

    assert (
        error(tmp_path / "none") == f"error: a run must be a directory that training wrote. {tmp_path}/none is none.\n"
    )
    assert train(arguments(tmp_path, "--n-loops", "1", "--out", str(tmp_path / "one"))) == 0
    capsys.readouterr()
    assert error(tmp_path / "one") == "error: a gate needs a model with n_loops of at least 2. Got n_loops=1.\n"
    other = tmp_path / "other.txt"
    other.write_text((tmp_path / "text.txt").read_text()[100:])
    assert error(finished, "--data", str(other)).startswith("error: the text or the tokenizer is not the one that")
    assert main([str(finished), "--out", str(tmp_path / "one")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    torn = Path(shutil.copytree(finished, tmp_path / "torn"))
    moments = torn / "checkpoint" / "optimizer.safetensors"  # which would be sealed again, in the copy
    moments.write_bytes(moments.read_bytes()[:-1] + b"x")
    assert "optimizer.safetensors is not what was written" in error(torn)


def test_a_gate_that_diverges_is_not_written(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gate, "continuation_loss", lambda logits, *_: logits.sum() * float("nan"))
    assert main([str(finished), "--steps", "2", "--out", str(tmp_path / "gated")]) == 1
    assert capsys.readouterr().err == "error: the gate is not finite after 2 steps. Lower --learning-rate.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_leaves_nothing(finished, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gate, "train_gate", stop)
    assert main([str(finished), "--out", str(tmp_path / "gated")]) == 143
    assert capsys.readouterr().err == "SIGTERM: stopped, and nothing was written.\n"
    assert list(tmp_path.iterdir()) == []
