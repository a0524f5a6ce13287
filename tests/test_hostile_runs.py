"""Run directories whose files are damaged, lie, are swapped, or are no files.

Every program that reads one refuses it in one line, or does its work."""

import ast
import contextlib
import json
import math
import os
import pickle
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hostile import assert_refusal, assert_says_why, bounded, contents, damaged_bytes, drawn, lying, outcome
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import arguments, reseal

import train.gate
import train.run
from looped import export
from looped.diagnose import __main__ as diagnose
from looped.generate import __main__ as generate_program
from looped.run_directory import load_run
from train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("no_picture")
CHECKPOINT = ("checkpoint/model.safetensors", "checkpoint/optimizer.safetensors", "checkpoint/rng.safetensors")
JSON = ("config.json", "tokenizer.json", "summary.json", "checkpoint/checkpoint.json", "diagnosis/diagnosis.json")
FILES = (*JSON, *CHECKPOINT, "validation.safetensors", "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    run = directory / "run"
    assert train.run.main(arguments(directory, "--out", str(run), "--steps", "2", "--eval-tokens", "32")) == 0
    assert diagnose.main([str(run), "--tokens", "32", "--loops", "4", "--rounds", "0"]) == 0
    shutil.rmtree(directory / "cache" / "nothing", ignore_errors=True)
    return run


@contextmanager
def copied(run: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=run.parent) as folder:
        yield Path(shutil.copytree(run, Path(folder) / "run"))


# What is done to a run ------------------------------------------------------------------------------------------------


def cut_or_flipped(run: Path, draw: random.Random) -> None:
    path = run / draw.choice(FILES)
    path.write_bytes(damaged_bytes(path.read_bytes(), draw))


def lies(run: Path, draw: random.Random) -> None:
    path = run / draw.choice(JSON)
    path.write_text(json.dumps(lying(json.loads(path.read_text()), draw)))


def another_kind(run: Path, draw: random.Random) -> None:
    """A file is missing, a directory, a pipe, a link to itself, to nothing or to the null device; or is empty."""
    path = run / draw.choice((*FILES, "checkpoint"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    match draw.randrange(7):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path)
        case 3:
            path.symlink_to("nowhere")
        case 4:
            path.symlink_to("/dev/null")
        case 5:
            path.touch()


def swapped(run: Path, draw: random.Random) -> None:
    one, other = (run / name for name in draw.sample(FILES, 2))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def other_tensors(run: Path, draw: random.Random) -> None:
    """Tensors of a safetensors file are others."""
    path = run / draw.choice((*CHECKPOINT, "validation.safetensors"))
    tensors = safetensors.numpy.load_file(path)
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    others: list[Callable[[], Any]] = [
        lambda: value.reshape(-1)[:0],
        lambda: value.reshape(-1)[: value.size // 2],
        lambda: value.reshape(1, *value.shape),
        lambda: value.astype(np.float16),
        lambda: np.full_like(value, -1) if value.dtype.kind == "i" else np.full(value.shape, np.iinfo(np.int64).min),
        lambda: np.full(value.shape, math.nan),
        lambda: np.zeros(value.shape, np.int64),
        lambda: np.full(value.shape, np.iinfo(np.int64).max),
        lambda: np.full(value.shape, np.iinfo(np.uint64).max),
        lambda: value[::-1].copy() if value.ndim else value,
        lambda: np.array(True),
    ]
    if draw.randrange(4) == 0:
        del tensors[name]
        tensors[draw.choice([name + "x", "", "tokens", "bounds", "targets", "bytes_per_token"])] = value
    else:
        tensors[name] = draw.choice(others)()
    path.write_bytes(safetensors.numpy.save(tensors))


def rows_of_garbage(run: Path, draw: random.Random) -> None:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(lying(row, draw)) for row in rows]
    lines.insert(
        draw.randrange(len(lines) + 1), draw.choice(["[" * 9000, "{}", "null", "\x00", json.dumps({"step": 10**30})])
    )
    path.write_text("\n".join(lines))


DAMAGES = [cut_or_flipped, lies, lies, another_kind, swapped, other_tensors, other_tensors, rows_of_garbage]


def damaged(run: Path, seed: int) -> None:
    draw = random.Random(seed)
    draw.choice(DAMAGES)(run, draw)
    if draw.random() < 0.7 and all((run / name).is_file() for name in (*CHECKPOINT, "checkpoint/checkpoint.json")):
        try:
            reseal(run / "checkpoint")
        except (OSError, ValueError, LookupError, TypeError):
            return


# Who reads it ---------------------------------------------------------------------------------------------------------


def resumed(run: Path, aside: Path) -> list[str]:
    return ["--resume", str(run), "--steps", "3", "--cache", str(aside.parent.parent / "cache")]


PROGRAMS: dict[str, tuple[Any, Callable[[Path, Path], list[str]]]] = {
    "train": (train.run.main, resumed),
    "generate": (generate_program.main, lambda run, aside: [str(run), "--prompt", "a b", "--max-new-tokens", "2"]),
    "ouro": (export.main, lambda run, aside: [str(run), "--to", "ouro", str(aside)]),
    "transformers": (export.main, lambda run, aside: [str(run), "--to", "transformers", str(aside)]),
    "gate": (train.gate.main, lambda run, aside: [str(run), "--steps", "1", "--out", str(aside)]),
    "diagnose": (
        diagnose.main,
        lambda run, aside: [str(run), "--tokens", "32", "--loops", "4", "--rounds", "0", "--out", str(aside)],
    ),
}


def assert_done_or_refused(program: str, run: Path) -> None:
    """Exit code 0; or 2, one line on stderr, and nothing written; or 1, if what was read makes training diverge."""
    main, words = PROGRAMS[program]
    aside = run.parent / "aside"
    before = contents(run)
    code, error = outcome(main, words(run, aside))
    if code == 1:
        assert re.fullmatch(r"error: [^\n]+\n", error), error
    elif code:
        assert_refusal(code, error)
        assert contents(run) == before
        assert not aside.exists()
        assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_sound_run_is_read(finished, program):
    with copied(finished) as run:
        main, words = PROGRAMS[program]
        code, error = outcome(main, words(run, run.parent / "aside"))
        assert code == (2 if program == "ouro" else 0), error


@given(seed=st.integers(0, 2**32), program=st.sampled_from(["train", "generate", "ouro", "gate"]))
@drawn(12)
def test_programs(finished, seed, program):
    with copied(finished) as run:
        damaged(run, seed)
        assert_done_or_refused(program, run)


@given(seed=st.integers(0, 2**32), program=st.sampled_from(["transformers", "diagnose"]))
@drawn(2)
def test_slow_programs(finished, seed, program):
    with copied(finished) as run:
        damaged(run, seed)
        assert_done_or_refused(program, run)


@given(seed=st.integers(0, 2**32))
@drawn(30)
def test_readers(finished, seed):
    with copied(finished) as run:
        damaged(run, seed)
        with bounded():
            try:
                load_run(run)
            except ValueError as error:
                assert_says_why(error)
            if (run / "metrics.jsonl").is_file():
                rows = read_metrics(run / "metrics.jsonl")
                assert all(row["step"] >= 1 for row in rows)


# Found ----------------------------------------------------------------------------------------------------------------


def pipe(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)


def rewritten(run: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A safetensors file with other tensors, in a checkpoint whose record says that it is whole."""
    path = run / name
    path.write_bytes(safetensors.numpy.save(change(safetensors.numpy.load_file(path))))
    reseal(run / "checkpoint")


def said(run: Path, name: str, change: Callable[[Any], Any]) -> None:
    path = run / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def training(run: Path, drop: str = "", **changes: Any) -> None:
    """Change the configuration of the training, or drop a field of it."""

    def change(found: Any) -> Any:
        fields = found["train"] | changes
        return {**found, "train": {name: fields[name] for name in fields if name != drop}}

    said(run, "config.json", change)


def overwritten(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    reseal(run / "checkpoint")


QKV = "blocks.0.attention.qkv.weight"
FOUND: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a pipe for config.json": ("generate", lambda run: pipe(run, "config.json"), "not a regular file"),
    "a pipe for checkpoint.json": ("train", lambda run: pipe(run, "checkpoint/checkpoint.json"), "is torn"),
    "a pipe for weights": ("generate", lambda run: pipe(run, CHECKPOINT[0]), "is torn"),
    "a pipe for validation text": ("gate", lambda run: pipe(run, "validation.safetensors"), "not a regular file"),
    "tokens of no dimension": (
        "generate",
        lambda run: rewritten(run, "validation.safetensors", lambda found: found | {"tokens": np.array(3)}),
        "must be integers",
    ),
    "tokens below 0": (
        "generate",
        lambda run: rewritten(run, "validation.safetensors", lambda found: found | {"tokens": np.array([-1, 3])}),
        "must be at least 0. Got -1",
    ),
    "tokens that are no integers": (
        "generate",
        lambda run: rewritten(run, "validation.safetensors", lambda found: found | {"tokens": np.array([math.nan])}),
        "must be integers",
    ),
    "weights that are integers": (
        "gate",
        lambda run: rewritten(run, CHECKPOINT[0], lambda found: found | {QKV: found[QKV].astype(np.int64)}),
        r"another shape: .*qkv.weight is \[96, 32\] torch.int64",
    ),
    "moments of another dtype": (
        "train",
        lambda run: rewritten(
            run, CHECKPOINT[1], lambda found: found | {f"{QKV}.exp_avg": found[f"{QKV}.exp_avg"].astype(np.float16)}
        ),
        "another shape: the optimizer's exp_avg of .* torch.float16",
    ),
    "a moment without the other": (
        "train",
        lambda run: rewritten(
            run, CHECKPOINT[1], lambda found: {key: found[key] for key in found if key != f"{QKV}.exp_avg_sq"}
        ),
        "must hold exp_avg, exp_avg_sq, step of AdamW for .*qkv",
    ),
    "moments that are no safetensors": ("train", lambda run: overwritten(run, CHECKPOINT[1], b"{}"), "cannot be read"),
    "a step without end": (
        "generate",
        lambda run: said(run, "checkpoint/checkpoint.json", lambda record: record | {"step": math.inf}),
        "is torn",
    ),
    "a configuration of other types": (
        "train",
        lambda run: training(run, data={}),
        "config.json cannot be used .*data must be str",
    ),
    "a training without supervision": (
        "diagnose", lambda run: training(run, drop="supervision"), "config.json cannot be used .*supervision",
    ),
    "a penalty in words": (
        "diagnose", lambda run: training(run, penalty="x"), "config.json cannot be used .*penalty must be float",
    ),
    "a gate's option in words": (
        "transformers",
        lambda run: training(run, gate_beta="x", supervision="gated"),
        "config.json cannot be used .*gate_beta must be float",
    ),
    "a number of loops that is true": (
        "train", lambda run: training(run, n_loops=True), "config.json cannot be used .*n_loops must be int",
    ),
    "a model larger than any memory": (
        "generate",
        lambda run: said(run, "config.json", lambda found: {**found, "model": found["model"] | {"d_ff": 1 << 24}}),
        "checkpoint of another shape",
    ),
    "a model without end": (
        "generate",
        lambda run: said(run, "config.json", lambda found: {**found, "model": found["model"] | {"n_layers": 10**9}}),
        "n_layers must be at most 4,096",
    ),
    "a configuration nested without end": (
        "generate",
        lambda run: (run / "config.json").write_text("[" * 100_000),
        "config.json cannot be used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(finished, name):
    """What has once come out as a traceback, or not at all."""
    program, damage, message = FOUND[name]
    with copied(finished) as run:
        damage(run)
        main, words = PROGRAMS[program]
        code, error = outcome(main, words(run, run.parent / "aside"))
        assert_refusal(code, error)
        assert re.search(message, error), error


@pytest.mark.parametrize("lie", [{"bad_steps": "many"}, {"bad_steps": -1}, {"bad_steps": 1 << 63}, {"step": 1 << 63}])
def test_a_count_that_is_none_makes_no_row(finished, lie):
    with copied(finished) as run:
        line = (run / "metrics.jsonl").read_text().splitlines()[0]
        (run / "metrics.jsonl").write_text(json.dumps(json.loads(line) | lie) + "\n")
        assert read_metrics(run / "metrics.jsonl") == []


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", FILES)
def test_no_pickle_is_loaded(finished, name):
    """In whichever file it stands, as pickle or as torch.save writes it, under a seal that fits."""
    with copied(finished) as run:
        trace = run.parent / "trace"
        for write in (pickle.dump, torch.save):
            with open(run / name, "wb") as file:
                write({"model": Planted(trace)}, file)
            if name != "checkpoint/checkpoint.json":
                reseal(run / "checkpoint")
            outcome(train.run.main, resumed(run, run.parent / "aside"))
            with contextlib.suppress(ValueError):
                load_run(run)
            assert not trace.exists()
        with open(run / name, "rb") as file:
            torch.load(file, weights_only=False)  # it would have run
        assert trace.exists()


RUNS_CODE = {"eval", "exec", "pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "yaml"}


# Whether an error can be sent to another process: pickled and unpickled at once, in memory.
NOT_OF_A_FILE = {"train/processes.py": ["pickle.loads", "pickle.dumps"]}


def calls_that_run_code(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if name.split(".")[0] in RUNS_CODE:
                yield name
            if name == "torch.load" and arguments.get("weights_only") != "True":
                yield name
            if arguments.get("allow_pickle") == "True":
                yield name


def test_nothing_that_is_read_is_run():
    """No file is unpickled or evaluated, anywhere in the packages."""
    root = Path(__file__).parents[1]
    files = [path for package in ("kernels", "looped", "train", "bench") for path in (root / package).rglob("*.py")]
    assert len(files) > 100
    found = {
        str(path.relative_to(root)): list(calls_that_run_code(ast.parse(path.read_text(encoding="utf-8"))))
        for path in files
    }
    assert {path: names for path, names in found.items() if names} == NOT_OF_A_FILE
    assert list(calls_that_run_code(ast.parse("torch.load(x); pickle.loads(y); np.load(z, allow_pickle=True)")))
