"""What a sweep trains: conditions by seeds, as options of train/run.py; and whether runs are of one sweep."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.config import RESUMABLE, TrainConfig, comparable, complete, preset_config, read_config, validate
from train.paper.conditions import CONDITIONS, NAMES, SEEDS, Condition
from train.paper.options import check_distinct, check_positive
from train.paper.runs import FoundRun, find_runs
from train.paper.sweep_report import stored_command
from train.run import parse
from train.task import TASKS

# What the sweep itself sets in every run, and what two runs of one sweep may differ in: how they are carried out.
OWN_OPTIONS = {"preset", "data", "steps", "epochs", "supervision", "readout", "penalty", "inter-loop-norm", "seed",
               "out", "resume"}  # fmt: skip
EXECUTION = set(RESUMABLE) - {"steps", "epochs", "eval_tokens"}
SWEEP = ["python", "-m", "train.paper", "sweep"]


@dataclass(frozen=True)
class SweepConfig:
    """Train every condition with every seed and put the results side by side. Options after -- go to train/run.py."""

    out: Path = Path("runs/sweep")
    """Directory of the sweep."""
    preset: Literal["demo", "paper-44m", "paper-129m"] = "demo"
    """Model and training; demo trains on two CPU cores."""
    conditions: tuple[Condition, ...] = NAMES
    """Which conditions to train."""
    seeds: tuple[int, ...] = SEEDS
    """Which seeds; every condition is trained with the first one before any is with the second."""
    steps: int | None = None
    """Optimisation steps of a run. None: the preset's length."""
    epochs: float | None = None
    """Passes over the training windows, instead of steps."""
    data: str | None = None
    """sotu, wikitext-103, or a path or (quoted) glob. None: the preset's."""
    jobs: int = 1
    """Runs at a time. They share the CPU's threads; with CUDA each sees one device, in turn."""
    report_only: bool = False
    """Train nothing; write the tables and the figure again."""
    claims: Path | None = None
    """Directory of a page that judges the paper's claims by the runs, written when they are trained."""


@dataclass(frozen=True)
class Task:
    """A run that is to be trained, and the options of train/run.py that do so from the start."""

    condition: Condition
    seed: int
    directory: Path
    config: TrainConfig
    options: list[str]

    @property
    def name(self) -> str:
        return f"{self.condition:<26} seed {self.seed:<5}"

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"seed-{self.seed}.log")


def plan(config: SweepConfig, extra: Sequence[str] = ()) -> list[Task]:
    """The runs of a sweep, in order: seeds outside, conditions inside, so that what is done first compares.

    ``extra``: further options of train/run.py. Raises ValueError naming the option, the rule and the value.
    """
    check_distinct(config, "conditions", "seeds")
    check_positive(config, "jobs")
    for word in extra:
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("_", "-")
        if word.startswith("--") and name in OWN_OPTIONS:
            raise ValueError(f"{word} is the sweep's own option: it cannot follow ' -- '.")
    shared = ["--preset", config.preset, *extra]
    for name in ("steps", "epochs", "data"):
        if getattr(config, name) is not None:
            shared += [f"--{name}", str(getattr(config, name))]
    base = dataclasses.replace(parse(shared), out=None)
    if base.data in TASKS:
        raise ValueError(f"data must be text in a sweep: the paper has no tasks. Got data={base.data}.")
    if config.jobs > 1 and ":" in base.device:
        raise ValueError(
            f"device must be auto, cpu or cuda with several jobs. Got device={base.device}, jobs={config.jobs}."
        )
    tasks = []
    for seed in config.seeds:
        for condition in config.conditions:
            values = CONDITIONS[condition] | {"seed": seed}
            directory = config.out / condition / f"seed-{seed}"
            run = dataclasses.replace(base, **values)
            validate(run)
            tasks.append(Task(condition, seed, directory, run, [*shared, *options_of(values)]))
    return tasks


def options_of(values: dict[str, Any]) -> list[str]:
    """Fields of TrainConfig as options of train/run.py."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def check_same(out: Path, asked: TrainConfig) -> None:
    """Check that every run in ``out`` is what its directory says and, but for condition and seed, what ``asked`` says.

    Raises ValueError naming the first run and option that differ.
    """
    for run in configured_runs(out):
        stored = stored_config(run.directory)
        expected = dataclasses.replace(asked, seed=run.seed, **CONDITIONS[run.condition])
        for field in dataclasses.fields(TrainConfig):
            before, now = comparable(stored, field.name), comparable(expected, field.name)
            if field.name not in EXECUTION | {"out"} and before != now:
                raise ValueError(
                    f"{field.name} must be that of the runs in {out}, or out another directory. "
                    f"Got {field.name}={now}; {run.directory} has {before}."
                )


def stored_config(directory: Path) -> TrainConfig:
    try:
        return read_config(directory)
    except ValueError as error:
        raise ValueError(
            f"{directory / 'config.json'} cannot be used: remove {directory}. ({error.__cause__!r:.100})"
        ) from error


def check_runs(out: Path) -> None:
    """Check that the runs in ``out`` are what their directories say and were trained alike. Raises as `check_same`."""
    configured = configured_runs(out)
    if configured:
        check_same(out, stored_config(configured[0].directory))


def configured_runs(out: Path) -> list[FoundRun]:
    return [run for run in find_runs(out) if (run.directory / "config.json").exists()]


def sweep_command(out: Path) -> list[str]:
    """The command that trained the runs in ``out``, from its sweep.json; or, if that does not have it, one that would
    train the same, from their configuration, after a line that says so. Empty if there are no runs."""
    command = stored_command(out)
    if command is not None:
        return [shlex.join(command)]
    configured = configured_runs(out)
    if not configured:
        return []
    stored = stored_config(configured[0].directory)
    usual = complete(preset_config(stored.preset))
    own, rest = ["--preset", stored.preset], list[str]()
    for field in dataclasses.fields(TrainConfig):
        name, value = field.name, getattr(stored, field.name)
        if name in CONDITIONS["per-loop-raw"] or name in EXECUTION or name in ("preset", "seed", "out"):
            continue
        # The usual dtype is the machine's own choice, so that it has to be said.
        if name == "dtype" or (value is not None and value != getattr(usual, name)):
            words = own if name.replace("_", "-") in OWN_OPTIONS else rest
            words += options_of({name: value})
    words = [*SWEEP, *own, *(["--", *rest] if rest else [])]
    return ["# the command was not kept; this one trains the same runs, all conditions and seeds:", shlex.join(words)]
