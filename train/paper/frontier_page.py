"""The frontier as tables, from its record; the paper's own numbers apart from the measured ones.

The record is that of the .json beside the page, in which None stands for a number that is not finite.
"""

from collections.abc import Sequence
from typing import Any

from train.paper.conditions import FINAL_ONLY, PAPER_RATES
from train.paper.tables import page, paper_depth_table, table, versions_line

Record = dict[str, Any]


def seed_count(record: Record) -> str:
    counts = sorted({len(point["seeds"]) for point in record["points"]})
    return f"{'-'.join(map(str, counts))} seed{'' if counts == [1] else 's'}"


def steps_of(record: Record) -> str:
    steps = sorted({run["steps"] for run in record["runs"]})
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


def threads_of(record: Record) -> str:
    return f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}"


def rows_by(key: str, rows: Sequence[Record]) -> dict[str, list[Record]]:
    """Rows of the record, grouped by one of their fields."""
    return {name: [row for row in rows if row[key] == name] for name in dict.fromkeys(row[key] for row in rows)}


def markdown(record: Record, name: str) -> str:
    """The page beside the figure and the record of that ``name``; the paper's numbers are in a table of their own."""
    settings = record["settings"]
    speed = [f"tokens/s, {batch} x {settings['seq_len']}" for batch in record["points"][0]["tokens_per_second"]]
    rows = [
        [
            f"`{point['condition']}`",
            str(point["n_loops"]),
            _interval(point["ppl"], "{:.4g}"),
            _seeds(point["ppl"]["by_seed"]),
            _interval(point["ppl_difference"], "{:+.3g}"),
            _interval(point["bits_per_byte"], "{:.4f}"),
            *_speeds(point),
        ]
        for point in record["points"]
    ]
    trained = ", ".join(sorted({str(run["commit"]) for run in record["runs"]}))
    seeds = [
        f"`{condition}` {', '.join(str(run['seed']) for run in runs)}"
        for condition, runs in rows_by("condition", record["runs"]).items()
    ]
    parts = [
        "# Perplexity against speed at K loops",
        f"{_subject(record)} The perplexities compare with each other, and not with those of another text, tokenizer "
        "or length of training: the paper's are in a table of their own.",
        table(["condition", "K", "PPL", "seeds", f"PPL - `{settings['reference']}`", "bits per byte", *speed], rows),
        _explanation(record, name),
        f"![perplexity against tokens per second]({name}.png)",
        "## Speed",
        "Prefill: the decoder at K loops and the logits of the last state, without gradients; median of "
        f"{settings['rounds']} rounds in which all models and K take turns. *Fused*: the decoder's norms "
        "are this project's kernels; attention, the norm before the head and the head's product are PyTorch's in all "
        "models. The plain ones have the first model's architecture.",
        table(["model", "K", *speed], [[row["model"], str(row["n_loops"]), *_speeds(row)] for row in record["speeds"]]),
        "## Measured on",
        f"- {record['date']}, {record['device']}, {threads_of(record)}, {versions_line(record['versions'])}\n"
        f"- commit {record['commit']}; runs trained at {trained}\n- seeds: {'; '.join(seeds)}",
        "## The paper's numbers",
        "Sharma & Vu (arXiv 2606.24898), 129M parameters, WikiText-103, word-level tokenizer: perplexity at K loops, "
        "and the throughput of their reference implementation, GPU not stated. Not measured here.",
        paper_depth_table("", ["tokens/s", *(f"{rate:,}" for rate in PAPER_RATES)]),
    ]
    return page(parts) + "\n"


def _subject(record: Record) -> str:
    settings = record["settings"]
    missing = ", ".join(f"`{name}`" for name in record["without_runs"])
    return (
        f"Preset `{settings['preset']}`, {settings['parameters']:,} parameters, {steps_of(record)} training steps on "
        f"{settings['text']}, evaluated on {settings['tokens']:,} validation tokens of {settings['documents']} "
        f"documents in windows of {settings['seq_len']}, {settings['dtype']}."
        + (f" Without a complete run: {missing}." if missing else "")
    )


def _explanation(record: Record, name: str) -> str:
    settings = record["settings"]
    intervals = "No intervals: they are over documents, and there is one."
    if settings["documents"] > 1:
        intervals = (
            f"In brackets the 95% interval of {settings['draws']:,} bootstrap draws over the {settings['documents']} "
            "documents, the seeds averaged within a draw. All conditions have the same draws, and a difference is "
            "taken within a draw and a seed: whether two conditions differ is seen from its interval, not from whether "
            "the intervals of two perplexities overlap. What another seed would give is seen from the column *seeds*."
        )
    explanation = (
        "PPL and bits per byte are means over seeds, *seeds* the number of runs and their smallest and largest PPL. "
        f"{intervals} tokens/s: see below; conditions of one architecture share them. `{name}.json` has the quartiles."
    )
    if FINAL_ONLY in rows_by("condition", record["points"]):
        explanation += (
            f" Every loop is read as if it were the last: `{FINAL_ONLY}` at a K below its last loop goes through the "
            "norm, though training read those loops without it."
        )
    return explanation


def _speeds(row: Record) -> list[str]:
    return [f"{rate['median']:,.0f}" for rate in row["tokens_per_second"].values()]


def _interval(estimate: Record | None, form: str) -> str:
    if estimate is None or estimate["mean"] is None:
        return "-"
    mean, low, high = (
        "?" if estimate[name] is None else form.format(estimate[name]) for name in ("mean", "low", "high")
    )
    return mean if low == high == "?" else f"{mean} ({low} to {high})"


def _seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return str(len(values)) + (f": {min(known):.4g} to {max(known):.4g}" if len(known) > 1 else "")
