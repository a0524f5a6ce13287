"""Which claims of the paper a sweep reproduces: ``python -m train.claims --runs SWEEP``.

Diagnoses every complete run (once: the diagnosis stays with the run), has paper_claims.py judge every claim, and writes
one page, claims.md, with its figures, claims.json, and the diagnosis of one seed's runs side by side.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch

from looped.diagnose import write_diagnosis
from looped.saved_run import load_run
from train.evidence import Evidence, kept_diagnosis, make_diagnosis
from train.metrics import write_json
from train.paper_claims import BASELINE_PPL, CLAIMS, SCALE_CONTROLLED, Claim, Mark, Outcome, Untestable, judge
from train.paper_scale import paper_scale
from train.report import environment
from train.run import command_line
from train.sweep import Condition
from train.sweep_report import (
    RunResult,
    condition_table,
    cost,
    depth_table,
    draw_exit_gap,
    find_runs,
    read_run,
    settings_line,
    spread,
    sweep_settings,
    table,
)

N_LOOPS = 4  # of every run, as in the paper
CONDITIONS: tuple[str, ...] = get_args(Condition)
DEPTHS = (4, 8, 16)
PAPER_DEPTHS = {"per-loop-rmsnorm": BASELINE_PPL} | {name: ppl for name, (_, ppl) in SCALE_CONTROLLED.items()}

Seeds = dict[int, dict[str, Evidence]]


@dataclass(frozen=True)
class ClaimsConfig:
    """Judge every claim of the paper by the runs of a sweep, and write one page."""

    runs: Path = Path("runs/sweep")
    """Directory of the sweep."""
    out: Path = Path("bench/results/paper-demo")
    """Directory of the page."""
    seeds: tuple[int, ...] = (42, 101, 202)
    """The seeds that the page is to be about; what is missing of them is said."""
    tokens: int = 4096
    """Validation tokens to diagnose a run on."""


@dataclass(frozen=True)
class Sweep:
    """results: of all runs, however far they got. seeds: the complete ones. asked: the seeds that should be there."""

    results: list[RunResult]
    settings: dict[str, Any]
    seeds: Seeds
    asked: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, whatever the marks; 2 after one line on stderr if the input is bad."""
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    try:
        config = command_line(sys.argv[1:] if argv is None else list(argv), ClaimsConfig(), "python -m train.claims")
        _check_writable(config.out)
        sweep = collect(config)
        marks = write_claims(sweep, config.out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for mark in get_args(Mark):
        print(f"{marks.count(mark):3} {mark}")
    print(f"page {config.out / 'claims.md'}")
    return 0


def _check_writable(out: Path) -> None:
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"out must be a directory that can be written. Got out={out} ({error.strerror}).") from error


