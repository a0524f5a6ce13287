"""The page of the claims, claims.md, from their record, claims.json."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from train.paper.claim import Claim, Mark, Untestable, mark_of
from train.paper.claims import CLAIMS
from train.paper.conditions import N_LOOPS, NAMES
from train.paper.paper_scale import paper_scale
from train.paper.runs import RunResult
from train.paper.seed_tables import seed_tables
from train.paper.tables import (
    condition_table,
    cost,
    depth_table,
    made_by,
    page,
    paper_depth_rows,
    settings_line,
    spread,
    table,
    versions_line,
)  # fmt: skip

Record = dict[str, Any]  # as JSON has it: None for a number that is not finite


def markdown(record: Record) -> str:
    """claims.md. Of the seeds' numbers and marks all is in ``record``; CLAIMS say how the numbers are printed."""
    runs, asked = [RunResult(**run) for run in record["runs"]], record["seeds"]
    marks = [judged["mark"] for judged in record["claims"]]
    counts = {mark: marks.count(mark) for mark in get_args(Mark)}
    overview = [
        [str(number), judged["title"], judged["mark"], _seeds_held(judged, asked)]
        for number, judged in enumerate(record["claims"], start=1)
    ]
    parts = [
        f"# The claims of the paper, at the scale of preset {record['settings']['preset']}",
        "Every claim of Sharma & Vu, *Dense Supervision Is Not Enough* (arXiv 2606.24898), beside what a sweep gives. "
        + settings_line(runs, record["settings"]),
        made_by(record["commands"]),
        f"**{', '.join(f'{count} {mark}' for mark, count in counts.items() if count)}.** A claim is *reproduced* if "
        "its rules hold for every seed that has all the runs it needs, *not reproduced* if one fails for one of them, "
        "and *not measured* if there is no such seed. The program applies the rules; nobody marks by hand. They stand "
        "beside the numbers of the claim. Where final-only stops before its last loop there are two ways to "
        "read it, and both are given: *as trained*, without the norm, as training read that loop; *as last*, through "
        "the norm of the last loop. The evaluation that training leaves, and so every table of perplexity at K = 1..4 "
        "below, reads as last; a claim that depends on it says which reading decides, and what the other one gives.",
        _missing(runs, asked),
        table(["", "claim", "mark", "holds for"], overview),
        *_sections(record),
        "## All conditions",
        condition_table(runs, record["settings"]),
        "Perplexity when stopping after K loops, mean over seeds, and the paper's at 129M:",
        depth_table(runs),
        table(["the paper, 129M", *(f"K = {k}" for k in range(1, N_LOOPS + 1))], paper_depth_rows()),
        seed_tables(record["measurements"]),
        _figures(record["diagnosed"]["shown"]),
        _origin(record, runs),
        paper_scale(),
    ]
    return page(parts) + "\n"


def _seeds_held(judged: Record, asked: Sequence[int]) -> str:
    if "why" in judged:
        return "-"
    measured = len(judged["values_by_seed"])
    held = f"{len(judged['seeds_that_hold'])} of {measured} seeds" if measured else "no seed"
    return held + (f" ({len(asked) - measured} of {len(asked)} missing)" if measured < len(asked) else "")


def _missing(runs: Sequence[RunResult], asked: Sequence[int]) -> str:
    """What is lacking of all conditions times the seeds that were asked for."""
    states = {(run.condition, run.seed): run.status for run in runs}
    lacking: dict[tuple[str, str], list[str]] = {}
    for condition in NAMES:
        for seed in asked:
            state = states.get((condition, seed), "absent")
            if state != "complete":
                words = {"absent": "not there", "checkpoint": "stopped"}.get(state, state)
                lacking.setdefault((condition, words), []).append(str(seed))
    total, count = len(NAMES) * len(asked), sum(map(len, lacking.values()))
    if not lacking:
        return f"All {total} runs are there: {len(NAMES)} conditions, {len(asked)} seeds."
    names = [f"`{condition}` seed {', '.join(seeds)} ({state})" for (condition, state), seeds in lacking.items()]
    return f"**{count} of {total} runs are missing:** {'; '.join(names)}."


