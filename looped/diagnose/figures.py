"""The figures of a page: one curve or panel for each model that is diagnosed, so that several can be compared."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from looped.diagnose.diagnosis import Diagnosis
from looped.diagnose.dynamics import PERCENTILES
from looped.diagnose.halting import Halt

# Okabe & Ito's colours without the pale yellow, then three more; told apart by most colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A4FA3", "#8C6D31", "#7F7F7F")
MARKERS = "osD^vP*Xhd"
PANELS = 3  # in a row, of figures with a panel for each model
PAPER_CLAMP = 0.0055  # nats, the largest change under the radial clamp in Sharma & Vu (arXiv 2606.24898)

Diagnoses = Sequence[Diagnosis]
Colours = Sequence[str]


def colours_of(names: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """A colour for each model, by its place, unless `known` has one for its name."""
    return [(known or {}).get(name, COLOURS[place % len(COLOURS)]) for place, name in enumerate(names)]


def norm_figure(diagnoses: Diagnoses, colours: Colours) -> Figure:
    """||H_k|| over loops: the mean and the 1-99 and 25-75 percentile bands over tokens, a panel for each model."""
    figure, panels = _panels(len(diagnoses), "Norm of the state of every token, loop by loop")
    for axes, diagnosis, colour in zip(panels, diagnoses, colours, strict=True):
        norms = diagnosis.measured.norms
        bands = dict(zip(PERCENTILES, np.asarray(norms.percentiles).T, strict=True))
        loops = np.arange(1, len(norms.mean) + 1)
        for low, high, alpha in ((0, 100, 0.12), (1, 99, 0.2), (25, 75, 0.35)):
            axes.fill_between(
                loops, bands[low], bands[high], color=colour, alpha=alpha, linewidth=0, label=_band(low, high)
            )
        axes.plot(loops, norms.mean, color=colour, linewidth=1.8, label="mean")
        _mark_trained(axes, diagnosis)
        axes.set(title=diagnosis.name, xlabel="loop k")
        _whole_loops(axes)
        _style(axes)
        _log_if_wide(axes, [one.measured.norms.percentiles for one in diagnoses])
    _label_rows(panels, r"$\|H_k\|_2$ of a token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def radial_figure(diagnoses: Diagnoses, colours: Colours) -> Figure:
    """Radial fractions by loop: the immediate gradient, and the whole one without and with the penalty. Models that
    have the same values stand side by side within a loop."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    width = 0.7 / len(diagnoses)
    for place, (diagnosis, colour) in enumerate(zip(diagnoses, colours, strict=True)):
        radial = diagnosis.measured.radial
        loops = np.arange(1, len(radial.immediate) + 1) + width * (place - (len(diagnoses) - 1) / 2)
        look = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "markersize": 5, "linewidth": 0.8}
        left.plot(loops, radial.immediate, **look)
        left.plot(loops, radial.immediate_float64, **look | {"markersize": 4, "fillstyle": "none", "linestyle": "--"})
        left.plot(loops, radial.exact, color="0.15", marker="x", markersize=7, linestyle="none", zorder=4)
        right.plot(loops, radial.total, **look)
        if diagnosis.measured.penalty > 0:
            right.plot(loops, radial.training, **look | {"fillstyle": "none", "linestyle": "--"})
    left.set(title="immediate gradient of each loop's cross-entropy", ylabel="mean radial fraction")
    right.set(title="whole gradient, through later loops")
    whole = _key("model's precision", "o", "-"), _key("float64", "o", "--", fillstyle="none")
    left.legend(handles=[*whole, _key("what eps makes it, by the equation", "x", "none")], framealpha=0.8, fontsize=8)
    penalised = _key("with the penalty", "o", "--", fillstyle="none")
    right.legend(handles=[_key("cross-entropy", "o", "-"), penalised], framealpha=0.8, fontsize=8)
    _name_curves(figure, diagnoses, colours, MARKERS)
    for axes in (left, right):
        axes.set(xlabel="loop k", yscale="log")
        axes.xaxis.set_major_locator(FixedLocator(range(1, max(one.measured.n_loops for one in diagnoses) + 1)))
        _style(axes)
    figure.suptitle("Radial fraction of the gradients", fontsize=11)
    return figure


