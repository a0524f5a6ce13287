"""The page of the claims, claims.md, from their record, claims.json."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from train.paper import tables
from train.paper.claim import Claim, Mark, mark_of
from train.paper.claims import CLAIMS
from train.paper.conditions import NAMES
from train.paper.paper_scale import paper_scale
from train.paper.runs import RunResult
from train.paper.seed_tables import seed_tables

Record = dict[str, Any]  # as JSON has it: None for a number that is not finite

FIGURES = {
    "exit_gap.png": "Exit gap against the size of the last state, every run",
    "norms.png": "Norm of the state over 30 loops",
    "radial.png": "Radial fraction of the gradients",
    "updates.png": "Updates: increments of the scale, predicted and measured; angular motion",
    "clamp.png": "Radial clamp",
    "alpha-final.png": "The final state scaled by alpha before the readout",
    "alpha-loops.png": "The state of every loop scaled by alpha before its readout",
    "depth.png": "Cross-entropy after K loops",
    "halting.png": "Calibrated halting",
}


def markdown(record: Record) -> str:
    """claims.md. Of the seeds' numbers and marks all is in ``record``; CLAIMS say how the numbers are printed."""
    runs, seeds, claims = [RunResult(**run) for run in record["runs"]], record["seeds"], record["claims"]
    marks = [judged["mark"] for judged in claims]
    counts = ", ".join(f"{marks.count(mark)} {mark}" for mark in get_args(Mark) if mark in marks)
    overview = [
        [str(number), judged["title"], judged["mark"], _seeds_held(judged, seeds)]
        for number, judged in enumerate(claims, start=1)
    ]
    diagnosed, made = record["diagnosed"], record["made"]
    parts = [
        f"# The claims of the paper, at the scale of preset {record['settings']['preset']}",
        "Every claim of Sharma & Vu, *Dense Supervision Is Not Enough* (arXiv 2606.24898), beside what a sweep gives. "
        + tables.settings_line(runs, record["settings"]),
        tables.made_by(record["commands"]),
        f"**{counts}.** A claim is *reproduced* if its rules hold for every seed that has all the runs it needs, *not "
        "reproduced* if one fails for one of them, and *not measured* if there is no such seed. The program applies "
        "the rules; nobody marks by hand. They stand beside the numbers of the claim. Where final-only stops before "
        "its last loop there are two ways to read it, and both are given: *as trained*, without the norm, as training "
        "read that loop; *as last*, through the norm of the last loop. The evaluation that training leaves, and so "
        "every table of perplexity at K = 1..4 below, reads as last; a claim that depends on it says which reading "
        "decides, and what the other one gives.",
        _missing(runs, seeds),
        tables.table(["", "claim", "mark", "holds for"], overview),
        *(_section(number, *pair, seeds) for number, pair in enumerate(zip(CLAIMS, claims, strict=True), start=1)),
        "## All conditions",
        tables.condition_table(runs, record["settings"]),
        "Perplexity when stopping after K loops, mean over seeds, and the paper's at 129M:",
        tables.depth_table(runs),
        tables.paper_depth_table("the paper, 129M"),
        seed_tables(record["measurements"]),
        f"## Figures\n\nAll but the first are of seed {diagnosed['shown']}; [index.html](index.html) has them with "
        "their tables and a verdict on every model, [diagnosis.json](diagnosis.json) the numbers.",
        *(f"{title}:\n\n![{title}]({name})" for name, title in FIGURES.items()),
        f"## Cost and origin\n\n{tables.cost(runs)}\n"
        f"- Diagnosis: on {' or '.join(f'{count:,}' for count in diagnosed['tokens'])} validation tokens of every "
        f"run; {diagnosed['device']}; commit {diagnosed['commit']}.\n"
        f"- Page made: {made['date']}; {made['device']}; {tables.versions_line(made['versions'])}; "
        f"commit {made['commit'] or 'not known'}.",
        paper_scale(),
    ]
    return tables.page(parts) + "\n"


def _seeds_held(judged: Record, asked: Sequence[int]) -> str:
    if "why" in judged:
        return "-"
    measured = len(judged["values_by_seed"])
    held = f"{len(judged['seeds_that_hold'])} of {measured} seeds" if measured else "no seed"
    return held + (f" ({len(asked) - measured} of {len(asked)} missing)" if measured < len(asked) else "")


def _missing(runs: Sequence[RunResult], asked: Sequence[int]) -> str:
    """What is lacking of all conditions times the seeds that were asked for."""
    total = len(NAMES) * len(asked)
    states = {(run.condition, run.seed): run.status for run in runs}
    lacking: dict[tuple[str, str], list[str]] = {}
    for condition in NAMES:
        for seed in asked:
            state: str = states.get((condition, seed), "absent")
            if state != "complete":
                state = {"absent": "not there", "checkpoint": "stopped"}.get(state, state)
                lacking.setdefault((condition, state), []).append(str(seed))
    if not lacking:
        return f"All {total} runs are there: {len(NAMES)} conditions, {len(asked)} seeds."
    names = [f"`{condition}` seed {', '.join(seeds)} ({state})" for (condition, state), seeds in lacking.items()]
    return f"**{sum(map(len, lacking.values()))} of {total} runs are missing:** {'; '.join(names)}."


def _section(number: int, claim: Claim, judged: Record, asked: Sequence[int]) -> str:
    """A claim, its mark, and its quantities over the seeds beside their rules."""
    heading = f"### {number}. {judged['title']}\n\n**{judged['mark']}**"
    if "why" in judged:
        return f"{heading}. The paper: {judged['paper']}. {judged['why']}"
    columns = list(zip(*judged["values_by_seed"].values(), strict=True)) or [()] * len(claim.quantities)
    known = [[float("nan") if value is None else value for value in column] for column in columns]
    cells = [tables.spread(values, quantity.form) for values, quantity in zip(known, claim.quantities, strict=True)]
    rows = list(zip(judged["quantities"], cells, judged["rules"], strict=True))
    return tables.page(
        [
            f"{heading}: {_seeds_held(judged, asked)}.",
            "\n".join(f"- {fact}." for fact in _facts(claim, judged, asked)),
            tables.table(["quantity", "ours: mean over seeds (smallest to largest)", "must be"], rows),
        ]
    )


def _facts(claim: Claim, judged: Record, asked: Sequence[int]) -> Iterator[str]:
    values, held = judged["values_by_seed"], judged["seeds_that_hold"]
    yield f"The paper: {judged['paper']}"
    seeds = [int(seed) for seed in values]
    missing = ", ".join(str(seed) for seed in asked if seed not in seeds)
    failed = ", ".join(str(seed) for seed in seeds if seed not in held)
    yield (
        f"Seeds: {', '.join(map(str, values)) or 'none'}"
        + (f"; {missing} missing" if missing else "")
        + (f". The rules fail for {failed}" if failed else "")
    )
    if claim.note:
        yield claim.note
    if values and "alternative" in judged:
        reading, count = judged["alternative"]["reading"], len(judged["alternative"]["seeds_that_hold"])
        yield (
            f"The other reading, {reading}: the rules hold for {count} of {len(values)} seeds, which would be "
            f"*{mark_of(count, len(values))}*"
        )
    yield f"Figure: [{claim.figure}]({claim.figure})"
