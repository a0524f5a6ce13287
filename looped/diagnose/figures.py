"""The figures of a page: one curve or panel for each model that is diagnosed, so that several can be compared."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from looped.diagnose.diagnosis import Diagnosis
from looped.diagnose.dynamics import PERCENTILES

# Okabe & Ito's colours without the pale yellow, then three more; told apart by most colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A4FA3", "#8C6D31", "#7F7F7F")
PANELS = 3  # in a row, of figures with a panel for each model

Diagnoses = Sequence[Diagnosis]


def norm_figure(diagnoses: Diagnoses) -> Figure:
    """||H_k|| over loops: the mean and the 1-99 and 25-75 percentile bands over tokens, a panel for each model."""
    figure, panels = _panels(len(diagnoses))
    for axes, diagnosis, colour in zip(panels, diagnoses, _colours(), strict=False):
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
    panels[0].set_ylabel(r"$\|H_k\|_2$ of a token")
    panels[0].legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def radial_figure(diagnoses: Diagnoses) -> Figure:
    """Radial fractions by loop: the immediate gradient, and the whole one without and with the penalty."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for diagnosis, colour in zip(diagnoses, _colours(), strict=False):
        radial = diagnosis.measured.radial
        loops = np.arange(1, len(radial.immediate) + 1)
        left.plot(loops, radial.immediate, color=colour, marker="o")
        left.plot(loops, radial.immediate_float64, color=colour, marker="s", markersize=4, linestyle="--", linewidth=1)
        left.plot(loops, radial.exact, color=colour, marker="x", markersize=9, linestyle="none")
        right.plot(loops, radial.total, color=colour, marker="o")
        if diagnosis.measured.penalty > 0:
            right.plot(loops, radial.training, color=colour, marker="s", markersize=4, linestyle="--", linewidth=1)
    left.set(title="immediate gradient of each loop's cross-entropy", ylabel="mean radial fraction")
    right.set(title="whole gradient, through later loops")
    kinds = ("model's precision", "o", "-"), ("float64", "s", "--"), ("what eps makes it, by the equation", "x", "none")
    left.legend(handles=[_key(*kind) for kind in kinds], framealpha=0.8, fontsize=8)
    right.legend(
        handles=[_key("cross-entropy", "o", "-"), _key("with the penalty", "s", "--")], framealpha=0.8, fontsize=8
    )
    _name_curves(figure, diagnoses)
    for axes in (left, right):
        axes.set(xlabel="loop k", yscale="log")
        _whole_loops(axes)
        _style(axes)
    return figure


