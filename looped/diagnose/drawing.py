"""What the figures of a page share: how a model is drawn, axes, legends and grids of panels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from looped.diagnose.verdict import Measurements

PANELS = 3  # in a row, of figures with a panel for each model


@dataclass(frozen=True)
class Drawn:
    """A diagnosed model, and how every figure draws it."""

    name: str
    measured: Measurements
    colour: str
    marker: str


def panel_grid(models: Sequence[Drawn], title: str, label: str) -> tuple[Figure, list[Axes]]:
    """A panel for each model. Those of a row share their y axis, which is named and numbered at the first of them."""
    count, columns = len(models), min(PANELS, len(models))
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(6.5, 3.8 * columns), 3.6 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[count:]:
        axes.remove()
    figure.suptitle(title, fontsize=11)
    panels = list(grid.flat[:count])
    for axes, model in zip(panels, models, strict=True):
        axes.set_title(model.name)
    for axes in panels[::PANELS]:
        axes.set_ylabel(label)
        axes.tick_params(labelleft=True)
    return figure, panels


def from_1(values: Sequence[float]) -> np.ndarray:
    """The loops that `values` are of: 1, 2, ..."""
    return np.arange(1, len(values) + 1)


def style(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)


def loop_axis(axes: Axes) -> None:
    axes.set_xlabel("loop k")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    style(axes)


def alpha_axis(axes: Axes) -> None:
    axes.set(xlabel=r"$\alpha$", xscale="log")
    axes.set_xticks([0.1, 0.3, 1, 3, 10])
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style(axes)


def log_if_wide(axes: Axes, rows: Iterable[Any], *, ratio: float = 30) -> None:
    """A logarithmic y axis if all values are positive and the largest is over `ratio` times the smallest.

    Where the values span few decades the axis is labelled 10, 20, 50.
    """
    values = _finite(rows)
    if not values.size or values.min() <= 0 or values.max() <= ratio * values.min():
        return
    axes.set_yscale("log")
    if values.max() > 1e4 * values.min():
        return  # powers of ten, as they come
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 300 * values.min() else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def symlog_if_wide(axes: Axes, rows: Iterable[Any]) -> None:
    """A logarithmic y axis, as `log_if_wide`, that runs through 0 where some values are not positive."""
    values = _finite(rows)
    if not values.size or values.min() > 0:
        log_if_wide(axes, [values])
    elif np.abs(values).max() > 10:
        symlog_beyond(axes, 1)


def symlog_beyond(axes: Axes, linear: float) -> None:
    """A y axis that shows at least -linear to linear, and is logarithmic beyond that."""
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(1.4 * low, -linear), max(1.4 * high, linear))
    if min(low, -high) >= -linear:
        return  # a symlog axis has no ticks where all of it is linear
    axes.set_yscale("symlog", linthresh=linear)
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_locator(NullLocator())


def _finite(rows: Iterable[Any]) -> np.ndarray:
    values = np.concatenate([np.ravel(row).astype(float) for row in rows])
    return values[np.isfinite(values)]


def _plain(value: float, _: int) -> str:
    return f"{value:,g}"


def key(label: str, marker: str, line: Any, fillstyle: Any = "full") -> Line2D:
    return Line2D(
        [], [], color="0.35", marker=marker or "none", linestyle=line, label=label, markersize=5, fillstyle=fillstyle
    )


def legend(axes: Axes, *keys: Line2D) -> None:
    axes.legend(handles=keys, framealpha=0.8, fontsize=8)


def legend_below(figure: Figure, keys: Sequence[Any], *, columns: int) -> None:
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def name_curves(figure: Figure, models: Sequence[Drawn], *, markers: bool = False) -> None:
    """Say below the figure which curve has which colour, and which marker where those differ too."""
    keys = [
        Line2D(
            [], [], color=model.colour, linewidth=2.2, label=model.name, markersize=5,
            marker=model.marker if markers else "none",
        )
        for model in models
    ]  # fmt: skip
    legend_below(figure, keys, columns=3 if figure.get_figwidth() < 10 else 5)
