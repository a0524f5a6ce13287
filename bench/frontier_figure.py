"""The frontier as a figure and as tables, from its record; the paper's own numbers apart from the measured ones.

The record is that of the .json beside them, in which None stands for a number that is not finite.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

# Sharma & Vu (arXiv 2606.24898), 129M parameters, K = 1..4; the throughput is of their reference, GPU not stated.
PAPER_RATES = [80_000, 41_000, 28_000, 21_000]
PAPER_PPL = {
    "per-loop-rmsnorm": [4.98, 4.95, 4.95, 4.97],
    "per-loop-raw": [4.68, 4.55, 4.54, 4.55],
    "per-loop-final-only": [4.70, 4.57, 4.56, 4.55],
    "per-loop-rmsnorm-penalty": [4.67, 4.52, 4.51, 4.53],
}
STYLES = {
    "per-loop-rmsnorm": ("#b0452c", "o", "CE at every loop, RMSNorm readout"),
    "per-loop-raw": ("#1f5fa8", "s", "CE at every loop, raw readout"),
    "per-loop-final-only": ("#3b8f5a", "D", "CE at every loop, RMSNorm at the last only"),
    "per-loop-rmsnorm-penalty": ("#8256a4", "^", "CE at every loop, RMSNorm + norm penalty"),
    "terminal-rmsnorm": ("#555555", "v", "CE at the last loop alone, RMSNorm readout"),
}
OTHERS = (("#c08a1e", "P"), ("#2a9aa5", "X"), ("#a83f7d", "<"), ("#6b4a2b", ">"))
COMPETITORS = ((":", "x"), ("--", "+"))  # of the speed: faint lines at the perplexity of the first condition
FINAL_ONLY = (
    " Every loop is read as if it were the last: `per-loop-final-only` at a K below its last loop goes through the "
    "norm, though training read those loops without it."
)
BAND = 3  # perplexities above so many times the smallest would hide the others: they are named at the upper edge
SPREAD = 0.012  # of the logarithm of tokens/s, between two conditions: they share their speed, and bars would overlap


def draw(path: Path, record: dict[str, Any]) -> None:
    """Perplexity against tokens/s at the largest batch, a curve for each condition; the paper's beside it."""
    with plt.rc_context({"font.size": 13, "axes.titlesize": 13, "axes.labelsize": 14, "legend.fontsize": 12}):
        figure, (measured, paper) = plt.subplots(
            1, 2, figsize=(15, 7.6), layout="constrained", gridspec_kw={"width_ratios": [3, 2]}
        )
        batch = max(record["points"][0]["tokens_per_second"], key=int)
        _draw_measured(measured, record, batch)
        for name, values in PAPER_PPL.items():
            _curve(paper, PAPER_RATES, values, STYLES[name])
        settings = record["settings"]
        measured.set_title(
            f"Measured: {settings['preset']}, {settings['parameters'] / 1e6:.1f}M parameters, {_seed_count(record)}\n"
            f"{record['device']}, {_threads(record)}, {settings['dtype']}, {batch} x {settings['seq_len']} tokens"
        )
        paper.set_title("Not measured here: Sharma & Vu (arXiv 2606.24898)\n129M parameters, GPU not stated")
        for axes, rates in ((measured, _rates(_by_condition(record["points"])[0][1], batch)), (paper, PAPER_RATES)):
            _finish(axes, rates)
        figure.supxlabel(_caption(record), fontsize=11.5)
        handles = {handle.get_label(): handle for handle in [*measured.containers, *measured.lines]}
        shown = {label: handle for label, handle in handles.items() if not label.startswith("_")}
        figure.legend(shown.values(), shown, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_measured(axes: Axes, record: dict[str, Any], batch: str) -> None:
    conditions = _by_condition(record["points"])
    styles = _styles(conditions)
    means = _values(conditions[0][1], "mean")
    ceiling = BAND * np.nanmin([_values(rows, "mean") for _, rows in conditions])
    for (line, marker), (name, rows) in zip(COMPETITORS, _competitors(record), strict=False):
        axes.plot(
            _rates(rows, batch), means, line, color="#888888", marker=marker, markersize=10, label=f"speed: {name}"
        )
    for index, (name, rows) in enumerate(conditions):
        value, low, high = (_values(rows, key) for key in ("mean", "low", "high"))
        aside = np.exp(SPREAD * (index - (len(conditions) - 1) / 2))
        shown = np.where(value <= ceiling, value, np.nan)
        _curve(axes, aside * _rates(rows, batch), shown, styles[name], np.stack([value - low, high - value]))
        for rate, above in zip(aside * _rates(rows, batch), value, strict=True):
            if above > ceiling:
                axes.annotate(
                    f"{above:,.0f} ↑", (rate, 0.97), xycoords=("data", "axes fraction"), color=styles[name][0],
                    rotation=90, ha="center", va="top",
                )  # fmt: skip


def _by_condition(points: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(point["condition"] for point in points)
    return [(name, [point for point in points if point["condition"] == name]) for name in names]


def _competitors(record: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The models that were timed alone, with their rows: those that are no condition's."""
    names = dict.fromkeys(row["model"] for row in record["speeds"] if not row["model"].startswith("fused"))
    return [(name, [row for row in record["speeds"] if row["model"] == name]) for name in names]


def _rates(rows: Sequence[dict[str, Any]], batch: str) -> np.ndarray:
    return np.array([row["tokens_per_second"][batch]["median"] for row in rows])


def _values(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([row["ppl"][key] for row in rows], dtype=np.float64)


def _styles(conditions: Sequence[tuple[str, object]]) -> dict[str, tuple[str, str, str]]:
    others = iter(OTHERS)
    return {name: STYLES[name] if name in STYLES else (*next(others), name) for name, _ in conditions}


def _curve(
    axes: Axes,
    rates: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    style: tuple[str, str, str],
    ends: np.ndarray | None = None,
) -> None:
    """A line through the points of K = 1, 2, ..."""
    colour, marker, label = style
    axes.errorbar(
        rates, values, yerr=ends, color=colour, marker=marker, markersize=8, linewidth=1.8, elinewidth=1.1, capsize=3,
        alpha=0.9, label=label,
    )  # fmt: skip


def _finish(axes: Axes, rates: Sequence[float] | np.ndarray) -> None:
    """Logarithmic axes; K once, above the points that it belongs to."""
    axes.set(xscale="log", yscale="log", xlabel="prefill tokens/s")
    axes.set_ylabel("validation perplexity (lower is better)")
    axes.margins(x=0.06, y=0.1)
    low, high = axes.get_ylim()
    ticks = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xticks(rates)
    axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())
    for n_loops, rate in enumerate(rates, start=1):
        axes.annotate(
            f"K = {n_loops}", (rate, 0.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=13
        )
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _seed_count(record: dict[str, Any]) -> str:
    counts = sorted({len(point["seeds"]) for point in record["points"]})
    return f"{'-'.join(map(str, counts))} seed{'' if counts == [1] else 's'}"


def _caption(record: dict[str, Any]) -> str:
    settings = record["settings"]
    return (
        f"Points: mean over seeds, after {_steps(record)} training steps on {settings['text']}. Bars: 95% bootstrap of "
        f"that mean over {settings['documents']} validation documents\n({settings['tokens']:,} tokens), wider than "
        "what tells two conditions apart, which share the text. Conditions are spread sideways at each K to be legible."
    )


def _steps(record: dict[str, Any]) -> str:
    steps = sorted({run["steps"] for run in record["runs"]})
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


def markdown(record: dict[str, Any], name: str) -> str:
    """The page beside the figure and the record of that ``name``; the paper's numbers are in a table of their own."""
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
        _explanation(record, name),
        f"![perplexity against tokens per second]({name}.png)",
        "## Speed",
        _speeds(record, batches),
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
    missing = ", ".join(f"`{name}`" for name in record["without_runs"])
    return (
        f"Preset `{settings['preset']}`, {settings['parameters']:,} parameters, {_steps(record)} training steps on "
        f"{settings['text']}, evaluated on {settings['tokens']:,} validation tokens of {settings['documents']} "
        f"documents in windows of {settings['seq_len']}, {settings['dtype']}."
        + (f" Without a complete run: {missing}." if missing else "")
    )


def _explanation(record: dict[str, Any], name: str) -> str:
    settings = record["settings"]
    if settings["documents"] < 2:
        intervals = "No intervals: they are over documents, and there is one."
    else:
        intervals = (
            f"In brackets the 95% interval of {settings['draws']:,} bootstrap draws over the {settings['documents']} "
            "documents, the seeds averaged within a draw. All conditions have the same draws, and a difference is "
            "taken within a draw and a seed: whether two conditions differ is seen from its interval, not from whether "
            "the intervals of two perplexities overlap. What another seed would give is seen from the column *seeds*."
        )
    final_only = "per-loop-final-only" in {point["condition"] for point in record["points"]}
    return (
        f"PPL and bits per byte are means over seeds, *seeds* the number of runs and their smallest and largest PPL. "
        f"{intervals} tokens/s: see below; conditions of one architecture share them. "
        f"`{name}.json` has the quartiles." + (FINAL_ONLY if final_only else "")
    )


def _speeds(record: dict[str, Any], batches: Sequence[str]) -> str:
    """What exactly is timed, and a row for each model and K."""
    seq_len = record["settings"]["seq_len"]
    header = ["model", "K", *(f"tokens/s, {batch} x {seq_len}" for batch in batches)]
    rows = [
        [row["model"], str(row["n_loops"]), *(f"{row['tokens_per_second'][b]['median']:,.0f}" for b in batches)]
        for row in record["speeds"]
    ]
    return (
        "Prefill: the decoder at K loops and the logits of the last state, without gradients; median of "
        f"{record['settings']['rounds']} rounds in which all models and K take turns. *Fused*: the decoder's norms "
        "are this project's kernels; attention, the norm before the head and the head's product are PyTorch's in all "
        "models. The plain ones have the first model's architecture.\n\n" + _table(header, rows)
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
