"""What the pages say of runs, in Markdown: tables over seeds, the settings, the cost."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from train.paper.conditions import PAPER_PPL, PAPER_TABLE
from train.paper.runs import RunResult, by_condition, complete_runs

PAPER_NOTE = (
    "The paper's columns are its models of 44M / 129M parameters, 4 epochs of WikiText-103 with a word-level tokenizer "
    "of 20,000 tokens: their perplexities compare with nothing else. For per-loop-rmsnorm at 129M its table of "
    "conditions has 5.35, its table of depths 4.97; the other per-loop perplexities and gaps are from the latter."
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: Sequence[str] = ()) -> str:
    """rule: what stands between header and rows, to align them."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule or ["---"] * len(header), *rows])


def made_by(commands: Sequence[str]) -> str:
    return "Made by\n\n```\n" + "\n".join(commands) + "\n```" if commands else ""


def page(parts: Iterable[str]) -> str:
    """Sections, an empty line between two, without those that say nothing."""
    return "\n\n".join(part for part in parts if part)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and in brackets the smallest and the largest value where they differ."""
    if not values:
        return "-"
    centre, low, high = (form.format(value) for value in (mean(values), min(values), max(values)))
    return centre if low == high else f"{centre} ({low} to {high})"


def known_values(results: Sequence[RunResult], name: str) -> list[float]:
    """A property of every complete run that has it."""
    return [value for result in complete_runs(results) if (value := getattr(result, name)) is not None]


def condition_table(results: Sequence[RunResult], settings: dict[str, Any]) -> str:
    """Table 1 of the paper: a row for each condition, with the paper's numbers, and a note on both."""
    last = settings.get("n_loops", "K")
    header = [
        "condition", "runs", f"PPL at K = {last}", "paper", f"\\|\\|H_{last}\\|\\|", "paper",
        f"CE(K=1) - CE(K={last})", "paper", "bits per byte", "minutes a run",
    ]  # fmt: skip
    rows = []
    for condition, group in by_condition(results).items():
        diverged = sum(result.status == "diverged" for result in group)
        minutes = known_values(group, "minutes")
        row = [f"`{condition}`", str(len(minutes)) + (f", {diverged} diverged" if diverged else "")]
        for name, form in (("ppl", "{:.4g}"), ("state_norm", "{:,.4g}"), ("exit_gap", "{:+.4f}")):
            row += [spread(known_values(group, name), form), PAPER_TABLE.get(condition, {}).get(name, "-")]
        row += [spread(known_values(group, "bits_per_byte"), "{:.4f}"), f"{mean(minutes):.1f}" if minutes else "-"]
        rows.append(row)
    note = (
        "Mean over seeds, in brackets the smallest and the largest value. CE in nats per token; \\|\\|H\\|\\| is the "
        f"mean over tokens of the L2 norm; minutes are of training. {PAPER_NOTE}"
    )
    return f"{table(header, rows)}\n\n{note}"


def depth_header(n_loops: int, first: str) -> list[str]:
    return [first, *(f"K = {depth}" for depth in range(1, n_loops + 1))]


def depth_table(results: Sequence[RunResult]) -> str:
    """Perplexity after K loops, mean over seeds."""
    groups = by_condition(complete_runs(results))
    n_loops = max((len(group[0].evaluation) for group in groups.values()), default=0)
    rows = [
        [f"`{name}`", *(f"{mean(result.at(k, 'ppl') for result in group):.4g}" for k in range(1, n_loops + 1))]
        for name, group in groups.items()
    ]
    return table(depth_header(n_loops, "condition"), rows)


def paper_depth_table(corner: str, *more_rows: Sequence[str]) -> str:
    """Perplexity after K loops in the paper."""
    rows = [[f"`{name}`", *(f"{value:.2f}" for value in values)] for name, values in PAPER_PPL.items()]
    return table(depth_header(len(rows[0]) - 1, corner), [*rows, *more_rows])


def settings_line(results: Sequence[RunResult], settings: dict[str, Any]) -> str:
    """What was trained, on what, and how many runs are complete."""
    if not settings:
        return "No run has begun."
    counts = sorted({result.parameters for result in results if result.parameters is not None})
    counted = " to ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    length = f"{settings['steps']:,} steps" if settings["steps"] else f"{settings['epochs']:g} epochs in steps"
    evaluated = "all" if settings["eval_tokens"] is None else f"{settings['eval_tokens']:,}"
    return (
        f"Preset `{settings['preset']}`{f' ({counted} parameters)' if counted else ''}, {settings['n_loops']} loops, "
        f"on {Path(settings['data']).name} with the {Path(settings['tokenizer']).name} tokenizer "
        f"({settings['vocab_size']:,} tokens): {length} of {settings['batch_size']} x {settings['seq_len']} tokens, "
        f"learning rate {settings['learning_rate']:g}, {settings['dtype']}, "
        f"{'fused' if settings['fused'] else 'plain PyTorch'}; evaluated on {evaluated} validation tokens. "
        f"{len(complete_runs(results))} of {len(results)} runs are complete."
    )


def versions_line(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def distinct(values: Iterable[str | None]) -> str:
    """Every value once, in order."""
    return "; ".join(dict.fromkeys(value for value in values if value)) or "not known"


def cost(results: Sequence[RunResult]) -> str:
    """Minutes, machines, versions and commits of the runs, and those that are not complete."""
    complete = complete_runs(results)
    lines = [
        f"- Cost: {sum(result.minutes for result in results):.0f} minutes of training in {len(results)} runs.",
        f"- Device: {distinct(result.device for result in complete)}.",
        f"- Versions: {distinct(versions_line(result.versions) for result in complete)}.",
        f"- Commit: {distinct(result.commit for result in complete)}.",
    ]
    others = [
        f"`{result.condition}` seed {result.seed} ({'diverged ' if result.status == 'diverged' else ''}"
        f"at step {result.steps})"
        for result in results
        if result.status != "complete"
    ]
    return "\n".join([*lines, *([f"- Not complete: {', '.join(others)}."] if others else [])])
