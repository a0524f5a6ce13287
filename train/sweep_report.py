"""What a sweep found: sweep.json, sweep.md (the paper's Table 1) and exit_gap.png (its Figure 1), from the runs' files.

A sweep's directory holds ``<condition>/seed-<seed>/``, each the directory of a run.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from looped.diagnose.figures import MARKERS, colours_of
from train import checkpoint
from train.metrics import read_metrics, write_json
from train.paper_scale import paper_scale

Status = Literal["absent", "unfinished", "checkpoint", "diverged", "complete"]

# Sharma & Vu (arXiv 2606.24898), 44M / 129M where they give both: perplexity and norm of the last state, and
# CE(K=1) - CE(K=4), which for the per-loop rows is the logarithm of the quotient of two perplexities at 129M.
PAPER = {
    "terminal-rmsnorm": {"ppl": "5.40 / 4.88", "exit_gap": "3.98"},
    "per-loop-rmsnorm": {"ppl": "6.04 / 5.35", "state_norm": "39,207 / 56,051", "exit_gap": "0.002"},
    "per-loop-raw": {"ppl": "- / 4.55", "state_norm": "tens", "exit_gap": "0.028"},
    "per-loop-final-only": {"ppl": "- / 4.55", "exit_gap": "0.032"},
    "per-loop-rmsnorm-penalty": {"ppl": "- / 4.53", "state_norm": "17-22", "exit_gap": "0.030"},
}
PAPER_NOTE = (
    "The paper's columns are its models of 44M / 129M parameters, 4 epochs of WikiText-103 with a word-level tokenizer "
    "of 20,000 tokens: their perplexities compare with nothing else. For per-loop-rmsnorm at 129M its table of "
    "conditions has 5.35, its table of depths 4.97; the other per-loop perplexities and gaps are from the latter."
)
FIGURE_SIZE = (8.5, 4.8)  # inches
GAP_LINEAR = 0.01  # nats: below this the axis of exit gaps is linear
MARGIN = 0.03  # decades beyond whole ones, so that a marker at the edge is whole


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

    @property
    def ppl(self) -> float:
        """Perplexity after the last loop."""
        return _number(self.evaluation[-1]["ppl"])

    @property
    def state_norm(self) -> float:
        """Mean over tokens of ||H_K||_2 after the last loop."""
        return _number(self.evaluation[-1]["state_norm"])

    @property
    def exit_gap(self) -> float:
        """CE(K = 1) - CE(K = n_loops), nats."""
        return _number(self.evaluation[0]["ce"]) - _number(self.evaluation[-1]["ce"])

    @property
    def bits_per_byte(self) -> float | None:
        """After the last loop; None for tokenizers that lose text."""
        return self.evaluation[-1]["bits_per_byte"]


def _number(value: float | None) -> float:
    """JSON's null stands for a number that is not finite."""
    return math.nan if value is None else value


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


def find_runs(out: Path, conditions: Sequence[str]) -> list[tuple[str, int, Path]]:
    """Condition, seed and directory of every run of a sweep, in the order of ``conditions``, then of the seeds."""
    found = []
    for condition in conditions:
        seeds = [path for path in (out / condition).glob("seed-*") if path.is_dir() and path.name[5:].isdecimal()]
        found += [(condition, int(path.name[5:]), path) for path in sorted(seeds, key=lambda path: int(path.name[5:]))]
    return found


def read_run(condition: str, seed: int, run: Path) -> RunResult:
    """The result of the run in a directory, however far it got. Raises ValueError for a damaged summary.json."""
    state, rows = status(run), read_metrics(run / "metrics.jsonl")
    begun = RunResult(condition, seed, state, rows[-1]["step"] if rows else 0, _training_minutes(rows), [])
    if state != "complete":
        return begun
    try:
        summary = json.loads((run / "summary.json").read_text())
        taken = {name: summary[name] for name in ("evaluation", "parameters", "device", "versions", "commit")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'summary.json'} cannot be read ({error!r:.100}). Remove {run}.") from error
    return dataclasses.replace(begun, **taken)


def _training_minutes(rows: Sequence[dict[str, Any]]) -> float:
    """From the rates in metrics.jsonl, and so of all the processes that a run was continued in."""
    before = [0, *(row["tokens"] for row in rows)]
    return sum((row["tokens"] - old) / row["tokens_per_second"] for old, row in zip(before, rows, strict=False)) / 60


def stored_command(out: Path) -> list[str] | None:
    """The words of the command that last trained in ``out``; None for a sweep that has not kept them."""
    try:
        command = json.loads((out / "sweep.json").read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(word) for word in command] if isinstance(command, list) and command else None