def update_figure(diagnoses: Diagnoses, colours: Colours) -> Figure:
    """Every update over the horizon: the scale's increment and its predictions, tangential part, angular motion."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    increments, errors, tangential, angular = grid.flat
    for diagnosis, colour in zip(diagnoses, colours, strict=True):
        updates = diagnosis.measured.updates
        loops = np.arange(1, len(updates.increment) + 1)
        increments.plot(loops, updates.increment, color=colour, linewidth=2.2, alpha=0.6)
        increments.plot(loops, updates.first_order, color=colour, linestyle=":", linewidth=1.2)
        increments.plot(loops, updates.second_order, color=colour, linestyle="--", linewidth=1)
        errors.plot(loops, updates.first_error, color=colour, linestyle=":", linewidth=1.4)
        errors.plot(loops, updates.second_error, color=colour, linestyle="--", linewidth=1.2)
        tangential.plot(loops, updates.angular_times_scale, color=colour, linewidth=2.2, alpha=0.6)
        tangential.plot(loops, updates.tangential, color=colour, linestyle="--", linewidth=1)
        angular.plot(loops, updates.angular, color=colour, linewidth=1.8)
    increments.set(title="what the update from $H_k$ to $H_{k+1}$ adds to the scale", ylabel=r"$s_{k+1} - s_k$")
    first, second = ("first order, $a$", "", ":"), (r"second, $a + \mathrm{rms}(b_\perp)^2 / 2s$", "", "--")
    increments.legend(handles=[_key("measured", "", "-"), _key(*first), _key(*second)], framealpha=0.8, fontsize=8)
    errors.set(title="error of the predictions", ylabel="mean absolute error, token by token", yscale="log")
    errors.legend(handles=[_key(*first), _key(*second)], framealpha=0.8, fontsize=8)
    tangential.set(title="angular motion times scale, and the tangential update", ylabel="rms over channels")
    measured = (r"$s_k\,\mathrm{rms}(u_{k+1} - u_k)$", "", "-")
    tangential.legend(handles=[_key(*measured), _key(r"$\mathrm{rms}(b_\perp)$", "", "--")], framealpha=0.8, fontsize=8)
    angular.set(title="angular motion", ylabel=r"$\mathrm{rms}(u_{k+1} - u_k)$")
    for axes in grid.flat:
        axes.set_xlabel("loop k")
        _whole_loops(axes)
        _style(axes)
    _symlog_if_wide(
        increments, [one.measured.updates.increment + one.measured.updates.first_order for one in diagnoses]
    )
    _log_if_wide(tangential, [diagnosis.measured.updates.tangential for diagnosis in diagnoses])
    _log_if_wide(angular, [diagnosis.measured.updates.angular for diagnosis in diagnoses], ratio=8)
    figure.suptitle("Updates of the state, loop by loop", fontsize=11)
    _name_curves(figure, diagnoses, colours)
    return figure


def clamp_figure(diagnoses: Diagnoses, colours: Colours) -> Figure:
    """Change of the cross-entropy at K under each form of the clamp, with standard errors, a group for each model."""
    figure, axes = plt.subplots(figsize=(max(6.5, 1.2 * len(diagnoses)), 4.2), layout="constrained")
    forms = {"scale frozen": "", "radial part removed": "///", "both": "xxx"}
    for place, (diagnosis, colour) in enumerate(zip(diagnoses, colours, strict=True)):
        clamp = diagnosis.measured.clamp
        for column, (form, hatch) in enumerate(
            zip((clamp.frozen, clamp.tangential, clamp.both), forms.values(), strict=True)
        ):
            axes.bar(
                place + 0.27 * (column - 1),
                form.change[-1],
                width=0.25,
                yerr=form.error[-1],
                facecolor="white" if hatch else colour,
                edgecolor=colour,
                hatch=hatch,
                error_kw={"linewidth": 0.8, "ecolor": "0.2", "capsize": 2},
            )
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.axhline(PAPER_CLAMP, color="0.2", linewidth=0.9, linestyle="--")
    axes.set_yscale("symlog", linthresh=0.01)
    _plain_symlog(axes)
    axes.set_xticks(range(len(diagnoses)), [one.name for one in diagnoses], rotation=25, ha="right", fontsize=8)
    axes.set(title="Radial clamp: what it costs at K", ylabel="change of the cross-entropy, nats")
    keys = [
        Patch(facecolor="white" if hatch else "0.5", edgecolor="0.5", hatch=hatch, label=form)
        for form, hatch in forms.items()
    ]
    paper = _key(f"the paper's largest, {PAPER_CLAMP}", "", "--")
    figure.legend(handles=[*keys, paper], loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _style(axes)
    return figure


def final_alpha_figure(diagnoses: Diagnoses, colours: Colours) -> Figure:
    """Cross-entropy of alpha * H_K minus that of H_K, against alpha."""
    figure, axes = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    least = 0.0
    for place, (diagnosis, colour) in enumerate(zip(diagnoses, colours, strict=True)):
        sweep = diagnosis.measured.alpha
        change = np.subtract(sweep.ce[-1], sweep.ce[-1][int(np.argmin(np.abs(np.log(sweep.alphas))))])
        least = min(least, change.min())
        axes.plot(sweep.alphas, change, color=colour, marker=MARKERS[place % len(MARKERS)], markersize=4)
    axes.set(
        title="The final state scaled by alpha before the readout",
        xlabel=r"$\alpha$",
        ylabel=r"CE of $\alpha H_K$ minus CE of $H_K$, nats",
    )
    _alpha_axis(axes)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=min(-0.01, 2 * least))
    _plain_symlog(axes)
    _name_curves(figure, diagnoses, colours, MARKERS)
    return figure


def alpha_figure(diagnoses: Diagnoses, _: Colours) -> Figure:
    """Cross-entropy of alpha * H_k against alpha at every trained loop, a panel for each model, shaded by loop."""
    figure, panels = _panels(len(diagnoses), "The state of every loop scaled by alpha before its readout")
    for axes, diagnosis in zip(panels, diagnoses, strict=True):
        sweep = diagnosis.measured.alpha
        shades = plt.colormaps["viridis"](np.linspace(0.05, 0.85, len(sweep.ce)))
        for loop, (row, shade) in enumerate(zip(sweep.ce, shades, strict=True), start=1):
            axes.plot(sweep.alphas, row, color=shade, marker="o", markersize=3, linewidth=1.3, label=f"k = {loop}")
        axes.set(title=diagnosis.name, xlabel=r"$\alpha$")
        _alpha_axis(axes)
        _log_if_wide(axes, [one.measured.alpha.ce for one in diagnoses], ratio=8)
    _label_rows(panels, r"cross-entropy of $\alpha H_k$, nats")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def depth_figure(diagnoses: Diagnoses, colours: Colours) -> Figure:
    """Cross-entropy of stopping after K loops, to beyond the trained depth; and as trained, where that differs."""
    figure, axes = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    ticks = {1}
    for diagnosis, colour in zip(diagnoses, colours, strict=True):
        depth, trained = diagnosis.measured.depth, diagnosis.measured.n_loops
        axes.plot(np.arange(1, trained + 1), depth.ce[:trained], color=colour, marker="o", markersize=5)
        axes.plot(np.arange(trained, len(depth.ce) + 1), depth.ce[trained - 1 :], color=colour, linestyle="--", lw=1.2)
        if depth.two_readings:
            loops = np.arange(1, trained + 1)
            axes.plot(loops, depth.as_trained, color=colour, marker="o", fillstyle="none", linestyle=":", linewidth=1.4)
        ticks |= {*range(trained, len(depth.ce) + 1, trained), len(depth.ce)}
    axes.set(title="Stopping after K loops", xlabel="K, loops until the readout", ylabel="cross-entropy, nats")
    keys = [_key("read as the last loop", "o", "-"), _key("beyond the trained depth", "", "--")]
    if any(one.measured.depth.two_readings for one in diagnoses):
        keys.append(_key("read as training read it", "o", ":", fillstyle="none"))
    axes.legend(handles=keys, framealpha=0.8, fontsize=8)
    _name_curves(figure, diagnoses, colours)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    _style(axes)
    return figure


def halting_readings(diagnosis: Diagnosis) -> dict[str, Halt]:
    """What is known of calibrated halting, by how the loops are read: one way, or two where training's differs."""
    halting = diagnosis.measured.halting
    if not diagnosis.measured.depth.two_readings:
        return {"as trained": halting.as_trained}
    return {"as trained": halting.as_trained, "as last": halting.as_last}


