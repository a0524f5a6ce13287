"""What a sweep trains: conditions by seeds, as options of train/run.py."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from train.config import TrainConfig, complete, preset_config, validate
from train.paper.conditions import CONDITIONS, NAMES, RAW, SEEDS, Condition
from train.paper.options import check_options
from train.paper.runs import EXECUTION, Run, configured_runs
from train.run import parse
from train.tasks.task import TASKS

# What the sweep itself sets in every run.
OWN_OPTIONS = {"preset", "data", "steps", "epochs", "supervision", "readout", "penalty", "inter-loop-norm", "seed",
               "out", "resume"}  # fmt: skip
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

    run: Run
    config: TrainConfig
    options: list[str]

    @property
    def name(self) -> str:
        return f"{self.run.condition:<26} seed {self.run.seed:<5}"


def plan(config: SweepConfig, extra: Sequence[str] = ()) -> list[Task]:
    """The runs of a sweep, in order: seeds outside, conditions inside, so that what is done first compares.

    ``extra``: further options of train/run.py. Raises ValueError naming the option, the rule and the value.
    """
    check_options(config, distinct=("conditions", "seeds"), positive=("jobs",))
    for word in extra:
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("_", "-")
        if word.startswith("--") and name in OWN_OPTIONS:
            raise ValueError(f"{word} is the sweep's own option: it cannot follow ' -- '.")
    chosen = {name: getattr(config, name) for name in ("steps", "epochs", "data")}
    chosen_options = options_of({name: value for name, value in chosen.items() if value is not None})
    shared = ["--preset", config.preset, *extra, *chosen_options]
    base = dataclasses.replace(parse(shared), out=None)
    if base.data in TASKS:
        raise ValueError(f"data must be text in a sweep: the paper has no tasks. Got data={base.data}.")
    if config.jobs > 1 and ":" in base.device:
        raise ValueError(
            f"device must be auto, cpu or cuda with several jobs. Got device={base.device}, jobs={config.jobs}."
        )
    tasks = []
    for seed, condition in product(config.seeds, config.conditions):
        values = CONDITIONS[condition] | {"seed": seed}
        run = Run(condition, seed, config.out / condition / f"seed-{seed}")
        tasks.append(Task(run, dataclasses.replace(base, **values), [*shared, *options_of(values)]))
        validate(tasks[-1].config)
    return tasks


def options_of(values: dict[str, Any]) -> list[str]:
    """Fields of TrainConfig as options of train/run.py."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def stored_command(out: Path) -> list[str] | None:
    """The words of the command that last trained in ``out``; None for a sweep that has not kept them."""
    try:
        command = json.loads((out / "sweep.json").read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(word) for word in command] if isinstance(command, list) and command else None


def sweep_command(out: Path) -> list[str]:
    """The command that trained the runs in ``out``, from its sweep.json; or, if that does not have it, one that would
    train the same, from their configuration, after a line that says so. Empty if there are no runs."""
    command, configured = stored_command(out), configured_runs(out)
    if command is not None:
        return [shlex.join(command)]
    if not configured:
        return []
    stored = configured[0].config
    usual = complete(preset_config(stored.preset))
    of_sweep, of_run = ["--preset", stored.preset], list[str]()
    for name in (field.name for field in dataclasses.fields(TrainConfig)):
        value = getattr(stored, name)
        if name in CONDITIONS[RAW].keys() | EXECUTION | {"preset", "seed", "out"}:
            continue
        # The usual dtype is the machine's own choice, so that it has to be said.
        if name == "dtype" or (value is not None and value != getattr(usual, name)):
            words = of_sweep if name.replace("_", "-") in OWN_OPTIONS else of_run
            words += options_of({name: value})
    words = [*SWEEP, *of_sweep, *(["--", *of_run] if of_run else [])]
    return ["# the command was not kept; this one trains the same runs, all conditions and seeds:", shlex.join(words)]
