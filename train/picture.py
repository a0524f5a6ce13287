"""report.png, the picture of a finished run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

from looped.whole_file import replacing
from train.report import shares_of
from train.step import LoopResult


def draw(path: Path, rows: Sequence[dict[str, Any]], results: Sequence[LoopResult], title: str) -> None:
    """Write report.png: losses and norms over training from the rows of metrics.jsonl, and the evaluation: against
    speed where that was measured, and against depth where there is more; of gated supervision also where tokens
    exit, and of a task the accuracy of its answers."""
    timed = [result for result in results if result.tokens_per_second is not None]
    exits = [row for row in rows if "exit_loop" in row]
    n_panels = 3 + (len(timed) < len(results)) + bool(exits) + bool(shares_of(results))
    figure, panels = plt.subplots(1, n_panels, figsize=(5 * n_panels, 4.8), layout="constrained")
    losses, norms, frontier, *rest = panels
    others = iter(rest)
    if rows:
        colours = _colours(max(len(row["ce"]) for row in rows))
        _draw_losses(losses, rows, colours)
        _draw_norms(norms, rows, colours)
    _draw_frontier(frontier, timed, _colours(len(timed)))
    if len(timed) < len(results):
        _draw_depths(next(others), results, len(timed))
    if exits:
        _draw_exits(next(others), exits)
    if shares_of(results):
        _draw_accuracy(next(others), results, len(timed))
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    plt.close(figure)


def _colours(n_loops: int) -> np.ndarray:
    return plt.colormaps["viridis"](np.linspace(0.05, 0.85, n_loops))


def _of_loop(rows: Sequence[dict[str, Any]], key: str, loop: int) -> np.ndarray:
    """[2, n] float64: the steps in which the loop has a number in the field's list, and that."""
    points = [(row["step"], row[key][loop]) for row in rows if loop < len(row[key]) and row[key][loop] is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2).T


def _series(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """[rows] float64 of one field; null is nan, which is not drawn."""
    return np.array([row[key] for row in rows], dtype=np.float64)


def _draw_losses(axes: Axes, rows: Sequence[dict[str, Any]], colours: np.ndarray) -> None:
    for loop, colour in enumerate(colours):
        steps, ce = _of_loop(rows, "ce", loop)
        if ce.size:
            axes.plot(steps, ce, color=colour, linewidth=1.4, label=f"CE after loop {loop + 1}")
    axes.plot(
        _series(rows, "step"),
        _series(rows, "loss"),
        color="0.25",
        linewidth=1.1,
        linestyle="--",
        label="loss with penalty",
    )
    axes.set(title="Training loss", xlabel="step", ylabel="nats per token")
    _legend(axes, len(colours))


def _draw_norms(axes: Axes, rows: Sequence[dict[str, Any]], colours: np.ndarray) -> None:
    series = [_of_loop(rows, "state_norm", loop) for loop in range(len(colours))]
    for loop, ((steps, norm), colour) in enumerate(zip(series, colours, strict=True), start=1):
        axes.plot(steps, norm, color=colour, linewidth=1.4, label=f"$H_{{{loop}}}$")
    axes.set_yscale("log")
    norms = np.concatenate([norm for _, norm in series])
    seen = norms[norms > 0]
    if seen.size:
        # Whole decades, so that norms in the tens look like it.
        low = np.floor(np.log10(seen.min()))
        high = max(np.ceil(np.log10(seen.max())), low + 1)
        axes.set_ylim(10**low, 10**high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low <= 2 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set(title="Size of the state", xlabel="step", ylabel=r"mean $\|H_k\|_2$")
    _legend(axes, len(colours))


def _legend(axes: Axes, n_loops: int) -> None:
    axes.legend(frameon=False, fontsize=9 if n_loops <= 8 else 6, ncols=1 + n_loops // 9)


def _draw_exits(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    steps, n_loops = _series(rows, "step"), max(len(row["ce"]) for row in rows)
    axes.plot(steps, _series(rows, "exit_loop"), color="0.25", linewidth=1.4, label="mean exit loop")
    # As loops: exp(H) is 1 where all stop at one loop, and K where every loop is as probable.
    spread = np.exp(_series(rows, "exit_entropy"))
    axes.plot(steps, spread, color="0.25", linewidth=1.1, linestyle="--", label="exp(entropy)")
    axes.set(title="Where tokens exit", xlabel="step", ylabel="loops", ylim=(0.9, n_loops + 0.1))
    axes.legend(frameon=False, fontsize=9)


def _draw_frontier(axes: Axes, results: Sequence[LoopResult], colours: np.ndarray) -> None:
    rates = np.array([result.tokens_per_second for result in results], dtype=np.float64)
    perplexities = [result.ppl for result in results]
    axes.plot(rates, perplexities, color="0.7", linewidth=1.2, zorder=1)
    axes.scatter(rates, perplexities, c=colours, s=55, zorder=2)
    for result in results:
        axes.annotate(
            f"K = {result.n_loops}",
            (result.tokens_per_second, result.ppl),
            textcoords="offset points",
            xytext=(7, 7),
            fontsize=10,
        )
    axes.margins(0.15)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(title="Validation perplexity against speed", xlabel="forward tokens/s", ylabel="perplexity")


def _draw_depths(axes: Axes, results: Sequence[LoopResult], n_loops: int) -> None:
    loops, perplexities = [result.n_loops for result in results], [result.ppl for result in results]
    axes.axvline(n_loops, color="0.7", linewidth=1.2, linestyle=":", label=f"the model's K = {n_loops}")
    axes.plot(loops, perplexities, color="0.25", linewidth=1.4, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(loops, [str(loop) for loop in loops])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title="Validation perplexity against depth", xlabel="loops", ylabel="perplexity")
    axes.legend(frameon=False, fontsize=9)


def _draw_accuracy(axes: Axes, results: Sequence[LoopResult], n_loops: int) -> None:
    axes.axvline(n_loops, color="0.7", linewidth=1.2, linestyle=":", label=f"the model's K = {n_loops}")
    for name, colour in zip(shares_of(results), ("0.25", *_colours(len(shares_of(results)) - 1)), strict=True):
        shares = [(result.accuracy or {})[name] for result in results]
        axes.plot([result.n_loops for result in results], shares, color=colour, linewidth=1.4, marker="o", label=name)
    axes.set(title="Validation answers that are right", xlabel="loops", ylabel="share", ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=9)