def halting_figure(diagnoses: Diagnoses, colours: Colours) -> Figure:
    """The share of tokens that stop after each loop, a bar for each model and reading, with the mean loops."""
    rows = [
        (one.name if read == "as trained" else f"{one.name}, {read}", colour, halt)
        for one, colour in zip(diagnoses, colours, strict=True)
        for read, halt in halting_readings(one).items()
    ]
    figure, axes = plt.subplots(figsize=(6.5, 1.5 + 0.3 * len(rows)), layout="constrained")
    n_loops = max(len(halt.exits) for _, _, halt in rows)
    shades = plt.colormaps["viridis"](np.linspace(0.05, 0.95, n_loops))
    for place, (_, _, halt) in enumerate(rows):
        ends = np.concatenate([[0], np.cumsum(halt.exits)])
        axes.barh([place] * len(halt.exits), halt.exits, left=ends[:-1], color=shades[: len(halt.exits)], height=0.7)
        axes.text(1.02, place, f"{halt.loops:.2f} loops", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8)
    for label, (_, colour, _) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colour)
    axes.invert_yaxis()
    axes.set(title="Calibrated halting: where tokens stop", xlabel="share of tokens", xlim=(0, 1.18))
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    keys = [Patch(color=shade, label=f"k = {loop}") for loop, shade in enumerate(shades, start=1)]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(8, n_loops), frameon=False, fontsize=8)
    _style(axes)
    axes.grid(False)
    return figure


