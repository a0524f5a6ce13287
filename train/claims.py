"""Which claims of the paper a sweep reproduces: ``python -m train.claims --runs SWEEP``.

Diagnoses every complete run (once: the diagnosis stays with the run), has paper_claims.py judge every claim, and writes
one page, claims.md, with its figures, claims.json, and the diagnosis of one seed's runs side by side.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from looped.diagnose import Diagnosis, write_diagnosis
from looped.diagnose.diagnosis import DivergedError, check_run
from looped.run_directory import check_writable, load_run
from train.claim import Claim, Mark, Outcome, Untestable, judge
from train.claims_page import N_LOOPS, Sweep, markdown
from train.evidence import HORIZON, Evidence, kept_diagnosis, make_diagnosis
from train.metrics import write_json
from train.paper_claims import paper_claims
from train.report import environment
from train.run import command_line
from train.seed_tables import measurements
from train.sweep_plan import CONDITIONS, check_runs, sweep_command
from train.sweep_report import condition_colours, draw_exit_gap, find_runs, read_run, sweep_settings

Found = tuple[str, int, Path]  # condition, seed and directory of a run


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
    """Validation tokens to diagnose a run on: half of them calibrate halting, the other half report it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to diagnose."""
    jobs: int = 1
    """Runs to diagnose at a time, which share the CPU's threads, or the GPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, whatever the marks; 2 after one line on stderr if the input is bad."""
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        config = command_line(words, ClaimsConfig(), "python -m train.claims")
        check_options(config)
        sweep = collect(config, shlex.join(["python", "-m", "train.claims", *words]))
        marks = write_claims(sweep, config.out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for mark in get_args(Mark):
        print(f"{marks.count(mark):3} {mark}")
    print(f"page {config.out / 'claims.md'}")
    return 0


def check_options(config: ClaimsConfig) -> None:
    """Raises ValueError for an option that is out of its range, or a directory that cannot be written."""
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds must be at least one, and each only once. Got {' '.join(map(str, config.seeds))}.")
    if config.jobs < 1:
        raise ValueError(f"jobs must be at least 1. Got jobs={config.jobs}.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that PyTorch finds here. Got device=cuda.")
    check_writable(config.out)


def collect(config: ClaimsConfig, command: str = "") -> Sweep:
    """Read the runs of the seeds that are asked for, and diagnose what has not been diagnosed.

    Everything that can be wrong is looked for before the first diagnosis. Raises ValueError if there is no complete
    run, if one was not trained with 4 loops, if runs were trained with different settings, if tokens are too few, or
    if files are damaged. A run that has diverged is reported, and left out of what is judged.
    """
    found = [run for run in find_runs(config.runs, tuple(CONDITIONS)) if run[1] in config.seeds]
    results = {run: read_run(*run) for run in found}
    complete = [run for run in found if results[run].status == "complete"]
    if not complete:
        raise ValueError(f"runs must hold a complete run of the seeds. {config.runs} has none of {config.seeds}.")
    check_runs(config.runs)
    for run in complete:
        if len(results[run].evaluation) != N_LOOPS:
            raise ValueError(f"n_loops must be {N_LOOPS}, the paper's. {run[2]} has {len(results[run].evaluation)}.")
    seeds: dict[int, dict[str, Evidence]] = {}
    for run, diagnosis in _diagnoses(complete, config):
        if diagnosis is None:
            results[run] = replace(results[run], status="diverged")
        else:
            seeds.setdefault(run[1], {})[run[0]] = Evidence(results[run], replace(diagnosis, name=run[0]))
    if not seeds:
        raise ValueError(f"runs must hold a run that has not diverged. {config.runs} has none of {config.seeds}.")
    seeds = {seed: seeds[seed] for seed in config.seeds if seed in seeds}
    commands = [*sweep_command(config.runs), *([command] if command else [])]
    return Sweep(list(results.values()), sweep_settings(found), seeds, config.seeds, commands)


def _diagnoses(runs: Sequence[Found], config: ClaimsConfig) -> Iterator[tuple[Found, Diagnosis | None]]:
    """The diagnosis of every run, in their order, None if it has diverged."""
    made: dict[Found, Diagnosis | None] = {}
    waiting = []
    seq_len = load_run(runs[0][2]).model.config.max_seq_len
    for run in runs:
        kept = kept_diagnosis(run[2], config.tokens // seq_len * seq_len)
        made[run] = kept
        if kept is None:
            try:
                check_run(load_run(run[2]), name=_name(run), n_tokens=config.tokens, horizon=HORIZON)
                waiting.append(run)
            except DivergedError as error:
                print(f"left out: {error}", flush=True)
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    for run, diagnosis in zip(waiting, _diagnose_all(waiting, config, device), strict=True):
        made[run] = diagnosis
    return iter(made.items())


def _diagnose_all(runs: Sequence[Found], config: ClaimsConfig, device: str) -> Iterator[Diagnosis | None]:
    tasks = [(run, config.tokens, device) for run in runs]
    if config.jobs == 1 or len(runs) < 2:
        yield from (_diagnose(*task) for task in tasks)
        return
    threads = max(1, torch.get_num_threads() // config.jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    pool = ProcessPoolExecutor(config.jobs, get_context("spawn"), _begin_worker, (threads,))
    with pool:
        yield from pool.map(_diagnose, *zip(*tasks, strict=True))


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def _diagnose(run: Found, n_tokens: int, device: str) -> Diagnosis | None:
    print(f"diagnosing {_name(run)}", flush=True)
    try:
        return make_diagnosis(run[2], n_tokens, device)
    except DivergedError as error:  # on text that the check did not read
        print(f"left out: {error}", flush=True)
        return None


def _name(run: Found) -> str:
    return f"{run[0]} seed {run[1]}"


def write_claims(sweep: Sweep, out: Path) -> list[Mark]:
    """Write the page and all that it refers to into ``out``. Returns the marks of the claims."""
    claims = paper_claims(sweep.settings["preset"])
    outcomes = [judge(claim, sweep.seeds) for claim in claims]
    shown = max(sweep.seeds, key=lambda seed: (len(sweep.seeds[seed]), -sweep.asked.index(seed)))
    diagnoses = [evidence.diagnosis for evidence in sweep.seeds[shown].values()]
    write_diagnosis(diagnoses, out, condition_colours(CONDITIONS))
    finished = [result for result in sweep.results if result.status == "complete"]
    draw_exit_gap(out / "exit_gap.png", finished, tuple(CONDITIONS))
    made = environment(torch.device("cpu")) | {"date": datetime.now(UTC).date().isoformat()}
    write_json(
        out / "claims.json",
        {
            "settings": sweep.settings,
            "commands": sweep.commands,
            "made": made,
            "claims": [_record(claim, outcome, sweep.asked) for claim, outcome in zip(claims, outcomes, strict=True)],
            "measurements": measurements(sweep.seeds),
            "runs": [asdict(result) for result in sweep.results],
        },
    )
    judged = list(zip(claims, outcomes, strict=True))
    (out / "claims.md").write_text(markdown(sweep, judged, shown, made), encoding="utf-8")
    return [outcome.mark for outcome in outcomes]


def _record(claim: Claim | Untestable, outcome: Outcome, asked: Sequence[int]) -> dict[str, Any]:
    record: dict[str, Any] = {"title": claim.title, "paper": claim.paper, "mark": outcome.mark}
    if isinstance(claim, Untestable):
        return record | {"why": claim.why}
    record |= {
        "rule": claim.rule,
        "conditions": claim.conditions,
        "quantities": [quantity.label for quantity in claim.quantities],
        "values_by_seed": outcome.values,
        "seeds_that_hold": outcome.held,
        "seeds_missing": [seed for seed in asked if seed not in outcome.values],
    }
    if claim.alternative is not None:
        record["alternative"] = {"reading": claim.alternative.words, "seeds_that_hold": outcome.held_otherwise}
    return record


if __name__ == "__main__":
    sys.exit(main())
