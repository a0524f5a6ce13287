import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import hostile
import pytest
import tokenizers
import torch
from tiny_run import arguments

from looped.config import PRESETS
from train.config import TrainConfig, complete, model_config, preset_config, validate
from train.metrics import read_metrics
from train.run import main, parse

PROGRAM = Path(__file__).parents[1] / "train" / "run.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, which the tests copy."""
    directory = tmp_path_factory.mktemp("finished")
    assert main(arguments(directory, "--out", str(directory / "run"))) == 0
    return directory / "run"


@pytest.fixture(autouse=True)
def one_picture(finished, no_picture) -> None:
    """That of the finished run."""


def test_what_a_run_leaves(finished):
    names = {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoint", "summary.json", "report.png"}
    assert {path.name for path in finished.iterdir()} == names | {"validation.safetensors"}
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert list(row) == [
            "step", "tokens", "n_loops", "loss", "ce", "state_norm", "radial_fraction", "grad_norm", "lr", "bad_steps",
            "tokens_per_second", "mfu",
        ]  # fmt: skip
        assert row["tokens"] == row["step"] * 4 * 16
        assert len(row["ce"]) == len(row["state_norm"]) == len(row["radial_fraction"]) == 3
    assert tokenizers.Tokenizer.from_file(str(finished / "tokenizer.json")).get_vocab_size() == 300
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert [result["n_loops"] for result in summary["evaluation"]] == [1, 2, 3]
    for result in summary["evaluation"]:
        assert result.pop("accuracy") is None  # of tasks
        assert list(result) == ["n_loops", "ce", "ppl", "bits_per_byte", "state_norm", "tokens_per_second"]
        assert all(value > 0 for value in result.values())
    for key in ("device", "versions", "commit", "seconds", "peak_memory_bytes"):
        assert key in summary
    config = json.loads((finished / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(TrainConfig)} == config["train"].keys()
    assert config["train"]["d_model"] == config["model"]["d_model"] == 32
    assert config["model"]["vocab_size"] == 300


def test_last_lines_state_what_was_trained(tmp_path, capsys):
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"))) == 0
    last = capsys.readouterr().out.splitlines()[-9:]
    parameters = json.loads((tmp_path / "run" / "summary.json").read_text())["parameters"]
    assert last[0].startswith(f"trained   demo: {parameters:,} parameters, K = 3 loops, rmsnorm readout")
    assert "text.txt, bpe tokenizer (300 tokens): 8 steps x 4 x 16 = 512 tokens of" in last[1]
    assert last[2].startswith("learning  CE of every loop: ")
    assert [line.split()[0] for line in last[4:8]] == ["K", "1", "2", "3"]
    assert str(tmp_path / "run") in last[8]


def test_log_says_which_attention_serves(tmp_path, capsys, monkeypatch):
    assert main(arguments(tmp_path, "--steps", "1", "--out", str(tmp_path / "run"))) == 0
    assert "\nattention blocks with dropout, on the CPU\n" in capsys.readouterr().out

    def broken(*_, **__):
        raise ImportError("flash-attn must be importable where it is installed.")

    monkeypatch.setattr("train.prepare.attention_implementation", broken)
    assert_rejected(arguments(tmp_path, "--out", str(tmp_path / "other")), tmp_path, "must be importable", capsys)


def test_losses_fall_at_every_loop_and_the_paper_tokenizer_has_no_bits(tmp_path):
    options = ["--tokenizer", "paper", "--vocab-size", "100", "--steps", "60", "--warmup-steps", "0"]
    run = tmp_path / "run"
    assert main(arguments(tmp_path, *options, "--learning-rate", "1e-2", "--log-every", "20", "--out", str(run))) == 0
    rows = read_metrics(run / "metrics.jsonl")
    assert all(last < first - 0.3 for first, last in zip(rows[0]["ce"], rows[-1]["ce"], strict=True))
    evaluation = json.loads((run / "summary.json").read_text())["evaluation"]
    assert all(result["bits_per_byte"] is None for result in evaluation)


def test_terminal_supervision_logs_null_for_unread_loops(tmp_path):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, "--supervision", "terminal", "--steps", "2", "--out", str(run))) == 0
    for row in read_metrics(run / "metrics.jsonl"):
        assert row["ce"][:2] == row["radial_fraction"][:2] == [None, None]
        assert row["ce"][2] > 0
        assert all(row["state_norm"])


