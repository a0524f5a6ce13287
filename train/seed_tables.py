"""Every measurement of the diagnoses over seeds: a table each, conditions by mean (smallest to largest)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from looped.diagnose.dynamics import PERCENTILES
from looped.diagnose.verdict import Measurements
from train.evidence import Evidence
from train.sweep_plan import CONDITIONS
from train.sweep_report import spread, table

Seeds = Mapping[int, Mapping[str, Evidence]]  # seed, condition: a complete run
LOOPS = range(1, 5)  # the trained ones


@dataclass(frozen=True)
class Column:
    """A number of one run, nan where it has none. form: how it is printed."""

    label: str
    value: Callable[[Measurements], float]
    form: str = "{:.4g}"


def _by_loop(label: str, values: Callable[[Measurements], Sequence[float]], form: str) -> tuple[Column, ...]:
    """A column for each trained loop; ``label`` has a place for its number."""
    return tuple(
        Column(label.format(k), lambda measured, k=k: values(measured)[k - 1], form)  # type: ignore[misc]
        for k in LOOPS
    )


def _relative(measured: Measurements, errors: Sequence[float]) -> float:
    return sum(errors) / sum(map(abs, measured.updates.increment))


def _percentile_ratio(percentiles: Sequence[float]) -> float:
    named = dict(zip(PERCENTILES, percentiles, strict=True))
    return named[99] / named[1]


def _penalised(measured: Measurements) -> Sequence[float]:
    return measured.radial.training if measured.penalty > 0 else [math.nan] * len(LOOPS)


# By title: what is measured, and its columns.
TABLES: dict[str, tuple[Column, ...]] = {
    "Norm of the state: mean over tokens, spread over tokens, and what one loop makes of the norm it begins with": (
        Column("\\|\\|H_0\\|\\|", lambda one: one.norms.entered[0]),
        Column("\\|\\|H_1\\|\\|", lambda one: one.norms.mean[0]),
        Column("\\|\\|H_4\\|\\|", lambda one: one.norms.mean[3]),
        Column("99th over 1st percentile of tokens, 4", lambda one: _percentile_ratio(one.norms.percentiles[3])),
        Column("\\|\\|H_30\\|\\|", lambda one: one.norms.mean[29]),
        Column("within loop 1, times", lambda one: one.norms.within[0]),
        Column("within loop 4, times", lambda one: one.norms.within[3]),
    ),
    "Radial fraction of the immediate cross-entropy gradient, and what eps makes it at loop 4": (
        *_by_loop("loop {}", lambda one: one.radial.immediate, "{:.2g}"),
        Column("by the equation, loop 4", lambda one: one.radial.exact[3], "{:.2g}"),
    ),
    "Radial fraction of the whole cross-entropy gradient, and of the training gradient where there is a penalty": (
        *_by_loop("loop {}", lambda one: one.radial.total, "{:.2g}"),
        *_by_loop("with the penalty, {}", _penalised, "{:.2g}"),
    ),
    "Radial clamp: change of the cross-entropy at K = 4, nats, and the standard error within a run": (
        Column("scale frozen", lambda one: one.clamp.frozen.change[3], "{:+.4f}"),
        Column("standard error", lambda one: one.clamp.frozen.error[3], "{:.4f}"),
        Column("radial part removed", lambda one: one.clamp.tangential.change[3], "{:+.4f}"),
        Column("standard error", lambda one: one.clamp.tangential.error[3], "{:.4f}"),
        Column("both", lambda one: one.clamp.both.change[3], "{:+.4f}"),
        Column("standard error", lambda one: one.clamp.both.error[3], "{:.4f}"),
    ),
    "Range of the cross-entropy over alpha in [0.1, 10], nats": _by_loop(
        "loop {}", lambda one: one.alpha.ranges, "{:.2g}"
    ),
    "Updates: growth of the scale, errors of its predictions over 29 updates, angular motion": (
        Column("s_5 - s_4", lambda one: one.updates.increment[3]),
        Column("error, first order", lambda one: _relative(one, one.updates.first_error), "{:.2%}"),
        Column("error, second order", lambda one: _relative(one, one.updates.second_error), "{:.2%}"),
        Column("rms(b_perp), loop 4", lambda one: one.updates.tangential[3]),
        Column("rms(u+ - u), loop 1", lambda one: one.updates.angular[0]),
        Column("loop 4", lambda one: one.updates.angular[3]),
        Column("loop 29", lambda one: one.updates.angular[28]),
    ),
    "Response of the next loop to twice the state (about 1: the scale is fed back; 0: it is removed)": tuple(
        Column(f"loop {k}", lambda one, k=k: one.response[k - 1], "{:.2g}")  # type: ignore[misc]
        for k in (1, 2, 3)
    ),
    "Cross-entropy of stopping after K loops, nats, tokens of the diagnosis; the paper gives no number beyond 4": (
        *_by_loop("as trained, K = {}", lambda one: one.depth.as_trained, "{:.3f}"),
        *(
            Column(f"as last, K = {k}", lambda one, k=k: one.depth.ce[k - 1], "{:.3f}")  # type: ignore[misc]
            for k in (1, 2, 3, 8, 16)
        ),
    ),
    "Calibrated halting on the report slice: mean loops, and perplexity over that at K = 4": (
        Column("loops, as trained", lambda one: one.halting.as_trained.loops, "{:.2f}"),
        Column("PPL ratio", lambda one: one.halting.as_trained.ratio, "{:.4f}"),
        Column("on the calibration slice", lambda one: one.halting.as_trained.calibration_ratio, "{:.4f}"),
        Column("loops, as last", lambda one: one.halting.as_last.loops, "{:.2f}"),
        Column("PPL ratio, as last", lambda one: one.halting.as_last.ratio, "{:.4f}"),
    ),
}


def measurements(seeds: Seeds) -> list[dict[str, Any]]:
    """Every number of the tables: of each its title, the names of its columns, and these by condition and seed."""
    return [
        {
            "title": title,
            "columns": [column.label for column in columns],
            "values_by_seed": {
                condition: {
                    seed: [column.value(runs[condition].measured) for column in columns]
                    for seed, runs in seeds.items()
                    if condition in runs
                }
                for condition in _present(seeds)
            },
        }
        for title, columns in TABLES.items()
    ]


def seed_tables(seeds: Seeds) -> str:
    """The section of a page, in Markdown."""
    parts = ["## Every measurement, over seeds", "Mean over seeds, in brackets the smallest and the largest value."]
    for title, columns in TABLES.items():
        rows = []
        for condition in _present(seeds):
            runs = [seed[condition].measured for seed in seeds.values() if condition in seed]
            cells = [_cell([column.value(one) for one in runs], column) for column in columns]
            rows.append([f"`{condition}`", *cells])
        parts += [f"{title}:", table(["condition", *(column.label for column in columns)], rows)]
    return "\n\n".join(parts)


def _present(seeds: Seeds) -> list[str]:
    return [condition for condition in CONDITIONS if any(condition in runs for runs in seeds.values())]


def _cell(values: Sequence[float], column: Column) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    return spread({"mean": mean(finite), "min": min(finite), "max": max(finite)}, column.form)
