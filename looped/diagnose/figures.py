"""The figures of a page. Each shows every model that is diagnosed, as a curve, a bar or a panel of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

from looped.diagnose import drawing
from looped.diagnose.diagnosis import Diagnosis
from looped.diagnose.drawing import Drawn
from looped.diagnose.dynamics import PERCENTILES
from looped.diagnose.verdict import THRESHOLDS

# Okabe & Ito's colours without the pale yellow, then three more; told apart by most colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A4FA3", "#8C6D31", "#7F7F7F")
MARKERS = "osD^vP*Xhd"
PAPER_CLAMP = 0.0055  # nats, the largest change under the radial clamp in Sharma & Vu (arXiv 2606.24898)


def colours_of(names: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """A colour for each model, by its place, unless `known` has one for its name."""
    return [(known or {}).get(name, COLOURS[place % len(COLOURS)]) for place, name in enumerate(names)]


def drawn_models(diagnoses: Sequence[Diagnosis], known_colours: Mapping[str, str] | None = None) -> list[Drawn]:
    """The models of `diagnoses` as the figures draw them. known_colours: by name, as for `colours_of`."""
    colours = colours_of([diagnosis.name for diagnosis in diagnoses], known_colours)
    return [
        Drawn(diagnosis.name, diagnosis.measured, colour, MARKERS[place % len(MARKERS)])
        for place, (diagnosis, colour) in enumerate(zip(diagnoses, colours, strict=True))
    ]


def norm_figure(models: Sequence[Drawn]) -> Figure:
    """||H_k|| over loops: the mean over tokens, and bands of percentiles. A panel for each model."""
    title = "Norm of the state of every token, loop by loop"
    figure, panels = drawing.panel_grid(models, title, r"$\|H_k\|_2$ of a token")
    for axes, model in zip(panels, models, strict=True):
        norms = model.measured.norms
        bands = dict(zip(PERCENTILES, np.asarray(norms.percentiles).T, strict=True))
        loops = drawing.from_1(norms.mean)
        for low, high, alpha in ((0, 100, 0.12), (1, 99, 0.2), (25, 75, 0.35)):
            label = "least to largest" if (low, high) == (0, 100) else f"percentiles {low}-{high}"
            axes.fill_between(loops, bands[low], bands[high], color=model.colour, alpha=alpha, linewidth=0, label=label)
        axes.plot(loops, norms.mean, color=model.colour, linewidth=1.8, label="mean")
        axes.axvline(model.measured.n_loops, color="0.4", linewidth=0.9, linestyle="--", label="trained depth")
        drawing.loop_axis(axes)
        drawing.log_if_wide(axes, [model.measured.norms.percentiles for model in models])
    drawing.legend_below(figure, panels[0].get_legend_handles_labels()[0], columns=5)
    return figure


def radial_figure(models: Sequence[Drawn]) -> Figure:
    """Radial fractions by loop: of the immediate gradient, and of the whole one without and with the penalty.

    Models that have the same values stand side by side within a loop.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    width = 0.7 / len(models)
    for place, model in enumerate(models):
        radial = model.measured.radial
        loops = drawing.from_1(radial.immediate) + width * (place - (len(models) - 1) / 2)
        look = {"color": model.colour, "marker": model.marker, "markersize": 5, "linewidth": 0.8}
        hollow = look | {"fillstyle": "none", "linestyle": "--"}
        left.plot(loops, radial.immediate, **look)
        left.plot(loops, radial.immediate_float64, **hollow | {"markersize": 4})
        left.plot(loops, radial.exact, color="0.15", marker="x", markersize=7, linestyle="none", zorder=4)
        right.plot(loops, radial.total, **look)
        if model.measured.penalty > 0:
            right.plot(loops, radial.training, **hollow)
    left.set(title="immediate gradient of each loop's cross-entropy", ylabel="mean radial fraction")
    right.set(title="whole gradient, through later loops")
    drawing.legend(
        left,
        drawing.key("model's precision", "o", "-"),
        drawing.key("float64", "o", "--", fillstyle="none"),
        drawing.key("what eps makes it, by the equation", "x", "none"),
    )
    drawing.legend(
        right, drawing.key("cross-entropy", "o", "-"), drawing.key("with the penalty", "o", "--", fillstyle="none")
    )
    for axes in (left, right):
        axes.set_yscale("log")
        drawing.loop_axis(axes)
    figure.suptitle("Radial fraction of the gradients", fontsize=11)
    drawing.name_curves(figure, models, markers=True)
    return figure


