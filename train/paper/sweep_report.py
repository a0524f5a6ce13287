"""What a sweep found, from the runs' files: sweep.json, sweep.md (the paper's Table 1), exit_gap.png (its Figure 1)."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from train.metrics import write_record
from train.paper.conditions import PAPER_TABLE
from train.paper.figures import draw_exit_gap
from train.paper.paper_scale import paper_scale
from train.paper.plan import stored_command
from train.paper.runs import RunResult, by_condition, complete_runs, read_runs, sweep_settings
from train.paper.tables import condition_table, cost, depth_table, known_values, made_by, page, settings_line


def write_report(out: Path, command: Sequence[str] | None = None) -> list[RunResult]:
    """Write the report of the runs in ``out`` into it. Returns their results; if there are none, nothing is written.

    command: that trains them; None: the one that is already there.
    """
    command = command or stored_command(out)
    results = list(read_runs(out).values())
    if not results:
        return []
    settings = sweep_settings(out)
    record = {
        "command": command,
        "settings": settings,
        "runs": [dataclasses.asdict(result) for result in results],
        "conditions": [statistics(name, group) for name, group in by_condition(results).items()],
    }
    write_record(out / "sweep.json", record)
    draw_exit_gap(out / "exit_gap.png", complete_runs(results))
    sections = [
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
    (out / "sweep.md").write_text(page(sections), encoding="utf-8")
    return results


def statistics(condition: str, results: Sequence[RunResult]) -> dict[str, Any]:
    """Mean, smallest and largest value over the complete runs of one condition, and the paper's numbers."""
    measured: dict[str, Any] = {"condition": condition, "complete": len(complete_runs(results))}
    measured["diverged"] = sum(result.status == "diverged" for result in results)
    for name in ("ppl", "state_norm", "exit_gap", "bits_per_byte", "minutes"):
        values = known_values(results, name)
        measured[name] = {"mean": mean(values), "min": min(values), "max": max(values)} if values else None
    return measured | {"paper": PAPER_TABLE.get(condition, {})}
