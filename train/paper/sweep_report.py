"""What a sweep found, from the runs' files: sweep.json, sweep.md (the paper's Table 1), exit_gap.png (its Figure 1)."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from train.paper.conditions import PAPER_TABLE
from train.paper.exit_gap import draw_exit_gap
from train.paper.paper_scale import paper_scale
from train.paper.record import write_record
from train.paper.runs import RunResult, by_condition, complete_runs, find_runs, read_run, sweep_settings
from train.paper.tables import condition_table, cost, depth_table, known_values, made_by, page, settings_line


def write_report(out: Path, command: Sequence[str] | None = None) -> list[RunResult]:
    """Write sweep.json, sweep.md and exit_gap.png into ``out``. Returns the results of its runs; if there are none,
    nothing is written. command: that trains them; None: the one that is already there."""
    command = stored_command(out) if command is None else list(command)
    found = find_runs(out)
    results = [read_run(run) for run in found]
    if not results:
        return []
    settings = sweep_settings(found)
    record = {
        "command": command,
        "settings": settings,
        "runs": [dataclasses.asdict(result) for result in results],
        "conditions": [statistics(name, group) for name, group in by_condition(results).items()],
    }
    write_record(out / "sweep.json", record)
    draw_exit_gap(out / "exit_gap.png", complete_runs(results))
    (out / "sweep.md").write_text(markdown(results, settings, command), encoding="utf-8")
    return results


def stored_command(out: Path) -> list[str] | None:
    """The words of the command that last trained in ``out``; None for a sweep that has not kept them."""
    try:
        command = json.loads((out / "sweep.json").read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(word) for word in command] if isinstance(command, list) and command else None


def statistics(condition: str, results: Sequence[RunResult]) -> dict[str, Any]:
    """Mean, smallest and largest value over the complete runs of one condition, and the paper's numbers."""
    measured: dict[str, Any] = {"condition": condition, "complete": len(complete_runs(results))}
    measured["diverged"] = sum(result.status == "diverged" for result in results)
    for name in ("ppl", "state_norm", "exit_gap", "bits_per_byte", "minutes"):
        values = known_values(results, name)
        measured[name] = {"mean": mean(values), "min": min(values), "max": max(values)} if values else None
    return measured | {"paper": PAPER_TABLE.get(condition, {})}


def markdown(results: Sequence[RunResult], settings: dict[str, Any], command: Sequence[str] | None = None) -> str:
    """sweep.md: Table 1, perplexity at every K, the figure, the cost, and the commands for the paper's scale."""
    return page(
        [
            "# Loss placement, readout and the size of the state",
            settings_line(results, settings),
            made_by([shlex.join(command)] if command else []),
            condition_table(results, settings),
            "Perplexity when stopping after K loops, each read as the last, mean over seeds:",
            depth_table(results),
            "![exit gap against the size of the last state](exit_gap.png)",
            cost(results),
            paper_scale(),
        ]
    )