def update_figure(models: Sequence[Drawn]) -> Figure:
    """Every update: what it adds to the scale, the predictions of that, its tangential part and the angular motion."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    increments, errors, tangential, angular = grid.flat
    wide, dotted, dashed = {"linewidth": 2.2, "alpha": 0.6}, {"linestyle": ":"}, {"linestyle": "--"}
    for model in models:
        updates = model.measured.updates
        for axes, values, look in (
            (increments, updates.increment, wide),
            (increments, updates.first_order, dotted),
            (increments, updates.second_order, dashed),
            (errors, updates.first_error, dotted),
            (errors, updates.second_error, dashed),
            (tangential, updates.angular_times_scale, wide),
            (tangential, updates.tangential, dashed),
            (angular, updates.angular, {}),
        ):
            axes.plot(drawing.from_1(values), values, **{"color": model.colour, "linewidth": 1.3} | look)
    increments.set(title="what the update from $H_k$ to $H_{k+1}$ adds to the scale", ylabel=r"$s_{k+1} - s_k$")
    first = drawing.key("first order, $a$", "", ":")
    second = drawing.key(r"second, $a + \mathrm{rms}(b_\perp)^2 / 2s$", "", "--")
    drawing.legend(increments, drawing.key("measured", "", "-"), first, second)
    errors.set(title="error of the predictions", ylabel="mean absolute error, token by token", yscale="log")
    drawing.legend(errors, first, second)
    tangential.set(title="angular motion times scale, and the tangential update", ylabel="rms over channels")
    turned = drawing.key(r"$s_k\,\mathrm{rms}(u_{k+1} - u_k)$", "", "-")
    drawing.legend(tangential, turned, drawing.key(r"$\mathrm{rms}(b_\perp)$", "", "--"))
    angular.set(title="angular motion", ylabel=r"$\mathrm{rms}(u_{k+1} - u_k)$")
    for axes in grid.flat:
        drawing.loop_axis(axes)
    all_updates = [model.measured.updates for model in models]
    drawing.symlog_if_wide(increments, [updates.increment + updates.first_order for updates in all_updates])
    drawing.log_if_wide(tangential, [updates.tangential for updates in all_updates])
    drawing.log_if_wide(angular, [updates.angular for updates in all_updates], ratio=8)
    figure.suptitle("Updates of the state, loop by loop", fontsize=11)
    drawing.name_curves(figure, models)
    return figure


def clamp_figure(models: Sequence[Drawn]) -> Figure:
    """Change of the cross-entropy at K under each form of the clamp, with standard errors. A group for each model."""
    figure, axes = plt.subplots(figsize=(max(6.5, 1.2 * len(models)), 4.2), layout="constrained")
    hatches = {"scale frozen": "", "radial part removed": "///", "both": "xxx"}
    for place, model in enumerate(models):
        for column, (name, form) in enumerate(model.measured.clamp.forms.items()):
            hatch = hatches[name]
            axes.bar(
                place + 0.27 * (column - 1),
                form.change[-1],
                width=0.25,
                yerr=form.error[-1],
                facecolor="white" if hatch else model.colour,
                edgecolor=model.colour,
                hatch=hatch,
                error_kw={"linewidth": 0.8, "ecolor": "0.2", "capsize": 2},
            )
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.axhline(PAPER_CLAMP, color="0.2", linewidth=0.9, linestyle="--")
    drawing.symlog_beyond(axes, THRESHOLDS.used)
    axes.set_xticks(range(len(models)), [model.name for model in models], rotation=25, ha="right", fontsize=8)
    axes.set(title="Radial clamp: what it costs at K", ylabel="change of the cross-entropy, nats")
    keys = [
        Patch(facecolor="white" if hatch else "0.5", edgecolor="0.5", hatch=hatch, label=form)
        for form, hatch in hatches.items()
    ]
    drawing.legend_below(figure, [*keys, drawing.key(f"the paper's largest, {PAPER_CLAMP}", "", "--")], columns=4)
    drawing.style(axes)
    return figure


def final_alpha_figure(models: Sequence[Drawn]) -> Figure:
    """Cross-entropy of alpha * H_K minus that of H_K, against alpha."""
    figure, axes = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    for model in models:
        sweep = model.measured.alpha
        unscaled = int(np.argmin(np.abs(np.log(sweep.alphas))))
        change = np.subtract(sweep.ce[-1], sweep.ce[-1][unscaled])
        axes.plot(sweep.alphas, change, color=model.colour, marker=model.marker, markersize=4)
    axes.set(
        title="The final state scaled by alpha before the readout",
        ylabel=r"CE of $\alpha H_K$ minus CE of $H_K$, nats",
    )
    drawing.alpha_axis(axes)
    drawing.symlog_beyond(axes, THRESHOLDS.blind_range)
    drawing.name_curves(figure, models, markers=True)
    return figure


def alpha_figure(models: Sequence[Drawn]) -> Figure:
    """Cross-entropy of alpha * H_k against alpha at every trained loop, shaded by loop. A panel for each model."""
    title = "The state of every loop scaled by alpha before its readout"
    figure, panels = drawing.panel_grid(models, title, r"cross-entropy of $\alpha H_k$, nats")
    for axes, model in zip(panels, models, strict=True):
        sweep = model.measured.alpha
        shades = plt.colormaps["viridis"](np.linspace(0.05, 0.85, len(sweep.ce)))
        for loop, (row, shade) in enumerate(zip(sweep.ce, shades, strict=True), start=1):
            axes.plot(sweep.alphas, row, color=shade, marker="o", markersize=3, linewidth=1.3, label=f"k = {loop}")
        drawing.alpha_axis(axes)
        drawing.log_if_wide(axes, [model.measured.alpha.ce for model in models], ratio=8)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def depth_figure(models: Sequence[Drawn]) -> Figure:
    """Cross-entropy of stopping after K loops, beyond the trained depth too; and as trained, where that differs."""
    figure, axes = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    ticks = {1}
    for model in models:
        depth, trained = model.measured.depth, model.measured.n_loops
        look: dict[str, Any] = {"color": model.colour, "marker": "o", "markersize": 5}
        axes.plot(drawing.from_1(depth.as_trained), depth.ce[:trained], **look)
        beyond = np.arange(trained, len(depth.ce) + 1)
        axes.plot(beyond, depth.ce[trained - 1 :], color=model.colour, linestyle="--", linewidth=1.2)
        if depth.two_readings:
            axes.plot(
                drawing.from_1(depth.as_trained), depth.as_trained, **look | {"fillstyle": "none", "linestyle": ":"}
            )
        ticks |= {*range(trained, len(depth.ce) + 1, trained), len(depth.ce)}
    axes.set(title="Stopping after K loops", xlabel="K, loops until the readout", ylabel="cross-entropy, nats")
    keys = [drawing.key("read as the last loop", "o", "-"), drawing.key("beyond the trained depth", "", "--")]
    if any(model.measured.depth.two_readings for model in models):
        keys.append(drawing.key("read as training read it", "o", ":", fillstyle="none"))
    drawing.legend(axes, *keys)
    drawing.name_curves(figure, models)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    drawing.style(axes)
    return figure


def halting_figure(models: Sequence[Drawn]) -> Figure:
    """The share of tokens that stop after each loop, a bar for each model and reading, with the mean loops."""
    bars = [
        (model.name if reading == "as trained" else f"{model.name}, {reading}", model.colour, halt)
        for model in models
        for reading, halt in model.measured.halting_readings.items()
    ]
    figure, axes = plt.subplots(figsize=(6.5, 1.5 + 0.3 * len(bars)), layout="constrained")
    n_loops = max(len(halt.exits) for _, _, halt in bars)
    shades = plt.colormaps["viridis"](np.linspace(0.05, 0.95, n_loops))
    for place, (_, _, halt) in enumerate(bars):
        ends = np.concatenate([[0], np.cumsum(halt.exits)])
        axes.barh([place] * len(halt.exits), halt.exits, left=ends[:-1], color=shades[: len(halt.exits)], height=0.7)
        axes.text(1.02, place, f"{halt.loops:.2f} loops", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    for label, (_, colour, _) in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_color(colour)
    axes.invert_yaxis()
    axes.set(title="Calibrated halting: where tokens stop", xlabel="share of tokens", xlim=(0, 1.18))
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    keys = [Patch(color=shade, label=f"k = {loop}") for loop, shade in enumerate(shades, start=1)]
    drawing.legend_below(figure, keys, columns=min(8, n_loops))
    drawing.style(axes)
    axes.grid(False)
    return figure


FIGURES: dict[str, Callable[[Sequence[Drawn]], Figure]] = {
    "norms": norm_figure,
    "radial": radial_figure,
    "updates": update_figure,
    "clamp": clamp_figure,
    "alpha-final": final_alpha_figure,
    "alpha-loops": alpha_figure,
    "depth": depth_figure,
    "halting": halting_figure,
}
