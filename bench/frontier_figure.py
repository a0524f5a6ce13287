"""The frontier as a figure and as tables, from its record; the paper's own numbers apart from the measured ones.

The record is that of frontier.json, in which None stands for a number that is not finite.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

# Sharma & Vu (arXiv 2606.24898), 129M parameters, K = 1..4; the throughput is of their reference, GPU not stated.
PAPER_RATES = [80_000, 41_000, 28_000, 21_000]
PAPER_PPL = {
    "per-loop-rmsnorm": [4.98, 4.95, 4.95, 4.97],
    "per-loop-raw": [4.68, 4.55, 4.54, 4.55],
    "per-loop-final-only": [4.70, 4.57, 4.56, 4.55],
    "per-loop-rmsnorm-penalty": [4.67, 4.52, 4.51, 4.53],
}
STYLES = {
    "per-loop-rmsnorm": ("#b0452c", "o"),
    "per-loop-raw": ("#1f5fa8", "s"),
    "per-loop-final-only": ("#3b8f5a", "D"),
    "per-loop-rmsnorm-penalty": ("#8256a4", "^"),
    "terminal-rmsnorm": ("#555555", "v"),
}
OTHERS = (("#c08a1e", "P"), ("#2a9aa5", "X"), ("#a83f7d", "<"), ("#6b4a2b", ">"))
FINAL_ONLY = (
    " Every loop is read as if it were the last: `per-loop-final-only` at a K below its last loop goes through the "
    "norm, though training read those loops without it."
)
LOG_ABOVE = 3  # quotient of the largest and the smallest perplexity


def draw(path: Path, record: dict[str, Any]) -> None:
    """Perplexity against tokens/s at the largest batch, a curve for each condition; the paper's beside it."""
    figure, (measured, paper) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    styles, settings = _styles(record["points"]), record["settings"]
    batch = max(record["points"][0]["tokens_per_second"], key=int)
    for name, rows in _by_condition(record["points"]):
        rates = [row["tokens_per_second"][batch]["median"] for row in rows]
        value, low, high = (
            np.array([row["ppl"][key] for row in rows], dtype=np.float64) for key in ("mean", "low", "high")
        )
        _curve(measured, name, rates, value, styles[name], np.stack([value - low, high - value]))
    for name, values in PAPER_PPL.items():
        _curve(paper, name, PAPER_RATES, values, STYLES[name])
    batches = f"{batch} x {settings['seq_len']} tokens"
    measured.set_title(
        f"Measured: {settings['preset']}, {settings['parameters'] / 1e6:.1f}M parameters\n"
        f"{record['device']}, {_threads(record)}, {settings['dtype']}, {batches}",
        fontsize=10,
    )
    paper.set_title(
        "Not measured here: Sharma & Vu (arXiv 2606.24898)\n129M parameters, their throughput, GPU not stated",
        fontsize=10,
    )
    for axes in (measured, paper):
        _finish(axes)
    handles = {handle.get_label(): handle for axes in (paper, measured) for handle in axes.containers}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _by_condition(points: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(point["condition"] for point in points)
    return [(name, [point for point in points if point["condition"] == name]) for name in names]


def _styles(points: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    others = iter(OTHERS)
    return {name: STYLES[name] if name in STYLES else next(others) for name, _ in _by_condition(points)}


def _curve(
    axes: Axes,
    name: str,
    rates: Sequence[float],
    values: Sequence[float] | np.ndarray,
    style: tuple[str, str],
    ends: np.ndarray | None = None,
) -> None:
    """A line through the points of K = 1, 2, ..., each with its K beside it."""
    colour, marker = style
    axes.errorbar(
        rates, values, yerr=ends, color=colour, marker=marker, markersize=6, linewidth=1.4, elinewidth=0.9, capsize=3,
        alpha=0.9, label=name,
    )  # fmt: skip
    for n_loops, (rate, value) in enumerate(zip(rates, values, strict=True), start=1):
        axes.annotate(str(n_loops), (rate, value), textcoords="offset points", xytext=(6, 4), fontsize=8, color=colour)


def _finish(axes: Axes) -> None:
    low, high = axes.dataLim.intervaly
    if high > LOG_ABOVE * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.margins(0.08)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="prefill tokens/s (number at a point: K)", ylabel="validation perplexity (lower is better)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def markdown(record: dict[str, Any]) -> str:
    """frontier.md: the measured table, what it was measured on, and the paper's numbers in a table of their own."""
    settings = record["settings"]
    batches = list(record["points"][0]["tokens_per_second"])
    header = [
        "condition", "K", "PPL", "seeds", f"PPL - `{settings['reference']}`", "bits per byte",
        *(f"tokens/s, {batch} x {settings['seq_len']}" for batch in batches),
    ]  # fmt: skip
    rows = [
        [
            f"`{point['condition']}`",
            str(point["n_loops"]),
            _interval(point["ppl"], "{:.4g}"),
            _seeds(point["ppl"]["by_seed"]),
            _interval(point["ppl_difference"], "{:+.3g}"),
            _interval(point["bits_per_byte"], "{:.4f}"),
            *(f"{point['tokens_per_second'][batch]['median']:,.0f}" for batch in batches),
        ]
        for point in record["points"]
    ]
    parts = [
        "# Perplexity against speed at K loops",
        f"{_subject(record)} The perplexities compare with each other, and not with those of another text, tokenizer "
        "or length of training: the paper's are in a table of their own.",
        _table(header, rows),
        _explanation(record),
        "![perplexity against tokens per second](frontier.png)",
        "## Measured on",
        _environment(record),
        "## The paper's numbers",
        "Sharma & Vu (arXiv 2606.24898), 129M parameters, WikiText-103, word-level tokenizer: perplexity at K loops, "
        "and the throughput of their reference implementation, GPU not stated. Not measured here.",
        _paper_table(),
    ]
    return "\n\n".join(parts) + "\n"


def _subject(record: dict[str, Any]) -> str:
    settings = record["settings"]
    steps = sorted({run["steps"] for run in record["runs"]})
    length = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    missing = ", ".join(f"`{name}`" for name in record["without_runs"])
    return (
        f"Preset `{settings['preset']}`, {settings['parameters']:,} parameters, {length} training steps, evaluated on "
        f"{settings['tokens']:,} validation tokens of {settings['documents']} documents in windows of "
        f"{settings['seq_len']}, {settings['dtype']}." + (f" Without a complete run: {missing}." if missing else "")
    )


def _explanation(record: dict[str, Any]) -> str:
    settings = record["settings"]
    if settings["documents"] < 2:
        intervals = "No intervals: they are over documents, and there is one."
    else:
        intervals = (
            f"In brackets the 95% interval of {settings['draws']:,} bootstrap draws over the {settings['documents']} "
            "documents, the draws of all seeds pooled. All conditions have the same draws, and a difference is taken "
            "within a draw and a seed: whether two conditions differ is seen from its interval, not from whether the "
            "intervals of two perplexities overlap."
        )
    final_only = "per-loop-final-only" in {point["condition"] for point in record["points"]}
    return (
        f"PPL and bits per byte are means over seeds, *seeds* the number of runs and their smallest and largest PPL. "
        f"{intervals} tokens/s: prefill, the decoder at K loops and the logits of the last state, median of "
        f"{settings['rounds']} rounds in which all conditions and K take turns; `frontier.json` has the quartiles."
        + (FINAL_ONLY if final_only else "")
    )


def _environment(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    trained = ", ".join(sorted({str(run["commit"]) for run in record["runs"]}))
    return "\n".join(
        [
            f"- {record['date']}, {record['device']}, {_threads(record)}, {versions}",
            f"- commit {record['commit']}; runs trained at {trained}",
            f"- seeds: {'; '.join(_seeds_of(record))}",
        ]
    )


def _threads(record: dict[str, Any]) -> str:
    return f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}"


def _seeds_of(record: dict[str, Any]) -> list[str]:
    return [f"`{name}` {', '.join(str(run['seed']) for run in rows)}" for name, rows in _by_condition(record["runs"])]


def _paper_table() -> str:
    depths = range(1, len(PAPER_RATES) + 1)
    rows = [[f"`{name}`", *(f"{value:.2f}" for value in values)] for name, values in PAPER_PPL.items()]
    rates = ["tokens/s", *(f"{rate:,}" for rate in PAPER_RATES)]
    return _table(["", *(f"K = {depth}" for depth in depths)], [*rows, rates])


def _interval(estimate: dict[str, Any] | None, form: str) -> str:
    if estimate is None or estimate["mean"] is None:
        return "-"
    mean, low, high = (
        "?" if estimate[name] is None else form.format(estimate[name]) for name in ("mean", "low", "high")
    )
    return mean if low == high == "?" else f"{mean} ({low} to {high})"


def _seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    spread = f": {min(known):.4g} to {max(known):.4g}" if len(known) > 1 else ""
    return f"{len(values)}{spread}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])