@pytest.mark.parametrize("readout", ["raw", "final-only", "layernorm"])
def test_models_of_every_kind_train(tmp_path, readout):
    options = ["--readout", readout, "--positions", "rotary", "--no-tied", "--inter-loop-norm", "--dtype", "bf16"]
    assert main(arguments(tmp_path, *options, "--steps", "2", "--out", str(tmp_path / "run"))) == 0


def test_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("train.trainer._evaluate", lambda run: [])
    options = ["--compile", "--steps", "2", "--n-loops", "1", "--n-layers", "1", "--dropout", "0"]
    losses = []
    for name, chosen in (("a", options), ("b", options[1:])):
        assert main(arguments(tmp_path, *chosen, "--out", str(tmp_path / name))) == 0
        losses.append([row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


assert_rejected = partial(hostile.assert_rejected, main)


BAD_OPTIONS = {
    "unknown preset": (["--preset", "huge"], "preset must be one of demo, paper-44m, .*'huge'"),
    "unknown data": (["--data", "wikitext-2"], "data must be sotu, wikitext-103, or a path.*'wikitext-2'"),
    "unknown tokenizer": (["--tokenizer", "spm"], "tokenizer must be bpe, paper or the path.*'spm'"),
    "unknown option": (["--learning", "1"], "Unrecognized options.*--learning"),
    "unknown readout": (["--readout", "batchnorm"], "invalid choice 'batchnorm'"),
    "unknown supervision": (["--supervision", "last"], "invalid choice 'last'"),
    "depths backwards": (["--depth", "uniform:8-1"], "depth must be fixed, uniform:A-B"),
    "no loop with gradient": (["--backprop-loops", "0"], "backprop_loops must be at least 1. Got backprop_loops=0"),
    "shallow evaluation": (["--eval-loops", "2"], "eval_loops must be at least n_loops=3. Got eval_loops=2"),
    "one process shares nothing": (["--shard", "fsdp2"], "shard must be none with one process; .* Got shard=fsdp2"),
    "shared out and compiled": (["--shard", "fsdp2", "--compile"], "compile must be left out when weights are shared"),
    "no patience": (["--collective-timeout", "0"], "collective_timeout must be above 0 and at most 1e9. Got .*=0"),
    "patience without end": (["--collective-timeout", "1e15"], "collective_timeout must be above 0 .* Got .*=10{15}.0"),
    "gated and truncated": (
        ["--supervision", "gated", "--backprop-loops", "2"],
        "backprop_loops must be left out with gated supervision.*Got backprop_loops=2",
    ),
    "negative beta": (
        ["--supervision", "gated", "--gate-beta", "-1"],
        "beta of the gate must be .* at least 0. Got -1",
    ),
    "unknown prior": (
        ["--supervision", "gated", "--gate-prior", "poisson:4"],
        "must be uniform or geometric:P .*'poisson",
    ),
    "beta without a gate": (
        ["--gate-beta", "0.2"],
        "gate_beta must be left out unless supervision is gated. Got .*0.2",
    ),
    "a gate that nothing trains": (
        ["--exit-gate"],
        "exit_gate must be left out unless .* Got exit_gate=True, .*per-loop",
    ),
    "not a number": (["--steps", "many"], "--steps.*many"),
    "no steps": (["--steps", "0"], "steps must be at least 1. Got steps=0"),
    "steps and epochs": (["--epochs", "1"], "steps or epochs, not both"),
    "window longer than the text": (["--seq-len", "50000"], "text is too short.*50001"),
    "vocabulary too large": (["--vocab-size", "50000"], r"vocab_size must be at most \d+.*50000"),
    "paper vocabulary too large": (["--tokenizer", "paper", "--vocab-size", "5000"], r"vocab_size must be at most \d+"),
    "vocabulary beyond any": (["--vocab-size", "2000000000"], r"vocab_size must be .* at most 1,048,576 .*=2000000000"),
    "vocabulary without bytes": (["--vocab-size", "200", "--data", "no"], "vocab_size must be at least 257 .*=200"),
    "heads": (["--n-heads", "3"], "d_model must be divisible by n_heads. Got d_model=32, n_heads=3"),
    "odd head": (["--n-heads", "32", "--positions", "rotary"], "must be even with rotary positions. Got 1"),
    "no loops": (["--n-loops", "0"], "n_loops must be at least 1. Got n_loops=0"),
    "negative penalty": (["--penalty", "-0.5"], "penalty must be finite and at least 0. Got penalty=-0.5"),
    "penalty is no number": (["--penalty", "nan"], "penalty must be finite"),
    "dropout": (["--dropout", "1"], "dropout must be in"),
    "accumulation": (["--grad-accumulation", "3"], "batch_size must be divisible by grad_accumulation"),
    "learning rate": (["--learning-rate", "0"], "learning_rate must be finite and above 0"),
    "no bad steps": (["--max-bad-steps", "0"], "max_bad_steps must be at least 1. Got max_bad_steps=0"),
    "no schedule": (["--schedule-steps", "-3"], "schedule_steps must be at least 1. Got schedule_steps=-3"),
    "unknown device": (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N. Got device='tpu'"),
    "half precision": (["--dtype", "fp16"], "invalid choice 'fp16'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, tmp_path, capsys):
    options, message = BAD_OPTIONS[case]
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"))
    assert_rejected([*argv, *options], tmp_path, message, capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "no file matches"),
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"\xff\xfe\x00\xd8", "cannot be read"),
        ("short.txt", b"too short", "vocab_size must be at most|text is too short"),
        ("columns.jsonl", b'{"body": "x"}\n', "column named text. Found body"),
    ],
)
def test_bad_text(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"), "--data", str(tmp_path / name))
    assert_rejected(argv, tmp_path, message, capsys)


def test_tokens_out_of_range(tmp_path, finished, capsys):
    shutil.copy(finished / "tokenizer.json", tmp_path / "made.json")
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "made.json"))
    assert_rejected([*argv, "--vocab-size", "299"], tmp_path, "out of range. Got vocab_size=299", capsys)
    assert main([*argv, "--vocab-size", "320"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"] == 320


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_cuda_absent(tmp_path, capsys, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = arguments(tmp_path, "--out", str(tmp_path / "run"), "--device", device)
    assert_rejected(argv, tmp_path, f"device {device} was asked for.*--device cpu", capsys)


def test_out_directory(tmp_path, finished, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for out, message in (
        (finished, "already holds a run. Continue it with --resume"),
        (tmp_path / "full", "must be empty"),
        (tmp_path / "file", "out must be a directory that can be written"),
        (tmp_path / "file" / "run", "out must be a directory that can be written"),
        (Path("/proc/run"), "out must be a directory that can be written"),
    ):
        assert_rejected(arguments(tmp_path, "--out", str(out)), tmp_path, message, capsys)
    cache = tmp_path / "file" / "cache"
    message = "cache must be a directory, and .*file is a file. Got cache="
    assert_rejected(arguments(tmp_path, "--cache", str(cache)), tmp_path, message, capsys)
    (tmp_path / "empty").mkdir()
    assert main(arguments(tmp_path, "--out", str(tmp_path / "empty"), "--steps", "1")) == 0


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_resume_with_what_it_has_already(run, tmp_path, monkeypatch):
    """The run's own directory and text, named from where one is."""
    data = json.loads((run / "config.json").read_text())["train"]["data"]
    monkeypatch.chdir(tmp_path)
    argv = ["--resume", str(run), "--out", "copy", "--data", os.path.relpath(data), "--steps", "9"]
    assert main(argv) == 0
    assert json.loads((run / "config.json").read_text())["train"]["data"] == data


def test_resume_without_a_checkpoint(run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoint")
    assert_rejected(["--resume", str(run), "--steps", "9"], tmp_path, "holds no checkpoint", capsys)
    assert_rejected(["--resume", str(tmp_path / "no")], tmp_path, "must be the directory of a run", capsys)
    assert_rejected(["--resume", str(tmp_path)], tmp_path, "must be the directory of a run", capsys)


def test_resume_with_a_damaged_configuration(run, tmp_path, capsys):
    config = (run / "config.json").read_text()
    for damaged in (config[:-20], config.replace('"d_model"', '"width"'), "[]"):
        (run / "config.json").write_text(damaged)
        assert_rejected(["--resume", str(run), "--steps", "9"], tmp_path, "config.json cannot be used", capsys)


@pytest.mark.parametrize(("field", "value"), [("n_layers", ...), ("n_loops", "3"), ("d_ff", 0), ("preset", "demo-2")])
def test_resume_with_a_configuration_of_another_version(run, tmp_path, capsys, field, value):
    config = json.loads((run / "config.json").read_text())
    del config["train"][field]
    if value is not ...:
        config["train"][field] = value
    (run / "config.json").write_text(json.dumps(config))
    assert_rejected(["--resume", str(run), "--steps", "9"], tmp_path, "config.json cannot be used", capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--d-model", "64"], "d_model cannot change when a run is continued. Got d_model=64; it began with 32"),
        (["--seed", "1", "--steps", "9"], "seed cannot change"),
        (["--out", "elsewhere"], "out cannot change"),
        (["--steps", "9", "--epochs", "9"], "steps or epochs, not both"),
        (["--steps", "7"], "Got steps=7, done 8"),
        ([], "is complete at step 8. Continue it with --steps"),
    ],
)
def test_resume_with_other_options(run, tmp_path, capsys, options, message):
    assert_rejected(["--resume", str(run), *options], tmp_path, message, capsys)


def test_presets_have_the_papers_settings():
    for name, batch_size in (("paper-44m", 64), ("paper-129m", 32)):
        config = complete(preset_config(name))
        validate(dataclasses.replace(config, out=None))
        assert model_config(config, 20_000) == PRESETS[name]
        expected = {
            "data": "wikitext-103", "tokenizer": "paper", "vocab_size": 20_000, "seq_len": 256, "stride": 128,
            "batch_size": batch_size, "learning_rate": 3e-4, "schedule": "constant", "warmup_steps": 0,
            "weight_decay": 0.01, "grad_clip": 1.0, "dtype": "bf16", "epochs": 4, "steps": None, "dropout": 0.1,
        }  # fmt: skip
        assert {key: getattr(config, key) for key in expected} == expected


def test_options_override_the_preset():
    config = parse(["--preset", "paper-44m", "--steps", "7", "--no-fused", "--data", "sotu", "--stride", "64"])
    assert (config.steps, config.epochs, config.fused, config.data, config.stride) == (7, None, False, "sotu", 64)
    assert config.d_model == PRESETS["paper-44m"].d_model
    assert parse(["--tokenizer", "some.json"]).vocab_size is None
    demo = parse([])
    assert demo.stride == demo.seq_len == PRESETS["demo"].max_seq_len
    assert demo.vocab_size == PRESETS["demo"].vocab_size
    assert model_config(demo, demo.vocab_size) == PRESETS["demo"]
    assert str(demo.out).startswith("runs/demo-")
    assert demo.dtype in ("bf16", "fp32")


def test_what_takes_long_to_import_is_imported_where_it_is_used():
    slow = ("matplotlib", "sympy", "torch._dynamo", "torch.distributed.checkpoint", "transformers", "triton")
    program = f"import sys, train.run; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PROGRAM.parents[1])
    assert done.stdout == "[]\n", done.stderr


def test_help_shows_the_presets_defaults(capsys):
    for argv, expected in ((["--help"], "0.003"), (["--preset", "paper-44m", "--help"], "wikitext-103")):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert re.search(rf"default: .*({expected})", capsys.readouterr().out)


def test_process_is_stopped_and_continued(tmp_path):
    """From another directory, as a program: SIGTERM while training, then the command that it prints."""
    argv = arguments(tmp_path, "--steps", "100000", "--out", "run")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), "--fused", *argv]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    step = json.loads((tmp_path / "run" / "checkpoint" / "checkpoint.json").read_text())["step"]
    assert 3 <= step < 100_000
    assert f"stopped at step {step} of 100000" in output
    resume = output.rstrip().splitlines()[-1].strip()
    assert resume.endswith(f"{PROGRAM.name} --resume run")
    done = subprocess.run(
        f"{resume} --steps {step + 2}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, step + 3))