FIGURES: dict[str, Callable[[Diagnoses, Colours], Figure]] = {
    "norms": norm_figure,
    "radial": radial_figure,
    "updates": update_figure,
    "clamp": clamp_figure,
    "alpha-final": final_alpha_figure,
    "alpha-loops": alpha_figure,
    "depth": depth_figure,
    "halting": halting_figure,
}


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(PANELS, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(6.5, 3.8 * columns), 3.6 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[count:]:
        axes.remove()
    figure.suptitle(title, fontsize=11)
    return figure, list(grid.flat[:count])


def _label_rows(panels: Sequence[Axes], label: str) -> None:
    """Name and number the y axis that the panels share at the first of every row."""
    for axes in panels[::PANELS]:
        axes.set_ylabel(label)
        axes.tick_params(labelleft=True)


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)


def _whole_loops(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _alpha_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.3, 1, 3, 10])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _style(axes)


def _log_if_wide(axes: Axes, values: Iterable[Any], *, ratio: float = 30) -> None:
    """A logarithmic y axis, labelled 10, 20, 50 where it spans few decades, if positive values span over `ratio`."""
    flat = np.concatenate([np.ravel(one).astype(float) for one in values])
    flat = flat[np.isfinite(flat)]
    if not flat.size or flat.min() <= 0 or flat.max() <= ratio * flat.min():
        return
    axes.set_yscale("log")
    if flat.max() > 1e4 * flat.min():
        return  # powers of ten, as they come
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if flat.max() < 300 * flat.min() else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _symlog_if_wide(axes: Axes, values: Iterable[Any]) -> None:
    """A logarithmic y axis, as `_log_if_wide`, that runs through 0 where some values are not positive."""
    flat = np.concatenate([np.ravel(one).astype(float) for one in values])
    flat = flat[np.isfinite(flat)]
    if not flat.size or flat.min() > 0:
        _log_if_wide(axes, [flat])
    elif np.abs(flat).max() > 10:
        axes.set_yscale("symlog", linthresh=1)
        _plain_symlog(axes)


def _plain_symlog(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _mark_trained(axes: Axes, diagnosis: Diagnosis) -> None:
    axes.axvline(diagnosis.measured.n_loops, color="0.4", linewidth=0.9, linestyle="--", label="trained depth")


def _band(low: int, high: int) -> str:
    return "least to largest" if (low, high) == (0, 100) else f"percentiles {low}-{high}"


def _key(label: str, marker: str, line: Any, fillstyle: Any = "full") -> Line2D:
    return Line2D(
        [], [], color="0.35", marker=marker or "none", linestyle=line, label=label, markersize=5, fillstyle=fillstyle
    )


def _name_curves(figure: Figure, diagnoses: Diagnoses, colours: Colours, markers: str = "") -> None:
    """Below the figure, whose curve has which colour, and marker if they differ in that too."""
    handles = [
        Line2D(
            [], [], color=colour, linewidth=2.2, label=one.name, markersize=5,
            marker=markers[place % len(markers)] if markers else "none",
        )
        for place, (one, colour) in enumerate(zip(diagnoses, colours, strict=True))
    ]  # fmt: skip
    columns = 3 if figure.get_figwidth() < 10 else 5
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
