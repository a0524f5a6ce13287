"""The figures of the sweep (the paper's Figure 1) and of the frontier (after its Figure 4)."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from looped.diagnose.figures import MARKERS, colours_of
from train.paper.conditions import BLIND, FINAL_ONLY, NAMES, PAPER_PPL, PAPER_RATES, PENALISED, RAW, TERMINAL
from train.paper.frontier_page import rows_by, seed_count, steps_of, threads_of
from train.paper.runs import RunResult, by_condition

COLOURS: dict[str, str] = dict(zip(NAMES, colours_of(NAMES), strict=True))  # of a condition, but for the frontier
GAP_LINEAR = 0.01  # nats: below this the axis of exit gaps is linear
MARGIN = 0.03  # decades beyond whole ones, so that a marker at the edge is whole

# Of the frontier: colour, marker and label of a condition; colours and markers of others; lines of the competitors,
# faint and at the perplexity of the first condition.
STYLES: dict[str, tuple[str, str, str]] = {
    BLIND: ("#b0452c", "o", "CE at every loop, RMSNorm readout"),
    RAW: ("#1f5fa8", "s", "CE at every loop, raw readout"),
    FINAL_ONLY: ("#3b8f5a", "D", "CE at every loop, RMSNorm at the last only"),
    PENALISED: ("#8256a4", "^", "CE at every loop, RMSNorm + norm penalty"),
    TERMINAL: ("#555555", "v", "CE at the last loop alone, RMSNorm readout"),
}
OTHERS = (("#c08a1e", "P"), ("#2a9aa5", "X"), ("#a83f7d", "<"), ("#6b4a2b", ">"))
COMPETITORS = ((":", "x"), ("--", "+"))
BAND = 3  # perplexities above so many times the smallest would hide the others: they are named at the upper edge
SPREAD = 0.012  # of the logarithm of tokens/s, between two conditions: they share their speed, and bars would overlap


def draw_exit_gap(path: Path, results: Sequence[RunResult]) -> None:
    """CE(K=1) - CE(K=n_loops) against ||H_K||: a point for each complete run, a marker for each condition."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for condition, group in by_condition(results).items():
        axes.scatter(
            [result.state_norm for result in group],
            [result.exit_gap for result in group],
            marker=MARKERS[list(COLOURS).index(condition)],
            color=COLOURS[condition],
            s=60,
            alpha=0.8,
            label=condition,
        )
    if results:
        _label_exit_gap(axes, results)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label_exit_gap(axes: Axes, results: Sequence[RunResult]) -> None:
    """Whole decades on both axes, so that an order of magnitude looks like one."""
    last = len(results[0].evaluation)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    norms = [result.state_norm for result in results if math.isfinite(result.state_norm)]
    gaps = [result.exit_gap for result in results if math.isfinite(result.exit_gap)]
    if norms and gaps:
        decades = math.floor(math.log10(min(norms))), math.ceil(math.log10(max(norms)) + 1e-9)
        axes.set(xscale="log", xlim=(10 ** (decades[0] - MARGIN), 10 ** (decades[1] + MARGIN)))
        axes.set_yscale("symlog", linthresh=GAP_LINEAR)
        axes.set_ylim(-_decade_above(-min(gaps)), _decade_above(max(gaps)))
    axes.set(
        title="What exiting after one loop costs, and the size of the state",
        xlabel=rf"mean $\|H_{{{last}}}\|_2$",
        ylabel=f"exit gap CE(K=1) - CE(K={last}), nats, read as the last",
    )
    _finish(axes)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _decade_above(gap: float) -> float:
    return GAP_LINEAR if gap <= GAP_LINEAR else 10 ** math.ceil(math.log10(gap))