def update_figure(diagnoses: Diagnoses) -> Figure:
    """Every update over the horizon: the scale's increment and its predictions, tangential part, angular motion."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    increments, errors, tangential, angular = grid.flat
    for diagnosis, colour in zip(diagnoses, _colours(), strict=False):
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
    _log_if_wide(increments, [one.measured.updates.increment + one.measured.updates.first_order for one in diagnoses])
    _log_if_wide(tangential, [diagnosis.measured.updates.tangential for diagnosis in diagnoses])
    _log_if_wide(angular, [diagnosis.measured.updates.angular for diagnosis in diagnoses], ratio=8)
    _name_curves(figure, diagnoses)
    return figure


def clamp_figure(diagnoses: Diagnoses) -> Figure:
    """Change of the cross-entropy after each loop when the scale is frozen after loop 1."""
    figure, axes = plt.subplots(figsize=(6.5, 3.9), layout="constrained")
    for diagnosis, colour in zip(diagnoses, _colours(), strict=False):
        clamp = diagnosis.measured.clamp
        change = np.subtract(clamp.clamped, clamp.free)
        axes.plot(np.arange(1, len(change) + 1), change, color=colour, marker="o")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(xlabel="loop k, read as the last", ylabel="change of the cross-entropy, nats")
    _name_curves(figure, diagnoses)
    _whole_loops(axes)
    _style(axes)
    return figure


def final_alpha_figure(diagnoses: Diagnoses) -> Figure:
    """Cross-entropy of alpha * H_K against alpha."""
    figure, axes = plt.subplots(figsize=(6.5, 3.9), layout="constrained")
    for diagnosis, colour in zip(diagnoses, _colours(), strict=False):
        sweep = diagnosis.measured.alpha
        axes.plot(sweep.alphas, sweep.ce[-1], color=colour, marker="o", markersize=4)
    axes.set(xlabel=r"$\alpha$", ylabel=r"cross-entropy of $\alpha H_K$, nats")
    _alpha_axis(axes)
    _log_if_wide(axes, [diagnosis.measured.alpha.ce[-1] for diagnosis in diagnoses], ratio=8)
    _name_curves(figure, diagnoses)
    return figure


def alpha_figure(diagnoses: Diagnoses) -> Figure:
    """Cross-entropy of alpha * H_k against alpha at every trained loop, a panel for each model."""
    figure, panels = _panels(len(diagnoses))
    for axes, diagnosis in zip(panels, diagnoses, strict=False):
        sweep = diagnosis.measured.alpha
        shades = plt.colormaps["viridis"](np.linspace(0.05, 0.85, len(sweep.ce)))
        for loop, (row, shade) in enumerate(zip(sweep.ce, shades, strict=True), start=1):
            axes.plot(sweep.alphas, row, color=shade, marker="o", markersize=3, linewidth=1.3, label=f"k = {loop}")
        axes.set(title=diagnosis.name, xlabel=r"$\alpha$")
        _alpha_axis(axes)
        _log_if_wide(axes, [one.measured.alpha.ce for one in diagnoses], ratio=8)
    panels[0].set_ylabel(r"cross-entropy of $\alpha H_k$, nats")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def depth_figure(diagnoses: Diagnoses) -> Figure:
    """Cross-entropy of stopping after K loops, to beyond the trained depth."""
    figure, axes = plt.subplots(figsize=(6.5, 3.9), layout="constrained")
    for diagnosis, colour in zip(diagnoses, _colours(), strict=False):
        ce, trained = diagnosis.measured.depth.ce, diagnosis.measured.n_loops
        axes.plot(np.arange(1, trained + 1), ce[:trained], color=colour, marker="o", markersize=5)
        axes.plot(np.arange(trained, len(ce) + 1), ce[trained - 1 :], color=colour, linestyle="--", linewidth=1.2)
    axes.set(xlabel="K, loops until the readout (dashed: beyond those trained)", ylabel="cross-entropy, nats")
    _name_curves(figure, diagnoses)
    _whole_loops(axes)
    _style(axes)
    return figure


FIGURES: dict[str, Callable[[Diagnoses], Figure]] = {
    "norms": norm_figure,
    "radial": radial_figure,
    "updates": update_figure,
    "clamp": clamp_figure,
    "alpha-final": final_alpha_figure,
    "alpha-loops": alpha_figure,
    "depth": depth_figure,
}


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(PANELS, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(6.5, 3.8 * columns), 3.6 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def _colours() -> list[str]:
    return list(COLOURS) * 10


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


def _mark_trained(axes: Axes, diagnosis: Diagnosis) -> None:
    axes.axvline(diagnosis.measured.n_loops, color="0.4", linewidth=0.9, linestyle="--", label="trained depth")


def _band(low: int, high: int) -> str:
    return "least to largest" if (low, high) == (0, 100) else f"percentiles {low}-{high}"


def _key(label: str, marker: str, line: Any) -> Line2D:
    return Line2D([], [], color="0.35", marker=marker or "none", linestyle=line, label=label, markersize=5)


def _name_curves(figure: Figure, diagnoses: Diagnoses) -> None:
    """Below the figure, whose curve has which colour."""
    names = zip(diagnoses, _colours(), strict=False)
    handles = [Line2D([], [], color=colour, linewidth=2.2, label=one.name) for one, colour in names]
    columns = 3 if figure.get_figwidth() < 10 else 5
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
