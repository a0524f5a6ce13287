"""The page of the claims, in Markdown: each claim with its rule and numbers, measurements over seeds, cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, get_args

from train.claim import BASELINE_PPL, BLIND, SCALE_CONTROLLED, Claim, Mark, Outcome, Untestable
from train.evidence import Evidence
from train.paper_scale import paper_scale
from train.seed_tables import seed_tables
from train.sweep_plan import CONDITIONS
from train.sweep_report import (
    RunResult,
    condition_table,
    cost,
    depth_table,
    settings_line,
    spread,
    table,
)

N_LOOPS = 4  # of every run, as in the paper
PAPER_DEPTHS = {BLIND: BASELINE_PPL} | {name: ppl for name, (_, ppl) in SCALE_CONTROLLED.items()}

Judged = Sequence[tuple[Claim | Untestable, Outcome]]


@dataclass(frozen=True)
class Sweep:
    """results: of all runs, however far they got. seeds: the complete ones. asked: the seeds that should be there.
    commands: those that made the runs, if known, and the page."""

    results: list[RunResult]
    settings: dict[str, Any]
    seeds: dict[int, dict[str, Evidence]]
    asked: tuple[int, ...]
    commands: list[str] = field(default_factory=list)


def markdown(sweep: Sweep, judged: Judged, shown: int, made: dict[str, Any]) -> str:
    """claims.md. shown: the seed whose diagnosis the figures are of. made: where and when the page was."""
    counts = {mark: sum(outcome.mark == mark for _, outcome in judged) for mark in get_args(Mark)}
    overview = [
        [str(number), claim.title, outcome.mark, _seeds_held(claim, outcome, sweep.asked)]
        for number, (claim, outcome) in enumerate(judged, start=1)
    ]
    parts = [
        f"# The claims of the paper, at the scale of preset {sweep.settings['preset']}",
        "Every claim of Sharma & Vu, *Dense Supervision Is Not Enough* (arXiv 2606.24898), beside what a sweep gives. "
        + settings_line(sweep.results, sweep.settings),
        _commands(sweep.commands),
        f"**{', '.join(f'{count} {mark}' for mark, count in counts.items() if count)}.** A claim is *reproduced* if "
        "its rule holds for every seed that has all the runs it needs, *not reproduced* if it fails for one of them, "
        "and *not measured* if there is no such seed. The program applies the rules; nobody marks by hand. Each rule "
        "and its thresholds stand with the claim. Where final-only stops before its last loop there are two ways to "
        "read it, and both are given: *as trained*, without the norm, as training read that loop; *as last*, through "
        "the norm of the last loop. The evaluation that training leaves, and so every table of perplexity at K = 1..4 "
        "below, reads as last; a claim that depends on it says which reading decides, and what the other one gives.",
        _missing(sweep),
        table(["", "claim", "mark", "holds for"], overview),
        *(_section(number, claim, outcome, sweep.asked) for number, (claim, outcome) in enumerate(judged, start=1)),
        "## All conditions",
        condition_table(sweep.results, sweep.settings),
        "Perplexity when stopping after K loops, mean over seeds, and the paper's at 129M:",
        depth_table(sweep.results),
        table(
            ["the paper, 129M", *(f"K = {k}" for k in range(1, N_LOOPS + 1))],
            [[f"`{name}`", *(f"{value:.2f}" for value in ppl)] for name, ppl in PAPER_DEPTHS.items()],
        ),
        seed_tables(sweep.seeds),
        _figures(shown),
        _origin(sweep, made),
        paper_scale(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands(commands: Sequence[str]) -> str:
    return "Made by\n\n```\n" + "\n".join(commands) + "\n```" if commands else ""


def _seeds_held(claim: Claim | Untestable, outcome: Outcome, asked: Sequence[int]) -> str:
    if isinstance(claim, Untestable):
        return "-"
    measured = f"{len(outcome.held)} of {len(outcome.values)} seeds" if outcome.values else "no seed"
    lacking = len(asked) - len(outcome.values)
    return measured + (f" ({lacking} of {len(asked)} missing)" if lacking else "")


def _missing(sweep: Sweep) -> str:
    """What is lacking of all conditions times the seeds that were asked for."""
    states = {(result.condition, result.seed): result.status for result in sweep.results}
    lacking: dict[tuple[str, str], list[str]] = {}
    for condition in CONDITIONS:
        for seed in sweep.asked:
            state = states.get((condition, seed), "absent")
            if state != "complete":
                words = {"absent": "not there", "checkpoint": "stopped"}.get(state, state)
                lacking.setdefault((condition, words), []).append(str(seed))
    total, count = len(CONDITIONS) * len(sweep.asked), sum(map(len, lacking.values()))
    if not lacking:
        return f"All {total} runs are there: {len(CONDITIONS)} conditions, {len(sweep.asked)} seeds."
    runs = [f"`{condition}` seed {', '.join(seeds)} ({state})" for (condition, state), seeds in lacking.items()]
    return f"**{count} of {total} runs are missing:** {'; '.join(runs)}."


def _section(number: int, claim: Claim | Untestable, outcome: Outcome, asked: Sequence[int]) -> str:
    heading = f"### {number}. {claim.title}\n\n**{outcome.mark}**"
    if isinstance(claim, Untestable):
        return f"{heading}. The paper: {claim.paper}. {claim.why}"
    columns = list(zip(*outcome.values.values(), strict=True)) or [()] * len(claim.quantities)
    rows = [
        [quantity.label, _spread(values, quantity.form)]
        for quantity, values in zip(claim.quantities, columns, strict=True)
    ]
    lacking = [str(seed) for seed in asked if seed not in outcome.values]
    seeds = f"Seeds: {', '.join(map(str, outcome.values)) or 'none'}"
    seeds += f"; {', '.join(lacking)} missing." if lacking else "."
    failed = [str(seed) for seed in outcome.values if seed not in outcome.held]
    return "\n\n".join(
        [
            f"{heading}: {_seeds_held(claim, outcome, asked)}.",
            f"- The paper: {claim.paper}.\n- Rule: {claim.rule}.\n- {seeds}"
            + (f" The rule fails for {', '.join(failed)}." if failed else "")
            + _otherwise(claim, outcome)
            + f"\n- Figure: [{claim.figure}]({claim.figure}).",
            table(["quantity", "ours: mean over seeds (smallest to largest)"], rows),
        ]
    )


def _otherwise(claim: Claim, outcome: Outcome) -> str:
    if claim.alternative is None or not outcome.values:
        return ""
    count = len(outcome.held_otherwise)
    mark = "reproduced" if count == len(outcome.values) else "not reproduced"
    return (
        f"\n- The other reading, {claim.alternative.words}: the rule holds for {count} of {len(outcome.values)} seeds, "
        f"which would be *{mark}*."
    )


def _spread(values: Sequence[float], form: str) -> str:
    return spread({"mean": mean(values), "min": min(values), "max": max(values)} if values else None, form)


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


def _origin(sweep: Sweep, made: dict[str, Any]) -> str:
    tokens = sorted({evidence.diagnosis.n_tokens for runs in sweep.seeds.values() for evidence in runs.values()})
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    origins = [evidence.diagnosis.origin for runs in sweep.seeds.values() for evidence in runs.values()]
    devices = "; ".join(dict.fromkeys(origin["device"] for origin in origins if "device" in origin)) or "not known"
    commits = "; ".join(dict.fromkeys(origin["commit"] for origin in origins if "commit" in origin)) or "not known"
    return "\n".join(
        [
            "## Cost and origin\n",
            cost(sweep.results),
            f"- Diagnosis: on {' or '.join(f'{count:,}' for count in tokens)} validation tokens of every run; "
            f"{devices}; commit {commits}.",
            f"- Page made: {made['date']}; {made['device']}; {versions}; commit {made['commit'] or 'not known'}.",
        ]
    )