def _finish(axes: Axes) -> None:
    """Numbers in full, none at minor ticks; a faint grid, half a frame."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_frontier(path: Path, record: dict[str, Any]) -> None:
    """Perplexity against tokens/s at the largest batch, a curve for each condition; the paper's own numbers beside it.

    record: that of the .json beside the figure, in which None stands for a number that is not finite.
    """
    settings, batch = record["settings"], max(record["points"][0]["tokens_per_second"], key=int)
    with plt.rc_context({"font.size": 13, "axes.titlesize": 13, "axes.labelsize": 14, "legend.fontsize": 12}):
        figure, (measured, paper) = plt.subplots(
            1, 2, figsize=(15, 7.6), layout="constrained", gridspec_kw={"width_ratios": [3, 2]}
        )
        _draw_measured(measured, record, batch)
        for name, values in PAPER_PPL.items():
            _curve(paper, PAPER_RATES, values, STYLES[name])
        measured.set_title(
            f"Measured: {settings['preset']}, {settings['parameters'] / 1e6:.1f}M parameters, {seed_count(record)}\n"
            f"{record['device']}, {threads_of(record)}, {settings['dtype']}, {batch} x {settings['seq_len']} tokens"
        )
        paper.set_title("Not measured here: Sharma & Vu (arXiv 2606.24898)\n129M parameters, GPU not stated")
        first = next(iter(rows_by("condition", record["points"]).values()))
        _label_frontier(measured, _rates(first, batch))
        _label_frontier(paper, PAPER_RATES)
        figure.supxlabel(
            f"Points: mean over seeds, after {steps_of(record)} training steps on {settings['text']}. Bars: 95% "
            f"bootstrap of that mean over {settings['documents']} validation documents\n({settings['tokens']:,} "
            "tokens), wider than what tells two conditions apart, which share the text. Conditions are spread sideways "
            "at each K to be legible.",
            fontsize=11.5,
        )
        handles = {handle.get_label(): handle for handle in [*measured.containers, *measured.lines]}
        shown = {label: handle for label, handle in handles.items() if not label.startswith("_")}
        figure.legend(shown.values(), shown, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_measured(axes: Axes, record: dict[str, Any], batch: str) -> None:
    conditions = rows_by("condition", record["points"])
    others = iter(OTHERS)
    means = {name: _perplexities(rows, "mean") for name, rows in conditions.items()}
    models = rows_by("model", record["speeds"])
    competitors = {name: rows for name, rows in models.items() if not name.startswith("fused")}
    for (line, marker), (name, rows) in zip(COMPETITORS, competitors.items(), strict=False):
        axes.plot(
            _rates(rows, batch), next(iter(means.values())), line, color="#888888", marker=marker, markersize=10,
            label=f"speed: {name}",
        )  # fmt: skip
    ceiling = BAND * np.nanmin(list(means.values()))
    for index, (name, rows) in enumerate(conditions.items()):
        style = STYLES[name] if name in STYLES else (*next(others), name)
        value, low, high = means[name], _perplexities(rows, "low"), _perplexities(rows, "high")
        rates = np.exp(SPREAD * (index - (len(conditions) - 1) / 2)) * _rates(rows, batch)
        _curve(axes, rates, np.where(value <= ceiling, value, np.nan), style, np.stack([value - low, high - value]))
        for rate, above in zip(rates, value, strict=True):
            if above > ceiling:
                axes.annotate(
                    f"{above:,.0f} ↑", (rate, 0.97), xycoords=("data", "axes fraction"), color=style[0], rotation=90,
                    ha="center", va="top",
                )  # fmt: skip


def _rates(rows: Iterable[dict[str, Any]], batch: str) -> np.ndarray:
    return np.array([row["tokens_per_second"][batch]["median"] for row in rows])


def _perplexities(rows: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([row["ppl"][key] for row in rows], dtype=np.float64)


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


def _label_frontier(axes: Axes, rates: Sequence[float] | np.ndarray) -> None:
    """Logarithmic axes; K once, above the points that it belongs to."""
    axes.set(xscale="log", yscale="log", xlabel="prefill tokens/s", ylabel="validation perplexity (lower is better)")
    axes.margins(x=0.06, y=0.1)
    low, high = axes.get_ylim()
    ticks = MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.set_xticks(rates)
    _finish(axes)
    axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    for n_loops, rate in enumerate(rates, start=1):
        axes.annotate(
            f"K = {n_loops}", (rate, 0.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=13
        )