def _sections(record: Record) -> Iterator[str]:
    for number, (claim, judged) in enumerate(zip(CLAIMS, record["claims"], strict=True), start=1):
        heading = f"### {number}. {judged['title']}\n\n**{judged['mark']}**"
        if isinstance(claim, Untestable):
            yield f"{heading}. The paper: {judged['paper']}. {judged['why']}"
        else:
            yield f"{heading}: {_seeds_held(judged, record['seeds'])}.\n\n{_numbers(claim, judged, record['seeds'])}"


def _numbers(claim: Claim, judged: Record, asked: Sequence[int]) -> str:
    """The seeds of a claim, and its quantities over them beside their rules."""
    values = {int(seed): numbers for seed, numbers in judged["values_by_seed"].items()}
    missing = ", ".join(str(seed) for seed in asked if seed not in values)
    seeds = f"Seeds: {', '.join(map(str, values)) or 'none'}" + (f"; {missing} missing." if missing else ".")
    failed = [str(seed) for seed in values if seed not in judged["seeds_that_hold"]]
    lines = [f"- The paper: {judged['paper']}.", f"- {seeds}"]
    if failed:
        lines[-1] += f" The rules fail for {', '.join(failed)}."
    if claim.note:
        lines.append(f"- {claim.note}.")
    if "alternative" in judged and values:
        other, count = judged["alternative"], len(judged["alternative"]["seeds_that_hold"])
        lines.append(
            f"- The other reading, {other['reading']}: the rules hold for {count} of {len(values)} seeds, which would "
            f"be *{mark_of(count, len(values))}*."
        )
    lines.append(f"- Figure: [{claim.figure}]({claim.figure}).")
    columns = list(zip(*values.values(), strict=True)) or [()] * len(claim.quantities)
    rows = [
        [label, spread([float("nan") if value is None else value for value in column], quantity.form), rule]
        for label, rule, quantity, column in zip(
            judged["quantities"], judged["rules"], claim.quantities, columns, strict=True
        )
    ]
    return (
        "\n".join(lines) + "\n\n" + table(["quantity", "ours: mean over seeds (smallest to largest)", "must be"], rows)
    )


def _figures(shown: int) -> str:
    pictures = [
        ("Exit gap against the size of the last state, every run", "exit_gap.png"),
        ("Norm of the state over 30 loops", "norms.png"),
        ("Radial fraction of the gradients", "radial.png"),
        ("Updates: increments of the scale, predicted and measured; angular motion", "updates.png"),
        ("Radial clamp", "clamp.png"),
        ("The final state scaled by alpha before the readout", "alpha-final.png"),
        ("The state of every loop scaled by alpha before its readout", "alpha-loops.png"),
        ("Cross-entropy after K loops", "depth.png"),
        ("Calibrated halting", "halting.png"),
    ]
    shots = "\n\n".join(f"{title}:\n\n![{title}]({name})" for title, name in pictures)
    return (
        f"## Figures\n\nAll but the first are of seed {shown}; [index.html](index.html) has them with their tables and "
        f"a verdict on every model, [diagnosis.json](diagnosis.json) the numbers.\n\n{shots}"
    )


def _origin(record: Record, runs: Sequence[RunResult]) -> str:
    diagnosed, made = record["diagnosed"], record["made"]
    return "\n".join(
        [
            "## Cost and origin\n",
            cost(runs),
            f"- Diagnosis: on {' or '.join(f'{count:,}' for count in diagnosed['tokens'])} validation tokens of every "
            f"run; {diagnosed['device']}; commit {diagnosed['commit']}.",
            f"- Page made: {made['date']}; {made['device']}; {versions_line(made['versions'])}; "
            f"commit {made['commit'] or 'not known'}.",
        ]
    )