def write_report(out: Path, conditions: Sequence[str], command: Sequence[str] | None = None) -> list[RunResult]:
    """Write sweep.json, sweep.md and exit_gap.png into ``out``. Returns the results of its runs; if there are none,
    nothing is written. command: that trains them; None: the one that is already there."""
    command = stored_command(out) if command is None else list(command)
    found = find_runs(out, conditions)
    results = [read_run(*run) for run in found]
    if not results:
        return []
    settings = sweep_settings(found)
    complete = [result for result in results if result.status == "complete"]
    write_json(
        out / "sweep.json",
        {
            "command": command,
            "settings": settings,
            "runs": [dataclasses.asdict(result) for result in results],
            "conditions": [_statistics(name, group) for name, group in _by_condition(results)],
        },
    )
    draw_exit_gap(out / "exit_gap.png", complete, conditions)
    (out / "sweep.md").write_text(markdown(results, settings, command), encoding="utf-8")
    return results


def sweep_settings(found: Sequence[tuple[str, int, Path]]) -> dict[str, Any]:
    """The configuration that the runs share: that of the first one that has written it."""
    for _, _, run in found:
        if (run / "config.json").exists():
            stored = json.loads((run / "config.json").read_text())
            config = stored["train"] | {"vocab_size": stored["model"]["vocab_size"]}
            return {
                name: config[name]
                for name in ("preset", "data", "tokenizer", "vocab_size", "n_loops", "seq_len", "batch_size", "steps",
                             "epochs", "learning_rate", "dtype", "fused", "eval_tokens")
            }  # fmt: skip
    return {}


def _by_condition(results: Sequence[RunResult]) -> list[tuple[str, list[RunResult]]]:
    names = dict.fromkeys(result.condition for result in results)
    return [(name, [result for result in results if result.condition == name]) for name in names]


def _statistics(condition: str, results: Sequence[RunResult]) -> dict[str, Any]:
    """Mean, smallest and largest value over the complete runs of one condition, and the paper's numbers."""
    complete = [result for result in results if result.status == "complete"]
    measured: dict[str, Any] = {"condition": condition, "complete": len(complete)}
    measured["diverged"] = sum(result.status == "diverged" for result in results)
    for name in ("ppl", "state_norm", "exit_gap", "bits_per_byte", "minutes"):
        values = [value for result in complete if (value := getattr(result, name)) is not None]
        measured[name] = {"mean": mean(values), "min": min(values), "max": max(values)} if values else None
    return measured | {"paper": PAPER.get(condition, {})}


def markdown(results: Sequence[RunResult], settings: dict[str, Any], command: Sequence[str] | None = None) -> str:
    """sweep.md: Table 1, perplexity at every K, the figure, the cost, and the commands for the paper's scale."""
    parts = [
        "# Loss placement, readout and the size of the state",
        settings_line(results, settings),
        *([f"Made by\n\n```\n{shlex.join(command)}\n```"] if command else []),
        condition_table(results, settings),
        "Perplexity when stopping after K loops, each read as the last, mean over seeds:",
        depth_table(results),
        "![exit gap against the size of the last state](exit_gap.png)",
        cost(results),
        paper_scale(),
    ]
    return "\n\n".join(parts)


def condition_table(results: Sequence[RunResult], settings: dict[str, Any]) -> str:
    """Table 1, one row a condition, with the paper's numbers and a note on both."""
    groups = [_statistics(name, group) for name, group in _by_condition(results)]
    last = settings.get("n_loops", "K")
    header = [
        "condition", "runs", f"PPL at K = {last}", "paper", f"\\|\\|H_{last}\\|\\|", "paper",
        f"CE(K=1) - CE(K={last})", "paper", "bits per byte", "minutes a run",
    ]  # fmt: skip
    rows = [
        [
            f"`{group['condition']}`",
            str(group["complete"]) + (f", {group['diverged']} diverged" if group["diverged"] else ""),
            spread(group["ppl"], "{:.4g}"),
            group["paper"].get("ppl", "-"),
            spread(group["state_norm"], "{:,.4g}"),
            group["paper"].get("state_norm", "-"),
            spread(group["exit_gap"], "{:+.4f}"),
            group["paper"].get("exit_gap", "-"),
            spread(group["bits_per_byte"], "{:.4f}"),
            "-" if group["minutes"] is None else f"{group['minutes']['mean']:.1f}",
        ]
        for group in groups
    ]
    note = (
        "Mean over seeds, in brackets the smallest and the largest value. CE in nats per token; \\|\\|H\\|\\| is the "
        f"mean over tokens of the L2 norm; minutes are of training. {PAPER_NOTE}"
    )
    return f"{table(header, rows)}\n\n{note}"


