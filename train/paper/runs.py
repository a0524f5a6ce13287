"""The runs of a sweep, ``<condition>/seed-<seed>/`` in its directory, and what each of them found."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from train import checkpoint
from train.metrics import read_metrics
from train.paper.conditions import NAMES, Condition

Status = Literal["absent", "unfinished", "checkpoint", "diverged", "complete"]
SHARED_SETTINGS = (
    "preset", "data", "tokenizer", "vocab_size", "n_loops", "seq_len", "batch_size", "steps", "epochs",
    "learning_rate", "dtype", "fused", "eval_tokens",
)  # fmt: skip


class FoundRun(NamedTuple):
    """Where a run is."""

    condition: Condition
    seed: int
    directory: Path

    def __str__(self) -> str:
        return f"{self.condition} seed {self.seed}"


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


def find_runs(out: Path, conditions: Sequence[Condition] = NAMES) -> list[FoundRun]:
    """Every run of a sweep, in the order of ``conditions``, then of the seeds."""
    found = []
    for condition in conditions:
        seeds = [path for path in (out / condition).glob("seed-*") if path.is_dir() and path.name[5:].isdecimal()]
        found += sorted(FoundRun(condition, int(path.name[5:]), path) for path in seeds)
    return found


def status(run: Path) -> Status:
    """How far the run in a directory got. unfinished: begun, and nothing to continue from."""
    if not run.is_dir() or not any(run.iterdir()):
        return "absent"
    if (run / "summary.json").exists():
        return "complete"
    rows = read_metrics(run / "metrics.jsonl")
    if rows and rows[-1]["loss"] is None:
        return "diverged"
    return "unfinished" if checkpoint.find(run) is None else "checkpoint"


def read_run(run: FoundRun) -> RunResult:
    """The result of a run, however far it got. Raises ValueError for a damaged summary.json."""
    state, rows = status(run.directory), read_metrics(run.directory / "metrics.jsonl")
    steps = rows[-1]["step"] if rows else 0
    begun = RunResult(run.condition, run.seed, state, steps, _training_minutes(rows), [])
    if state != "complete":
        return begun
    path = run.directory / "summary.json"
    try:
        summary = json.loads(path.read_text())
        taken = {name: summary[name] for name in ("evaluation", "parameters", "device", "versions", "commit")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r:.100}). Remove {run.directory}.") from error
    return dataclasses.replace(begun, **taken)


def _training_minutes(rows: Sequence[dict[str, Any]]) -> float:
    """From the rates in metrics.jsonl, and so of all the processes that a run was continued in."""
    before = [0, *(row["tokens"] for row in rows)]
    return sum((row["tokens"] - old) / row["tokens_per_second"] for old, row in zip(before, rows, strict=False)) / 60


def sweep_settings(found: Sequence[FoundRun]) -> dict[str, Any]:
    """The configuration that the runs share: that of the first one that has written it."""
    for run in found:
        path = run.directory / "config.json"
        if path.exists():
            stored = json.loads(path.read_text())
            config = stored["train"] | {"vocab_size": stored["model"]["vocab_size"]}
            return {name: config[name] for name in SHARED_SETTINGS}
    return {}


def complete_runs(results: Sequence[RunResult]) -> list[RunResult]:
    return [result for result in results if result.status == "complete"]


def by_condition(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.condition, []).append(result)
    return groups
