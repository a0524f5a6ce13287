"""The runs of a sweep, ``<condition>/seed-<seed>/`` in its directory: where they are, and what each of them found."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from looped import run_directory
from train import checkpoint
from train.config import RESUMABLE, TrainConfig, comparable, read_config
from train.metrics import read_metrics
from train.paper.conditions import CONDITIONS, NAMES, Condition

Status = Literal["absent", "unfinished", "checkpoint", "diverged", "complete"]
EXECUTION = set(RESUMABLE) - {"steps", "epochs", "eval_tokens"}  # how a run is carried out, not what it trains
SHARED_SETTINGS = (
    "preset", "data", "tokenizer", "vocab_size", "n_loops", "seq_len", "batch_size", "steps", "epochs",
    "learning_rate", "dtype", "fused", "eval_tokens",
)  # fmt: skip


class Run(NamedTuple):
    """Where a run is."""

    condition: Condition
    seed: int
    directory: Path

    def __str__(self) -> str:
        return f"{self.condition} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What train/run.py printed."""
        return self.directory.with_name(f"seed-{self.seed}.log")

    @property
    def status(self) -> Status:
        """How far it got. unfinished: begun, and nothing to continue from."""
        if not self.directory.is_dir() or not any(self.directory.iterdir()):
            return "absent"
        if (self.directory / "summary.json").exists():
            return "complete"
        if (self.directory / "diverged.json").exists():
            return "diverged"
        return "unfinished" if checkpoint.find(self.directory) is None else "checkpoint"

    @property
    def config(self) -> TrainConfig:
        """What it trains, as it has written it down. Raises ValueError if that cannot be used."""
        try:
            return read_config(self.directory)
        except ValueError as error:
            raise ValueError(
                f"{self.directory / 'config.json'} cannot be used: remove {self.directory}. ({error.__cause__!r:.100})"
            ) from error


@dataclass(frozen=True)
class RunResult:
    """One run. steps: done so far. minutes: spent in training. evaluation: the rows of summary.json, K = 1..n_loops,
    empty unless the run is complete; so is what follows it."""

    condition: str
    seed: int
    status: Status
    steps: int
    minutes: float
    evaluation: list[dict[str, Any]]
    parameters: int | None = None
    device: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    commit: str | None = None

    def at(self, n_loops: int, name: str) -> float:
        """A number of the evaluation after K = n_loops loops; JSON's null is one that is not finite."""
        value = self.evaluation[n_loops - 1].get(name)
        return math.nan if value is None else value

    @property
    def ppl(self) -> float:
        """Perplexity after the last loop."""
        return self.at(len(self.evaluation), "ppl")

    @property
    def state_norm(self) -> float:
        """Mean over tokens of ||H_K||_2 after the last loop."""
        return self.at(len(self.evaluation), "state_norm")

    @property
    def exit_gap(self) -> float:
        """CE(K = 1) - CE(K = n_loops), nats."""
        return self.at(1, "ce") - self.at(len(self.evaluation), "ce")

    @property
    def bits_per_byte(self) -> float | None:
        """After the last loop; None for tokenizers that lose text."""
        return self.evaluation[-1]["bits_per_byte"]


def read_runs(out: Path, conditions: Sequence[Condition] = NAMES) -> dict[Run, RunResult]:
    """Every run of a sweep, however far it got, in the order of `find_runs`. Raises as `read_run`."""
    return {run: read_run(run) for run in find_runs(out, conditions)}


def find_runs(out: Path, conditions: Sequence[Condition] = NAMES) -> list[Run]:
    """Every run of a sweep, in the order of ``conditions``, then of the seeds."""
    found = []
    for condition in conditions:
        seeds = [path for path in (out / condition).glob("seed-*") if path.is_dir() and path.name[5:].isdecimal()]
        found += sorted(Run(condition, int(path.name[5:]), path) for path in seeds)
    return found


def configured_runs(out: Path) -> list[Run]:
    """Those that have written what they train."""
    return [run for run in find_runs(out) if (run.directory / "config.json").exists()]


def read_run(run: Run) -> RunResult:
    """The result of a run, however far it got. Raises ValueError for a damaged summary.json."""
    status, rows = run.status, read_metrics(run.directory / "metrics.jsonl")
    # From the rates, and so the time of all the processes that the run was continued in.
    before = [0, *(row["tokens"] for row in rows)]
    parts = [(row["tokens"] - old, row["tokens_per_second"]) for old, row in zip(before, rows, strict=False)]
    seconds = [tokens / rate for tokens, rate in parts if rate]
    result = RunResult(run.condition, run.seed, status, rows[-1]["step"] if rows else 0, sum(seconds) / 60, [])
    if status != "complete":
        return result
    path = run.directory / "summary.json"
    try:
        summary = json.loads(path.read_text())
        taken = {name: summary[name] for name in ("evaluation", "parameters", "device", "versions", "commit")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r:.100}). Remove {run.directory}.") from error
    return dataclasses.replace(result, **taken)


def sweep_settings(out: Path) -> dict[str, Any]:
    """The configuration that the runs in ``out`` share; empty if none has written it."""
    for run in configured_runs(out):
        stored = run_directory.read_config(run.directory)
        config = stored["train"] | {"vocab_size": stored["model"]["vocab_size"]}
        return {name: config[name] for name in SHARED_SETTINGS}
    return {}


def check_alike(out: Path, config: TrainConfig | None = None) -> None:
    """Check that every run in ``out`` is what its directory says and, but for condition and seed, what ``config`` says.

    None: what the first of them was trained with. Raises ValueError naming the first run and option that differ.
    """
    for run in configured_runs(out):
        stored = run.config
        config = config or stored
        expected = dataclasses.replace(config, seed=run.seed, **CONDITIONS[run.condition])
        for name in TrainConfig.__dataclass_fields__:
            before, now = comparable(stored, name), comparable(expected, name)
            if name not in EXECUTION | {"out"} and before != now:
                raise ValueError(
                    f"{name} must be that of the runs in {out}, or out another directory. "
                    f"Got {name}={now}; {run.directory} has {before}."
                )


def complete_runs(results: Sequence[RunResult]) -> list[RunResult]:
    return [result for result in results if result.status == "complete"]


def by_condition(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    names = dict.fromkeys(result.condition for result in results)
    return {name: [result for result in results if result.condition == name] for name in names}
