"""Runs on tasks: what is drawn when, what a run leaves, what is refused, and how answers are counted."""

import json
import re
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_run import assert_rejected
from test_trainer import assert_same_run
from torch import nn

from looped.config import LoopedConfig
from looped.diagnose.__main__ import main as diagnose
from looped.diagnose.diagnosis import check_run
from looped.model import LoopedLM, LoopedOutput
from looped.run_directory import load_run
from train import gate
from train.paper.plan import SweepConfig, plan
from train.picture import draw
from train.report import table
from train.run import main, parse
from train.step import LoopResult
from train.tasks.accuracy import with_accuracy
from train.tasks.task import TASKS, TaskSource, make_task
from train.text.batches import spread

pytestmark = pytest.mark.usefixtures("no_picture")

TINY = shlex.split("--d-model 16 --d-ff 32 --n-heads 2 --batch-size 4 --steps 6 --log-every 1 --device cpu")
LENGTHS = {"p-hop": 24, "addition": 10}


def arguments(task: str, out: Path, *options: str) -> list[str]:
    length = str(LENGTHS[task])
    return ["--preset", task, *TINY, "--seq-len", length, "--eval-tokens", "960", "--out", str(out), *options]


def source(task: str) -> TaskSource:
    return TaskSource(make_task(task, LENGTHS[task]))


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_a_function_of_seed_and_step(task):
    inputs, targets = source(task).batch(7, seed=1, batch_size=5)
    again = source(task).batch(7, seed=1, batch_size=5)
    assert torch.equal(inputs, again[0])
    assert torch.equal(targets, again[1])
    assert inputs.shape == targets.shape == (5, LENGTHS[task])
    assert inputs.dtype == targets.dtype == torch.int64
    for seed, step in ((1, 8), (2, 7), (7, 1)):
        assert not torch.equal(inputs, source(task).batch(step, seed=seed, batch_size=5)[0])
    answered = targets[0] != -100
    assert 0 < answered.sum() < LENGTHS[task]
    made, indices = source(task).validation(None)
    answered = made.gather(indices)[1] != -100
    assert (answered.int().diff() >= 0).all()  # the answers are last
    assert (answered == answered[0]).all()
    assert inputs.max() < source(task).vocab_size


def test_the_curriculum_takes_targets_away_and_no_inputs():
    """The sequences of a step are those that its generator gives; validation has all targets."""
    inputs, targets = source("p-hop").batch(199, seed=1, batch_size=5)
    assert (targets[:, 8:16] >= 0).all()
    assert (targets[:, 16:] == -100).all()
    assert (np.sort(inputs.reshape(5, 3, 8)) == np.arange(8)).all()
    assert (source("p-hop").batch(200, seed=1, batch_size=5)[1][:, 8:] >= 0).all()
    made, indices = source("p-hop").validation(None)
    assert (made.gather(indices)[1][:, 8:] >= 0).all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_no_training_batch_is_a_validation_batch(task, seed):
    made, indices = source(task).validation(None)
    validation = {tuple(row) for row in made.gather(indices)[0].tolist()}
    assert len(indices) == len(made.inputs) == 4096
    for step in (0, 1, 2):
        batch = source(task).batch(step, seed=seed, batch_size=4096)[0]
        assert not torch.equal(batch, made.inputs)
        if task == "p-hop":  # whose sequences are 8!^3 in number
            assert not validation & {tuple(row) for row in batch.tolist()}


def test_validation_is_limited_as_that_of_text():
    made, indices = source("p-hop").validation(24 * 100 + 5)
    assert np.array_equal(indices, spread(4096, 100))
    inputs, targets = made.gather(indices)
    assert inputs.shape == targets.shape == (100, 24)
    assert len(source("p-hop").validation(1)[1]) == 1


def test_a_source_is_told_by_its_sequences():
    lengths = (("p-hop", 24), ("p-hop", 32), ("addition", 10))
    assert len({TaskSource(make_task(*each)).fingerprint for each in lengths}) == 3
    assert source("p-hop").fingerprint == source("p-hop").fingerprint


@pytest.mark.parametrize("task", TASKS)
def test_half_and_resumed_half_are_the_whole(tmp_path, task):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(arguments(task, whole)) == 0
    assert main(arguments(task, halves, "--steps", "3")) == 0
    assert main(["--resume", str(halves), "--steps", "6"]) == 0
    assert_same_run(whole, halves)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, halves)]
    accuracies = [[result["accuracy"] for result in summary["evaluation"]] for summary in summaries]
    assert accuracies[0] == accuracies[1]


