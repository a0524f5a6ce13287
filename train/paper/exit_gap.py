"""Figure 1 of the paper: what exiting after one loop costs, against the size of the last state."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from looped.diagnose.figures import MARKERS, colours_of
from train.paper.conditions import NAMES
from train.paper.runs import RunResult, by_condition

COLOURS: dict[str, str] = dict(zip(NAMES, colours_of(NAMES), strict=True))  # of a condition, in every figure
FIGURE_SIZE = (8.5, 4.8)  # inches
GAP_LINEAR = 0.01  # nats: below this the axis of exit gaps is linear
MARGIN = 0.03  # decades beyond whole ones, so that a marker at the edge is whole


def draw_exit_gap(path: Path, results: Sequence[RunResult]) -> None:
    """CE(K=1) - CE(K=n_loops) against ||H_K||: a point for each complete run, a marker for each condition."""
    figure, axes = plt.subplots(figsize=FIGURE_SIZE, layout="constrained")
    for condition, group in by_condition(results).items():
        axes.scatter(
            [result.state_norm for result in group],
            [result.exit_gap for result in group],
            marker=MARKERS[list(COLOURS).index(condition) % len(MARKERS)],
            color=COLOURS[condition],
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
    last = len(results[0].evaluation)
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
