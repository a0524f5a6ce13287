"""The frontier as a figure, from its record; the paper's own numbers apart from the measured ones.

The record is that of the .json beside it, in which None stands for a number that is not finite.
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

from train.paper.conditions import BLIND, FINAL_ONLY, PAPER_PPL, PAPER_RATES, PENALISED, RAW, TERMINAL
from train.paper.frontier_page import by_condition, seed_count, steps_of, threads_of

STYLES: dict[str, tuple[str, str, str]] = {
    BLIND: ("#b0452c", "o", "CE at every loop, RMSNorm readout"),
    RAW: ("#1f5fa8", "s", "CE at every loop, raw readout"),
    FINAL_ONLY: ("#3b8f5a", "D", "CE at every loop, RMSNorm at the last only"),
    PENALISED: ("#8256a4", "^", "CE at every loop, RMSNorm + norm penalty"),
    TERMINAL: ("#555555", "v", "CE at the last loop alone, RMSNorm readout"),
}
OTHERS = (("#c08a1e", "P"), ("#2a9aa5", "X"), ("#a83f7d", "<"), ("#6b4a2b", ">"))
COMPETITORS = ((":", "x"), ("--", "+"))  # of the speed: faint lines at the perplexity of the first condition
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
            f"Measured: {settings['preset']}, {settings['parameters'] / 1e6:.1f}M parameters, {seed_count(record)}\n"
            f"{record['device']}, {threads_of(record)}, {settings['dtype']}, {batch} x {settings['seq_len']} tokens"
        )
        paper.set_title("Not measured here: Sharma & Vu (arXiv 2606.24898)\n129M parameters, GPU not stated")
        for axes, rates in ((measured, _rates(by_condition(record["points"])[0][1], batch)), (paper, PAPER_RATES)):
            _finish(axes, rates)
        figure.supxlabel(_caption(record), fontsize=11.5)
        handles = {handle.get_label(): handle for handle in [*measured.containers, *measured.lines]}
        shown = {label: handle for label, handle in handles.items() if not label.startswith("_")}
        figure.legend(shown.values(), shown, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_measured(axes: Axes, record: dict[str, Any], batch: str) -> None:
    conditions = by_condition(record["points"])
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


def _caption(record: dict[str, Any]) -> str:
    settings = record["settings"]
    return (
        f"Points: mean over seeds, after {steps_of(record)} training steps on {settings['text']}. Bars: 95% bootstrap "
        f"of that mean over {settings['documents']} validation documents\n({settings['tokens']:,} tokens), wider than "
        "what tells two conditions apart, which share the text. Conditions are spread sideways at each K to be legible."
    )
