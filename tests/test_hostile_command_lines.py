"""Command lines with options that are unknown, out of range or not of their type: refused in one line, with nothing
written, or accepted. What is accepted is not carried out here."""

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
from hostile import assert_refusal, contents, drawn, outcome
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import arguments

import bench.depth
import bench.encoding
import bench.exits
import bench.gpu
import bench.scaling
import bench.tasks
import train.gate
import train.run
from looped import export
from looped.diagnose import __main__ as diagnose
from looped.generate import __main__ as generate
from train.config import TrainConfig, read_config
from train.paper import __main__ as paper
from train.paper import frontier, judging, sweep

VALUES = ["", "0", "-1", "1", "2", "3", "1e3", "1e309", "nan", "inf", "-inf", "0x10", "1_000", "٣",
          "9223372036854775808", "1" * 40, "True", "no", "None", "x", "é\u2028", "\udcff", "-", "--", "/", "/dev/null",
          "/dev/full", "/proc/self", "~", "*", "[", "a:b", "margin:nan", "margin:1e400", "uniform:1-9999", "poisson:0",
          "poisson:1e9", "geometric:2", "cuda:-1", "cuda:99999999999", "bf16", "rotary", "gated"]  # fmt: skip
STRAY = ["--", "-", "--help=1", "--=", "-x", "--n_loops", "--steps=", "--no-steps", "--no-fused=1", "@file", "--fused"]


def options_of(names: list[str]) -> st.SearchStrategy[list[str]]:
    """Up to four options, with values or without, and now and then a word that belongs nowhere."""
    name, value = st.sampled_from(names), st.sampled_from(VALUES)
    pair = st.tuples(name, value)
    word = pair | pair | pair | st.builds(lambda n, v: (f"{n}={v}",), name, value) | st.tuples(name)
    several = st.lists(word | st.tuples(st.sampled_from(STRAY)), min_size=1, max_size=4)
    return several.map(lambda words: [part for parts in words for part in parts])


def names_of(configuration: Any) -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(configuration)]


def trainer_options() -> list[str]:
    return [name for name in names_of(TrainConfig) if name not in ("--resume", "--cache")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run, in the directory that its text and cache are in."""
    directory = tmp_path_factory.mktemp("finished")
    assert train.run.main(arguments(directory, "--out", str(directory / "run"), "--steps", "1")) == 0
    return directory / "run"


def refused_or_done(main: Callable[[list[str]], Any], argv: list[str], directory: Path) -> None:
    before = contents(directory)
    code, error = outcome(main, argv)
    if code:
        assert_refusal(code, error)
        assert contents(directory) == before


@given(words=options_of(trainer_options()))
@drawn(20)
def test_train(finished, words):
    """As far as the run's directory, which is there only if everything fits. --out may be drawn too: x, nan."""
    nothing = patch.object(train.run, "train", lambda run, interruptions: 0)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), nothing:
        out = Path(folder) / "run"
        argv = arguments(finished.parent, "--out", str(out), "--steps", "1")
        refused_or_done(train.run.main, [*argv, *words], Path(folder))
        if (out / "config.json").exists():
            read_config(out)


@given(words=options_of(trainer_options()))
@drawn(10)
def test_resume(finished, words):
    with patch.object(train.run, "train", lambda run, interruptions: 0):
        before = (finished / "config.json").read_bytes()
        try:
            refused_or_done(train.run.main, ["--resume", str(finished), "--steps", "2", *words], finished)
        finally:
            (finished / "config.json").write_bytes(before)


def accept(*_: object, **__: object) -> NoReturn:
    """Instead of the work: the command line was accepted."""
    raise SystemExit(0)


GENERATE = ["--prompt", "--max-new-tokens", "--n-loops", "--temperature", "--top-k", "--top-p", "--seed", "--exit",
            "--speculate", "--draft-tokens", "--shared-cache", "--device"]  # fmt: skip
DIAGNOSE = ["--model", "--data", "--seq-len", "--scale-loops", "--out", "--tokens", "--loops", "--rounds", "--device"]
GATE = ["--out", "--data", "--steps", "--batch-size", "--learning-rate", "--seed", "--device"]
EXPORT = ["--to"]
RUN_PROGRAMS: dict[str, tuple[Any, Any, str, list[str]]] = {
    "generate": (generate.main, generate, "write", GENERATE),
    "diagnose": (diagnose.main, diagnose, "diagnose_run", DIAGNOSE),
    "gate": (train.gate.main, train.gate, "measure", GATE),
    "export": (export.main, export, "whole_directory", EXPORT),
    "exits": (bench.exits.main, bench.exits, "curves", ["--tokens", "--rounds", "--new-tokens", "--out"]),
}


@given(program=st.sampled_from(sorted(RUN_PROGRAMS)), data=st.data())
@drawn(20)
def test_programs_that_read_a_run(finished, program, data):
    main, module, work, names = RUN_PROGRAMS[program]
    words = data.draw(options_of(names))
    with tempfile.TemporaryDirectory() as folder, patch.object(module, work, accept):
        out = {"gate": ["--out", f"{folder}/out"], "diagnose": ["--out", f"{folder}/out"]}.get(program, [])
        first = {"generate": ["--prompt", "a"], "export": [f"{folder}/out", "--to", "ouro"]}.get(program, [])
        refused_or_done(main, [str(finished), *first, *out, *words], Path(folder))