def test_the_second_stage_of_a_gate_goes_on_with_the_curriculum(tmp_path, monkeypatch):
    run, steps, batch = tmp_path / "run", [], TaskSource.batch

    def recorded(self, step, **options):
        steps.append(step)
        return batch(self, step, **options)

    assert main(arguments("p-hop", run)) == 0
    monkeypatch.setattr(TaskSource, "batch", recorded)
    assert gate.main([str(run), "--steps", "3", "--device", "cpu"]) == 0
    assert steps == [6, 7, 8]
    assert load_run(tmp_path / "run-gate").model.exit_gate is not None


def test_what_a_run_leaves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.picture.draw", draw)
    run = tmp_path / "run"
    assert main(arguments("p-hop", run)) == 0
    output = capsys.readouterr().out
    names = {"config.json", "metrics.jsonl", "checkpoint", "summary.json", "report.png", "validation.safetensors"}
    assert {path.name for path in run.iterdir()} == names
    assert "p-hop, made on the fly (8 symbols, 1 to 2 hops): 6 steps x 4 x 24 = 576 tokens\n" in output
    summary = json.loads((run / "summary.json").read_text())
    results = summary["evaluation"] + summary["evaluation_beyond"]
    assert [result["n_loops"] for result in results] == list(range(1, 9))
    assert len(summary["evaluation"]) == 4
    for result in results:
        assert list(result["accuracy"]) == ["answers", "1 hop", "2 hops"]
        assert all(0 <= share <= 1 for share in result["accuracy"].values())
        assert result["bits_per_byte"] is None
    config = json.loads((run / "config.json").read_text())
    assert [config["train"][name] for name in ("data", "tokenizer", "stride", "vocab_size")] == ["p-hop", None, None, 8]
    assert (config["model"]["vocab_size"], config["model"]["max_seq_len"]) == (8, 24)


def test_a_run_keeps_its_validation_sequences_and_is_no_text(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments("addition", run, "--steps", "1")) == 0
    made = source("addition")._validation
    kept = load_file(run / "validation.safetensors")
    assert {name: array.dtype.type for name, array in kept.items()} == {
        "tokens": np.uint8, "bounds": np.uint16, "targets": np.int16,
    }  # fmt: skip
    assert np.array_equal(kept["tokens"].reshape(-1, 10), made.inputs)
    assert np.array_equal(kept["bounds"], np.arange(4097) * 10)
    loaded = load_run(run)
    assert loaded.validation.targets is not None
    assert torch.equal(loaded.validation.targets.view(-1, 10), made.targets)
    with pytest.raises(ValueError, match=r"a diagnosis needs text, .* Got the sequences of a task\."):
        check_run(loaded)
    assert diagnose([str(run), "--out", str(tmp_path / "page")]) == 2
    assert "a diagnosis needs text" in capsys.readouterr().err.splitlines()[-1]


BAD_OPTIONS = {
    "tokenizer": (["--tokenizer", "bpe"], r"tokenizer must not be given with a task.*tokenizer=bpe with data=p-hop"),
    "stride": (["--stride", "8"], r"stride must not be given with a task.*stride=8"),
    "epochs": (["--epochs", "2"], r"epochs must not be given with a task.*epochs=2"),
    "vocab_size": (["--vocab-size", "9"], r"vocab_size must be 8 with data=p-hop\. Got vocab_size=9"),
    "length": (["--seq-len", "25"], r"seq_len must be 8 \(1 \+ hops\) with data=p-hop.*Got seq_len=25"),
    "no length": (["--seq-len", "0"], r"seq_len must be"),
    "of another task": (["--data", "addition", "--seq-len", "24"], r"seq_len must be 3 digits \+ 1 .*Got seq_len=24"),
}


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_rejects_options_that_make_no_sense(bad, tmp_path, capsys):
    options, message = BAD_OPTIONS[bad]
    argv = [word for word in arguments("p-hop", tmp_path / "run") if bad != "epochs" or word not in ("--steps", "6")]
    assert_rejected([*argv, *options], tmp_path, message, capsys)


def test_rejects_a_presets_epochs(tmp_path, capsys):
    argv = ["--preset", "paper-44m", "--data", "addition", "--seq-len", "10", "--out", str(tmp_path / "run")]
    assert_rejected(argv, tmp_path, "tokenizer must not be given", capsys)
    argv[1] = "parcae-140m"
    assert_rejected(argv, tmp_path, r"steps must be given: data=addition has no epochs, as preset=parcae-140m", capsys)


def test_a_run_is_not_continued_on_another_task(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments("p-hop", run, "--steps", "1")) == 0
    argv = ["--resume", str(run), "--steps", "2", "--data"]
    assert_rejected([*argv, "addition"], tmp_path, r"seq_len must be 3 digits \+ 1", capsys)
    assert_rejected([*argv, "sotu"], tmp_path, "vocab_size must be at least 257", capsys)


def test_a_sweep_of_the_papers_conditions_is_of_text():
    with pytest.raises(ValueError, match=r"data must be text in a sweep: .* Got data=p-hop\."):
        plan(SweepConfig(data="p-hop"), ["--seq-len", "40"])


