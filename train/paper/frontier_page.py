"""The frontier as tables, from its record; the paper's own numbers apart from the measured ones.

The record is that of the .json beside the page, in which None stands for a number that is not finite.
"""

from collections.abc import Sequence
from typing import Any

from train.paper.conditions import FINAL_ONLY, PAPER_RATES
from train.paper.tables import page, paper_depth_rows, table, versions_line

Record = dict[str, Any]

READ_AS_LAST = (
    " Every loop is read as if it were the last: `per-loop-final-only` at a K below its last loop goes through the "
    "norm, though training read those loops without it."
)


def seed_count(record: Record) -> str:
    counts = sorted({len(point["seeds"]) for point in record["points"]})
    return f"{'-'.join(map(str, counts))} seed{'' if counts == [1] else 's'}"


def steps_of(record: Record) -> str:
    steps = sorted({run["steps"] for run in record["runs"]})
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


def markdown(record: Record, name: str) -> str:
    """The page beside the figure and the record of that ``name``; the paper's numbers are in a table of their own."""
    settings = record["settings"]
    batches = list(record["points"][0]["tokens_per_second"])
    header = [
        "condition", "K", "PPL", "seeds", f"PPL - `{settings['reference']}`", "bits per byte",
        *(f"tokens/s, {batch} x {settings['seq_len']}" for batch in batches),
    ]  # fmt: skip
    rows = [
        [
            f"`{point['condition']}`",
            str(point["n_loops"]),
            _interval(point["ppl"], "{:.4g}"),
            _seeds(point["ppl"]["by_seed"]),
            _interval(point["ppl_difference"], "{:+.3g}"),
            _interval(point["bits_per_byte"], "{:.4f}"),
            *(f"{point['tokens_per_second'][batch]['median']:,.0f}" for batch in batches),
        ]
        for point in record["points"]
    ]
    parts = [
        "# Perplexity against speed at K loops",
        f"{_subject(record)} The perplexities compare with each other, and not with those of another text, tokenizer "
        "or length of training: the paper's are in a table of their own.",
        table(header, rows),
        _explanation(record, name),
        f"![perplexity against tokens per second]({name}.png)",
        "## Speed",
        _speeds(record, batches),
        "## Measured on",
        _environment(record),
        "## The paper's numbers",
        "Sharma & Vu (arXiv 2606.24898), 129M parameters, WikiText-103, word-level tokenizer: perplexity at K loops, "
        "and the throughput of their reference implementation, GPU not stated. Not measured here.",
        _paper_table(),
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
    if settings["documents"] < 2:
        intervals = "No intervals: they are over documents, and there is one."
    else:
        intervals = (
            f"In brackets the 95% interval of {settings['draws']:,} bootstrap draws over the {settings['documents']} "
            "documents, the seeds averaged within a draw. All conditions have the same draws, and a difference is "
            "taken within a draw and a seed: whether two conditions differ is seen from its interval, not from whether "
            "the intervals of two perplexities overlap. What another seed would give is seen from the column *seeds*."
        )
    final_only = FINAL_ONLY in {point["condition"] for point in record["points"]}
    return (
        f"PPL and bits per byte are means over seeds, *seeds* the number of runs and their smallest and largest PPL. "
        f"{intervals} tokens/s: see below; conditions of one architecture share them. "
        f"`{name}.json` has the quartiles." + (READ_AS_LAST if final_only else "")
    )


def _speeds(record: Record, batches: Sequence[str]) -> str:
    """What exactly is timed, and a row for each model and K."""
    seq_len = record["settings"]["seq_len"]
    header = ["model", "K", *(f"tokens/s, {batch} x {seq_len}" for batch in batches)]
    rows = [
        [row["model"], str(row["n_loops"]), *(f"{row['tokens_per_second'][b]['median']:,.0f}" for b in batches)]
        for row in record["speeds"]
    ]
    return (
        "Prefill: the decoder at K loops and the logits of the last state, without gradients; median of "
        f"{record['settings']['rounds']} rounds in which all models and K take turns. *Fused*: the decoder's norms "
        "are this project's kernels; attention, the norm before the head and the head's product are PyTorch's in all "
        "models. The plain ones have the first model's architecture.\n\n" + table(header, rows)
    )


def _environment(record: Record) -> str:
    trained = ", ".join(sorted({str(run["commit"]) for run in record["runs"]}))
    return "\n".join(
        [
            f"- {record['date']}, {record['device']}, {threads_of(record)}, {versions_line(record['versions'])}",
            f"- commit {record['commit']}; runs trained at {trained}",
            f"- seeds: {'; '.join(_seeds_of(record))}",
        ]
    )


def by_condition(rows: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Points, or runs, of each condition."""
    names = dict.fromkeys(row["condition"] for row in rows)
    return [(name, [row for row in rows if row["condition"] == name]) for name in names]


def threads_of(record: Record) -> str:
    return f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}"


def _seeds_of(record: Record) -> list[str]:
    return [f"`{name}` {', '.join(str(run['seed']) for run in rows)}" for name, rows in by_condition(record["runs"])]


def _paper_table() -> str:
    depths = (f"K = {depth}" for depth in range(1, len(PAPER_RATES) + 1))
    return table(["", *depths], [*paper_depth_rows(), ["tokens/s", *(f"{rate:,}" for rate in PAPER_RATES)]])


def _interval(estimate: Record | None, form: str) -> str:
    if estimate is None or estimate["mean"] is None:
        return "-"
    mean, low, high = (
        "?" if estimate[name] is None else form.format(estimate[name]) for name in ("mean", "low", "high")
    )
    return mean if low == high == "?" else f"{mean} ({low} to {high})"


def _seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    spread = f": {min(known):.4g} to {max(known):.4g}" if len(known) > 1 else ""
    return f"{len(values)}{spread}"