OTHERS: dict[str, tuple[Any, Any, str, list[str]]] = {
    "depth": (bench.depth.main, bench.depth, "trained", ["--out", "--runs", "--steps", "--tokens", "--supervision"]),
    "tasks": (bench.tasks.main, bench.tasks, "trained", ["--seeds", "--out", "--runs", "p-hop", "addition"]),
    "scaling": (bench.scaling.main, bench.scaling, "readout_sweeps", ["--out", "--rounds", "--smoke"]),
    "gpu": (bench.gpu.main, bench.gpu, "run_all", ["--part", "--results", "--table", "readout"]),
    "sweep": (paper.main, sweep, "_sweep", names_of(sweep.SweepConfig)),
    "claims": (paper.main, judging, "collect", names_of(judging.ClaimsConfig)),
    "frontier": (paper.main, frontier, "measure", names_of(frontier.FrontierConfig)),
}


@given(program=st.sampled_from(sorted(OTHERS)), data=st.data())
@drawn(20)
def test_other_programs(program, data):
    main, module, work, names = OTHERS[program]
    words = data.draw(options_of(names))
    first = {"tasks": ["p-hop"]}.get(program, [program] if main is paper.main else [])
    works = (module, work), (sweep, "load_source"), (sweep, "_sweep")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, chdir(folder):
        for place, name in works:
            stack.enter_context(patch.object(place, name, accept))
        refused_or_done(main, [*first, *words], Path(folder))


FOUND: dict[str, tuple[Any, list[str], str]] = {
    "layers without end": (train.run.main, ["--n-layers", "1000000"], "n_layers must be at most 4,096"),
    "loops without end": (train.run.main, ["--n-loops", "16777216"], "n_loops must be at most 4,096"),
    "a size that overflows": (train.run.main, ["--d-model", "9" * 12], "d_model must be at most 16,777,216"),
    "a number beyond 64 bits": (train.run.main, ["--steps", "1" * 40], "steps must be int | None of 64 bits. Got 111"),
    "a batch without end": (train.run.main, ["--batch-size", "99999999"], "batch_size must be at most 16,777,216"),
    "usage of several lines": (
        diagnose.main,
        ["--tokens", "many", "run"],
        "--tokens: invalid int value",
    ),
    "a value of two dashes": (
        train.gate.main,
        ["run", "--steps=--"],
        "a value other than --. Got --steps=--",
    ),
    "a value that is a list": (
        diagnose.main,
        ["run", "--rounds=--"],
        "a value other than --. Got --rounds=--",
    ),
    "no run to give a gate": (train.gate.main, [], "the following arguments are required: RUN"),
    "an export to nowhere": (export.main, ["run", "--to", "gguf", "out"], "invalid choice: 'gguf'"),
    "a table of no record": (bench.gpu.main, ["--table", "/dev/null/x"], "--table must be a record"),
    "curves of no steps": (bench.depth.main, ["--steps", "0"], "--steps: must be at least 1. Got 0."),
    "exits of no rounds": (bench.exits.main, ["run", "--rounds", "0"], "--rounds: must be at least 1. Got 0."),
    "exits of no tokens": (bench.exits.main, ["run", "--new-tokens", "0"], "--new-tokens: must be at least 1. Got 0."),
    "speeds of no rounds": (bench.scaling.main, ["--rounds", "0"], "--rounds: must be at least 1. Got 0."),
    "a text of nothing": (bench.encoding.main, ["--megabytes", "0"], "--megabytes: must be at least 1. Got 0."),
    "curves that cannot be kept": (bench.depth.main, ["--out", "/dev/null/x"], "out must be a directory that can be"),
    "speeds that cannot be kept": (bench.scaling.main, ["--out", "/dev/null/x"], "out must be a directory that can be"),
    "tasks that cannot be kept": (
        bench.tasks.main,
        ["p-hop", "--out", "/dev/null/x"],
        "out must be a directory that can",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(tmp_path, name):
    """What has once come out as a traceback, in several lines, after the work was done, or never."""
    main, words, message = FOUND[name]
    if main is train.run.main:
        words = [*arguments(tmp_path, "--out", str(tmp_path / "run")), *words]
    before = contents(tmp_path)
    code, error = outcome(main, words)
    assert_refusal(code, error)
    assert message in error
    assert contents(tmp_path) == before


def test_a_model_larger_than_memory(finished, tmp_path):
    """It is not begun, so that the machine does not run out of memory; its text is in the cache."""
    out = tmp_path / "run"
    argv = arguments(finished.parent, "--out", str(out), "--d-model", "16777216")
    code, error = outcome(train.run.main, argv)
    assert_refusal(code, error)
    assert "the model must fit in memory" in error
    assert not out.exists()