def spread(values: dict[str, float] | None, form: str) -> str:
    if values is None:
        return "-"
    centre, low, high = (form.format(values[name]) for name in ("mean", "min", "max"))
    return centre if low == high else f"{centre} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def depth_table(results: Sequence[RunResult]) -> str:
    rows: list[list[str]] = []
    depths: list[int] = []
    for condition, group in _by_condition(results):
        evaluations = [result.evaluation for result in group if result.status == "complete"]
        if evaluations:
            depths = [row["n_loops"] for row in evaluations[0]]
            means = [mean(_number(row["ppl"]) for row in column) for column in zip(*evaluations, strict=True)]
            rows.append([f"`{condition}`", *(f"{value:.4g}" for value in means)])
    return table(["condition", *(f"K = {depth}" for depth in depths)], rows)


def settings_line(results: Sequence[RunResult], settings: dict[str, Any]) -> str:
    if not settings:
        return "No run has begun."
    counts = sorted({result.parameters for result in results if result.parameters is not None})
    counted = " to ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    length = f"{settings['steps']:,} steps" if settings["steps"] else f"{settings['epochs']:g} epochs in steps"
    evaluated = "all" if settings["eval_tokens"] is None else f"{settings['eval_tokens']:,}"
    complete = sum(result.status == "complete" for result in results)
    return (
        f"Preset `{settings['preset']}`{f' ({counted} parameters)' if counted else ''}, {settings['n_loops']} loops, "
        f"on {Path(settings['data']).name} with the {Path(settings['tokenizer']).name} tokenizer "
        f"({settings['vocab_size']:,} tokens): {length} of {settings['batch_size']} x {settings['seq_len']} tokens, "
        f"learning rate {settings['learning_rate']:g}, {settings['dtype']}, "
        f"{'fused' if settings['fused'] else 'plain PyTorch'}; evaluated on {evaluated} validation tokens. "
        f"{complete} of {len(results)} runs are complete."
    )


def cost(results: Sequence[RunResult]) -> str:
    complete = [result for result in results if result.status == "complete"]

    def distinct(values: Iterable[str | None]) -> str:
        return "; ".join(dict.fromkeys(value for value in values if value)) or "not known"

    versions = [", ".join(f"{name} {version}" for name, version in run.versions.items()) for run in complete]
    lines = [
        f"- Cost: {sum(result.minutes for result in results):.0f} minutes of training in {len(results)} runs.",
        f"- Device: {distinct(result.device for result in complete)}.",
        f"- Versions: {distinct(versions)}.",
        f"- Commit: {distinct(result.commit for result in complete)}.",
    ]
    others = [
        f"`{result.condition}` seed {result.seed} ({'diverged ' if result.status == 'diverged' else ''}"
        f"at step {result.steps})"
        for result in results
        if result.status != "complete"
    ]
    return "\n".join([*lines, *([f"- Not complete: {', '.join(others)}."] if others else [])])


def condition_colours(conditions: Iterable[str]) -> dict[str, str]:
    """The colour of a condition in every figure, by its place among all."""
    names = list(conditions)
    return dict(zip(names, colours_of(names), strict=True))


def draw_exit_gap(path: Path, results: Sequence[RunResult], conditions: Sequence[str]) -> None:
    """Figure 1 of the paper: CE(K=1) - CE(K=n_loops) against ||H_K||, one point a run, one marker a condition.

    conditions: all that there are, which decides on colours and markers.
    """
    colours = condition_colours(conditions)
    figure, axes = plt.subplots(figsize=FIGURE_SIZE, layout="constrained")
    for condition, group in _by_condition(results):
        axes.scatter(
            [result.state_norm for result in group],
            [result.exit_gap for result in group],
            marker=MARKERS[list(conditions).index(condition) % len(MARKERS)],
            color=colours[condition],
            s=60,
            alpha=0.8,
            label=condition,
        )
    if results:
        _label(axes, results)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(axes: Axes, results: Sequence[RunResult]) -> None:
    """Whole decades on both axes, so that an order of magnitude looks like one."""
    last = results[0].evaluation[-1]["n_loops"]
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    norms = [result.state_norm for result in results if math.isfinite(result.state_norm)]
    gaps = [result.exit_gap for result in results if math.isfinite(result.exit_gap)]
    if norms and gaps:
        axes.set_xscale("log")
        decades = math.floor(math.log10(min(norms))), math.ceil(math.log10(max(norms)) + 1e-9)
        axes.set_xlim(10 ** (decades[0] - MARGIN), 10 ** (decades[1] + MARGIN))
        axes.set_yscale("symlog", linthresh=GAP_LINEAR)
        axes.set_ylim(-_decade_above(-min(gaps)), _decade_above(max(gaps)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(
        title="What exiting after one loop costs, and the size of the state",
        xlabel=rf"mean $\|H_{{{last}}}\|_2$",
        ylabel=f"exit gap CE(K=1) - CE(K={last}), nats, read as the last",
    )
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _decade_above(gap: float) -> float:
    return GAP_LINEAR if gap <= GAP_LINEAR else 10 ** math.ceil(math.log10(gap))