class AnswersOneHopEachLoop(nn.Module):
    """Its state is the logits: of f^k(x) at a query of p hops after k < p loops, and of f^p(x) from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor, *, n_loops: int) -> LoopedOutput:
        self.inputs.append(tokens)
        listed, queries = tokens[:, :8], tokens[:, 8:]
        hops = torch.arange(queries.shape[1]) // 8 + 1
        reached, states = queries, []
        for loop in range(n_loops):
            reached = torch.where(loop < hops, listed.gather(1, reached), reached)
            states.append(nn.functional.one_hot(torch.cat([listed, reached], 1), 8).float())
        return LoopedOutput(tuple(states))

    def readout_logits(self, state: torch.Tensor) -> torch.Tensor:
        return state


def test_accuracy_is_that_of_each_depth():
    results = [LoopResult(n_loops, 1.0, 2.0, None, 3.0, 4.0) for n_loops in (1, 2, 5)]
    made, indices = source("p-hop").validation(24 * 50)
    model = AnswersOneHopEachLoop()
    options = {"batch_size": 8, "device": torch.device("cpu"), "dtype": torch.float32}
    scored = with_accuracy(results, source("p-hop").task, model, made, indices, **options)  # type: ignore[arg-type]
    assert not model.training
    assert torch.equal(torch.cat(model.inputs), made.inputs[indices])
    assert [result._replace(accuracy=None) for result in scored] == results
    one, two, five = (result.accuracy for result in scored)
    assert two == five == {"answers": 1.0, "1 hop": 1.0, "2 hops": 1.0}
    # f(x) is f(f(x)) where x is a fixed point: one symbol of a permutation in the mean
    fixed = float((made.inputs[indices][:, :8] == torch.arange(8)).float().mean())
    assert one == {"answers": pytest.approx(0.5 + fixed / 2), "1 hop": 1.0, "2 hops": pytest.approx(fixed)}
    assert 0.05 < fixed < 0.2


def test_a_coda_reads_whole_sequences():
    made, indices = source("p-hop").validation(24 * 50)
    torch.manual_seed(0)
    shape = {"vocab_size": 8, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 32, "max_seq_len": 24, "n_coda": 2}
    model = LoopedLM(LoopedConfig(**shape, positions="rotary", tied=False)).eval()
    for parameter in model.coda.parameters():
        nn.init.normal_(parameter, std=0.7)
    options = {"batch_size": 8, "device": torch.device("cpu"), "dtype": torch.float32}
    (scored,) = with_accuracy(
        [LoopResult(2, 1.0, 2.0, None, 3.0, 4.0)], source("p-hop").task, model, made, indices, **options
    )
    inputs, targets = made.gather(indices)
    asked = targets != -100
    right = model(inputs, n_loops=2, logits=True).logits.argmax(-1)[asked] == targets[asked]
    assert scored.accuracy["answers"] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_accuracy_stands_beside_the_loss(tmp_path, monkeypatch):
    accuracies = ({"answers": 0.25, "1 hop": 0.5}, {"answers": 0.5, "1 hop": 1.0})
    results = [LoopResult(k, 1.5, 4.5, None, 20.0, 8e4, accuracy) for k, accuracy in enumerate(accuracies, start=1)]
    lines = table(results).splitlines()
    assert lines[0].split() == ["K", "CE", "PPL", "bits/byte", "||H_K||", "tokens/s", "answers", "1", "hop"]
    assert lines[2].split() == ["2", "1.5000", "4.5", "-", "20", "80,000", "0.500", "1.000"]
    assert len({len(line) for line in lines}) == 1
    shown: list[plt.Figure] = []
    monkeypatch.setattr(plt, "close", shown.append)
    draw(tmp_path / "report.png", [], results, "title")
    monkeypatch.undo()
    panel = shown[0].axes[-1]
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines if line.get_marker() == "o"}
    assert drawn == {"answers": [0.25, 0.5], "1 hop": [0.5, 1.0]}
    assert [list(line.get_xdata()) for line in panel.lines[1:]] == [[1, 2], [1, 2]]
    plt.close(shown[0])


def test_a_task_alone_takes_its_own_preset():
    assert parse(["--data", "p-hop"]).preset == "p-hop"
    assert parse(["--data=addition"]).n_layers == parse(["--preset", "addition"]).n_layers
    assert parse(["--data", "sotu"]).preset == "demo"
    assert parse(["--data", "p-hop", "--preset", "demo", "--seq-len", "24"]).preset == "demo"


def test_a_gate_is_trained_on_the_runs_own_kind_of_data(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments("p-hop", run)) == 0
    capsys.readouterr()
    assert gate.main([str(run), "--data", "sotu"]) == 2
    assert re.fullmatch(r"error: data must be of the kind that .* was trained on[^\n]*\n", capsys.readouterr().err)
