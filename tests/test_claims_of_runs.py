"""The claims as a command: from the runs of a sweep to the page, and what it refuses."""

import json
import re
import shlex
import shutil
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import reseal
from tiny_sweep import assert_rejected, finished_sweep

from looped.diagnose.record import read_diagnosis_of_run
from train.paper import judging
from train.paper.__main__ import main
from train.paper.claims import CLAIMS

RUN = Path("per-loop-rmsnorm") / "seed-7"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A sweep of one run, whose command is not known."""
    directory = tmp_path_factory.mktemp("sweep")
    shutil.copytree(finished_sweep(tmp_path_factory) / "sweep" / RUN, directory / RUN)
    return directory


def claims_words(runs: Path, out: Path, *options: str) -> list[str]:
    return ["claims", "--runs", str(runs), "--out", str(out), "--tokens", "64", "--seeds", "7", *options]


def test_a_sweep_from_end_to_end(trained, tmp_path, capsys, monkeypatch):
    out, run = tmp_path / "new" / "page", trained / RUN
    command = claims_words(trained, out)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "diagnosing per-loop-rmsnorm seed 7" in printed
    assert "1 not testable at this scale" in printed
    record = json.loads((out / "claims.json").read_text())
    number = next(number for number, claim in enumerate(CLAIMS) if claim.title.startswith("The loops make no use"))
    kept = read_diagnosis_of_run(run, n_tokens=64, horizon=30)
    assert record["claims"][number]["values_by_seed"]["7"][0] == kept.measured.clamp.both.change[-1]
    assert record["claims"][0]["mark"] == "not measured"
    assert record["made"]["versions"]["torch"]
    assert record["commands"][-1] == shlex.join(["python", "-m", "train.paper", *command])
    assert record["commands"][0].startswith("# the command was not kept")
    assert "--steps 8 " in record["commands"][1]
    assert " -- --vocab-size 300 " in record["commands"][1]

    monkeypatch.setattr(judging, "diagnose_run", None)
    assert main(command) == 0  # the diagnosis is reused
    longer = claims_words(trained, out, "--tokens", "80")  # one window more
    with pytest.raises(TypeError, match="not callable"):
        main(longer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "nowhere"], "runs must hold a complete run of the seeds. nowhere"),
        (["--seeds", "42"], "runs must hold a complete run"),
        (["--seeds", "42", "42"], "seeds must be at least one, and each only once. Got 42 42"),
        (["--tokens", "31"], "tokens must be at least two windows of seq_len=16"),
        (["--jobs", "0"], "jobs must be at least 1. Got jobs=0"),
        (["--device", "cuda"], "device must be one that PyTorch finds here. Got device=cuda"),
        (["--out", "{file}/page"], "out must be a directory that can be written"),
        (["--frobnicate"], "frobnicate"),
    ],
)
def test_bad_input(trained, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.rmtree(trained / RUN / "diagnosis", ignore_errors=True)
    (tmp_path / "file").write_text("")
    given = [option.format(file=tmp_path / "file") for option in options]
    assert_rejected(claims_words(trained, tmp_path / "page", *given), re.escape(message), capsys, tmp_path)


def test_other_numbers_of_loops_are_refused(two, tmp_path, capsys):
    path = two / "per-loop-rmsnorm" / "seed-42" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"evaluation": summary["evaluation"][:3]}))
    words = claims_words(two, tmp_path / "page", "--seeds", "42")
    assert_rejected(words, "n_loops must be 4, the paper's. .*seed-42 has 3", capsys, tmp_path)


@pytest.fixture
def two(trained, tmp_path) -> Path:
    """A sweep of two seeds, which are the same run but for their names."""
    for seed in (42, 101):
        run = tmp_path / "sweep" / "per-loop-rmsnorm" / f"seed-{seed}"
        shutil.copytree(trained / RUN, run, ignore=shutil.ignore_patterns("diagnosis"))
        config = json.loads((run / "config.json").read_text())
        config["train"]["seed"] = seed
        (run / "config.json").write_text(json.dumps(config))
    return tmp_path / "sweep"


def test_a_run_that_has_diverged_is_left_out(two, tmp_path, capsys):
    path = two / "per-loop-rmsnorm" / "seed-101" / "checkpoint" / "model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(path).items()}, path)
    reseal(path.parent)
    assert main(claims_words(two, tmp_path / "page", "--seeds", "42", "101")) == 0
    printed = capsys.readouterr().out
    assert "left out: per-loop-rmsnorm seed 101 has diverged" in printed
    assert printed.index("left out") < printed.index("diagnosing per-loop-rmsnorm seed 42")
    text = (tmp_path / "page" / "claims.md").read_text()
    assert "`per-loop-rmsnorm` seed 101 (diverged)" in text
    record = json.loads((tmp_path / "page" / "claims.json").read_text())
    assert {tuple(one["values_by_seed"]) for one in record["claims"] if one.get("values_by_seed")} == {("42",)}


def test_runs_of_different_settings_are_refused_before_any_work(two, tmp_path, capsys):
    config = two / "per-loop-rmsnorm" / "seed-101" / "config.json"
    config.write_text(config.read_text().replace('"learning_rate": 0.003', '"learning_rate": 0.1'))
    words = claims_words(two, tmp_path / "page", "--seeds", "42", "101")
    assert_rejected(words, "learning_rate must be that of the runs", capsys, tmp_path)


def test_several_at_a_time_give_the_same(two, tmp_path, monkeypatch):
    """Seeds that are the same run have the same diagnosis, whichever process made it; here forks."""
    fork = get_context("fork")
    monkeypatch.setattr(judging, "get_context", {"spawn": fork}.__getitem__)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the program sets where nobody has
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a fork has no other thread
    try:
        assert main(claims_words(two, tmp_path / "page", "--seeds", "42", "101", "--jobs", "2")) == 0
    finally:
        torch.set_num_threads(threads)
    first, second = (
        read_diagnosis_of_run(two / "per-loop-rmsnorm" / f"seed-{seed}", n_tokens=64, horizon=30) for seed in (42, 101)
    )
    assert first.measured.depth.ce == pytest.approx(second.measured.depth.ce)
    record = json.loads((tmp_path / "page" / "claims.json").read_text())
    assert set(record["measurements"][0]["values_by_seed"]["per-loop-rmsnorm"]) == {"42", "101"}
