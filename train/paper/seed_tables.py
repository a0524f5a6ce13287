"""Every measurement of the diagnoses over seeds: a table each, conditions by mean (smallest to largest)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from looped.diagnose.dynamics import PERCENTILES
from looped.diagnose.verdict import Measurements
from train.paper.claim import Quantity, Seed, diagnosed
from train.paper.conditions import N_LOOPS, NAMES
from train.paper.tables import page, spread, table

TRAINED = range(1, N_LOOPS + 1)


def first_order_error(run: Measurements) -> float:
    """Mean absolute error of the predicted increments of the scale, token by token, over their mean size."""
    return sum(run.updates.first_error) / sum(map(abs, run.updates.increment))


def second_order_error(run: Measurements) -> float:
    """The same of the prediction to second order."""
    return sum(run.updates.second_error) / sum(map(abs, run.updates.increment))


def _by_loop(
    label: str, values: Callable[[Measurements], Sequence[float]], form: str, loops: Iterable[int] = TRAINED
) -> list[Quantity]:
    """A column for each loop (from 1); ``label`` has a place for its number."""

    def after(loop: int) -> Quantity:
        return diagnosed(label.format(loop), lambda run: values(run)[loop - 1], form)

    return list(map(after, loops))


def _percentile_ratio(run: Measurements) -> float:
    named = dict(zip(PERCENTILES, run.norms.percentiles[3], strict=True))
    return named[99] / named[1]


def _penalised(run: Measurements) -> Sequence[float]:
    return run.radial.training if run.penalty > 0 else [math.nan] * N_LOOPS


# By title: what is measured, and its columns.
TABLES: dict[str, Sequence[Quantity]] = {
    "Norm of the state: mean over tokens, spread over tokens, and what one loop makes of the norm it begins with": (
        diagnosed("\\|\\|H_0\\|\\|", lambda run: run.norms.entered[0]),
        diagnosed("\\|\\|H_1\\|\\|", lambda run: run.norms.mean[0]),
        diagnosed("\\|\\|H_4\\|\\|", lambda run: run.norms.mean[3]),
        diagnosed("99th over 1st percentile of tokens, 4", _percentile_ratio),
        diagnosed("\\|\\|H_30\\|\\|", lambda run: run.norms.mean[29]),
        diagnosed("within loop 1, times", lambda run: run.norms.within[0]),
        diagnosed("within loop 4, times", lambda run: run.norms.within[3]),
    ),
    "Radial fraction of the immediate cross-entropy gradient, and what eps makes it at loop 4": (
        *_by_loop("loop {}", lambda run: run.radial.immediate, "{:.2g}"),
        diagnosed("by the equation, loop 4", lambda run: run.radial.exact[3], "{:.2g}"),
    ),
    "Radial fraction of the whole cross-entropy gradient, and of the training gradient where there is a penalty": (
        *_by_loop("loop {}", lambda run: run.radial.total, "{:.2g}"),
        *_by_loop("with the penalty, {}", _penalised, "{:.2g}"),
    ),
    "Radial clamp: change of the cross-entropy at K = 4, nats, and the standard error within a run": (
        diagnosed("scale frozen", lambda run: run.clamp.frozen.change[3], "{:+.4f}"),
        diagnosed("standard error", lambda run: run.clamp.frozen.error[3], "{:.4f}"),
        diagnosed("radial part removed", lambda run: run.clamp.tangential.change[3], "{:+.4f}"),
        diagnosed("standard error", lambda run: run.clamp.tangential.error[3], "{:.4f}"),
        diagnosed("both", lambda run: run.clamp.both.change[3], "{:+.4f}"),
        diagnosed("standard error", lambda run: run.clamp.both.error[3], "{:.4f}"),
    ),
    "Range of the cross-entropy over alpha in [0.1, 10], nats": (
        _by_loop("loop {}", lambda run: run.alpha.ranges, "{:.2g}")
    ),
    "Updates: growth of the scale, errors of its predictions over 29 updates, angular motion": (
        diagnosed("s_5 - s_4", lambda run: run.updates.increment[3]),
        diagnosed("error, first order", first_order_error, "{:.2%}"),
        diagnosed("error, second order", second_order_error, "{:.2%}"),
        diagnosed("rms(b_perp), loop 4", lambda run: run.updates.tangential[3]),
        diagnosed("rms(u+ - u), loop 1", lambda run: run.updates.angular[0]),
        diagnosed("loop 4", lambda run: run.updates.angular[3]),
        diagnosed("loop 29", lambda run: run.updates.angular[28]),
    ),
    "Response of the next loop to twice the state (about 1: the scale is fed back; 0: it is removed)": (
        _by_loop("loop {}", lambda run: run.response, "{:.2g}", (1, 2, 3))
    ),
    "Cross-entropy of stopping after K loops, nats, tokens of the diagnosis; the paper gives no number beyond 4": (
        *_by_loop("as trained, K = {}", lambda run: run.depth.as_trained, "{:.3f}"),
        *_by_loop("as last, K = {}", lambda run: run.depth.ce, "{:.3f}", (1, 2, 3, 8, 16)),
    ),
    "Calibrated halting on the report slice: mean loops, and perplexity over that at K = 4": (
        diagnosed("loops, as trained", lambda run: run.halting.as_trained.loops, "{:.2f}"),
        diagnosed("PPL ratio", lambda run: run.halting.as_trained.ratio, "{:.4f}"),
        diagnosed("on the calibration slice", lambda run: run.halting.as_trained.calibration_ratio, "{:.4f}"),
        diagnosed("loops, as last", lambda run: run.halting.as_last.loops, "{:.2f}"),
        diagnosed("PPL ratio, as last", lambda run: run.halting.as_last.ratio, "{:.4f}"),
    ),
}


def measurements(seeds: Mapping[int, Seed]) -> list[dict[str, Any]]:
    """Every number of the tables: of each its title, the names of its columns, and these by condition and seed."""
    present = [condition for condition in NAMES if any(condition in runs for runs in seeds.values())]
    return [
        {
            "title": title,
            "columns": [column.label for column in columns],
            "values_by_seed": {
                condition: {
                    seed: [column.value(runs[condition]) for column in columns]
                    for seed, runs in seeds.items()
                    if condition in runs
                }
                for condition in present
            },
        }
        for title, columns in TABLES.items()
    ]


def seed_tables(measured: Sequence[dict[str, Any]]) -> str:
    """The section of a page, from what ``measurements`` gave, with None for a number that is not finite."""
    parts = ["## Every measurement, over seeds", "Mean over seeds, in brackets the smallest and the largest value."]
    for record, columns in zip(measured, TABLES.values(), strict=True):
        rows = []
        for condition, by_seed in record["values_by_seed"].items():
            numbers = zip(*by_seed.values(), strict=True)
            known = [[value for value in column if value is not None] for column in numbers]
            cells = [spread(values, column.form) for values, column in zip(known, columns, strict=True)]
            rows.append([f"`{condition}`", *cells])
        parts += [f"{record['title']}:", table(["condition", *record["columns"]], rows)]
    return page(parts)