def collect(config: ClaimsConfig) -> Sweep:
    """Read the runs of the seeds that are asked for, and diagnose what has not been diagnosed.

    Raises ValueError if there is no complete run, if one was not trained with 4 loops, or if files are damaged.
    """
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds must be at least one, and each only once. Got {' '.join(map(str, config.seeds))}.")
    found = [run for run in find_runs(config.runs, CONDITIONS) if run[1] in config.seeds]
    results = [read_run(*run) for run in found]
    complete = [(run, result) for run, result in zip(found, results, strict=True) if result.status == "complete"]
    if not complete:
        raise ValueError(f"runs must hold a complete run of the seeds. {config.runs} has none of {config.seeds}.")
    for (_, _, directory), result in complete:
        if len(result.evaluation) != N_LOOPS:
            raise ValueError(f"n_loops must be {N_LOOPS}, the paper's. {directory} has {len(result.evaluation)}.")
    shortest = load_run(complete[0][0][2]).model.config.max_seq_len
    if config.tokens < shortest:
        raise ValueError(f"tokens must be at least seq_len={shortest}. Got tokens={config.tokens}.")
    seeds: Seeds = {}
    for (condition, seed, directory), result in complete:
        diagnosis = kept_diagnosis(directory, config.tokens // shortest * shortest)
        if diagnosis is None:
            print(f"diagnosing {condition} seed {seed}", flush=True)
            diagnosis = make_diagnosis(directory, config.tokens)
        seeds.setdefault(seed, {})[condition] = Evidence(result, replace(diagnosis, name=condition))
    return Sweep(results, sweep_settings(found), seeds, config.seeds)


def write_claims(sweep: Sweep, out: Path) -> list[Mark]:
    """Write the page and all that it refers to into ``out``. Returns the marks of CLAIMS."""
    outcomes = [judge(claim, sweep.seeds) for claim in CLAIMS]
    shown = max(sweep.seeds, key=lambda seed: (len(sweep.seeds[seed]), -sweep.asked.index(seed)))
    write_diagnosis([evidence.diagnosis for evidence in sweep.seeds[shown].values()], out)
    draw_exit_gap(out / "exit_gap.png", [result for result in sweep.results if result.status == "complete"])
    made = environment(torch.device("cpu")) | {"date": datetime.now(UTC).date().isoformat()}
    write_json(
        out / "claims.json",
        {
            "settings": sweep.settings,
            "made": made,
            "claims": [_record(claim, outcome, sweep.asked) for claim, outcome in zip(CLAIMS, outcomes, strict=True)],
            "runs": [asdict(result) for result in sweep.results],
        },
    )
    (out / "claims.md").write_text(markdown(sweep, outcomes, shown, made), encoding="utf-8")
    return [outcome.mark for outcome in outcomes]


def _record(claim: Claim | Untestable, outcome: Outcome, asked: Sequence[int]) -> dict[str, Any]:
    record = {"title": claim.title, "paper": claim.paper, "mark": outcome.mark}
    if isinstance(claim, Untestable):
        return record | {"why": claim.why}
    return record | {
        "rule": claim.rule,
        "conditions": claim.conditions,
        "quantities": [quantity.label for quantity in claim.quantities],
        "values_by_seed": outcome.values,
        "seeds_that_hold": outcome.held,
        "seeds_missing": [seed for seed in asked if seed not in outcome.values],
    }


def markdown(sweep: Sweep, outcomes: Sequence[Outcome], shown: int, made: dict[str, Any]) -> str:
    """claims.md. shown: the seed whose diagnosis the figures are of. made: where and when the page was."""
    counts = {mark: sum(outcome.mark == mark for outcome in outcomes) for mark in get_args(Mark)}
    judged = list(zip(CLAIMS, outcomes, strict=True))
    overview = [
        [str(number), claim.title, outcome.mark, _seeds_held(claim, outcome, sweep.asked)]
        for number, (claim, outcome) in enumerate(judged, start=1)
    ]
    parts = [
        f"# The claims of the paper, at the scale of preset {sweep.settings['preset']}",
        "Every claim of Sharma & Vu, *Dense Supervision Is Not Enough* (arXiv 2606.24898), beside what a sweep of "
        "small runs gives. " + settings_line(sweep.results, sweep.settings),
        f"**{', '.join(f'{count} {mark}' for mark, count in counts.items() if count)}.** A claim is *reproduced* if "
        "its rule holds for every seed that has all the runs it needs, *not reproduced* if it fails for one of them, "
        "and *not measured* if there is no such seed. The program applies the rules; nobody marks by hand. Each rule "
        "and its thresholds stand with the claim.",
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
        "Cross-entropy of a diagnosis at, and beyond, the trained depth, nats; the paper gives no number:",
        _beyond_table(sweep.seeds),
        _figures(shown),
        _origin(sweep, made),
        paper_scale(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
            + f"\n- Figure: [{claim.figure}]({claim.figure}).",
            table(["quantity", "ours: mean over seeds (smallest to largest)"], rows),
        ]
    )


def _spread(values: Sequence[float], form: str) -> str:
    return spread({"mean": mean(values), "min": min(values), "max": max(values)} if values else None, form)


def _beyond_table(seeds: Seeds) -> str:
    rows = []
    for condition in CONDITIONS:
        depths = [runs[condition].measured.depth.ce for runs in seeds.values() if condition in runs]
        if depths:
            rows.append([f"`{condition}`", *(_spread([ce[k - 1] for ce in depths], "{:.3f}") for k in DEPTHS)])
    return table(["condition", *(f"K = {k}" for k in DEPTHS)], rows)


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
    ]
    shots = "\n\n".join(f"{title}:\n\n![{title}]({name})" for title, name in pictures)
    return (
        f"## Figures\n\nAll but the first are of seed {shown}; [index.html](index.html) has them with their tables and "
        f"a verdict on every model, [diagnosis.json](diagnosis.json) the numbers.\n\n{shots}"
    )


def _origin(sweep: Sweep, made: dict[str, Any]) -> str:
    tokens = sorted({evidence.diagnosis.n_tokens for runs in sweep.seeds.values() for evidence in runs.values()})
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    return "\n".join(
        [
            "## Cost and origin\n",
            cost(sweep.results),
            f"- Diagnosis: on {' or '.join(f'{count:,}' for count in tokens)} validation tokens of every run; "
            f"{made['device']}; {versions}; commit {made['commit'] or 'not known'}.",
            f"- Page made: {made['date']}, by `python -m train.claims`.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
