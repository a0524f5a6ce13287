"""Which claims of the paper a sweep reproduces: ``python -m train.paper claims --runs SWEEP``.

Diagnoses every complete run (once: the diagnosis stays with the run), judges every claim, and writes one page,
claims.md, with its figures, claims.json, and the diagnosis of one seed's runs side by side.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from looped.command_line import command_line, device_named
from looped.diagnose import Diagnosis, diagnose_run, write_diagnosis
from looped.diagnose.diagnosis import DivergedError, check_run
from looped.diagnose.record import read_diagnosis_of_run, record_of_run
from looped.diagnose.record import write_record as write_diagnosis_record
from looped.run_directory import check_writable, load_run
from train.metrics import finite, write_record
from train.paper.claim import Evidence, Mark, Seed, judge
from train.paper.claims import CLAIMS
from train.paper.claims_page import markdown
from train.paper.conditions import N_LOOPS, SEEDS
from train.paper.figures import COLOURS, draw_exit_gap
from train.paper.options import check_options
from train.paper.plan import sweep_command
from train.paper.runs import Run, RunResult, check_alike, complete_runs, read_runs, sweep_settings
from train.paper.seed_tables import measurements
from train.paper.tables import distinct
from train.report import environment

COMMAND = ["python", "-m", "train.paper", "claims"]
HORIZON = 30  # loops over which the paper follows the state


@dataclass(frozen=True)
class ClaimsConfig:
    """Judge every claim of the paper by the runs of a sweep, and write one page."""

    runs: Path = Path("runs/sweep")
    """Directory of the sweep."""
    out: Path = Path("bench/results/paper-demo")
    """Directory of the page."""
    seeds: tuple[int, ...] = SEEDS
    """The seeds that the page is to be about; what is missing of them is said."""
    tokens: int = 4096
    """Validation tokens to diagnose a run on: half of them calibrate halting, the other half report it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to diagnose."""
    jobs: int = 1
    """Runs to diagnose at a time, which share the CPU's threads, or the GPU."""


@dataclass(frozen=True)
class Sweep:
    """results: of all runs, however far they got. seeds: the complete runs, by seed and condition. asked: the seeds
    that should be there. commands: those that made the runs, if they are known, and the one that makes the page."""

    results: list[RunResult]
    settings: dict[str, Any]
    seeds: Mapping[int, Seed]
    asked: tuple[int, ...]
    commands: list[str]


def run(words: Sequence[str]) -> int:
    """Judge the runs that ``words`` name. Returns the exit code: 0, whatever the marks. Raises ValueError or OSError
    if the input is bad."""
    _begin(torch.get_num_threads())
    config = parse(words)
    marks = write_claims(collect(config, shlex.join([*COMMAND, *words])), config.out)
    for mark in get_args(Mark):
        print(f"{marks.count(mark):3} {mark}")
    print(f"page {config.out / 'claims.md'}")
    return 0


def parse(words: Sequence[str]) -> ClaimsConfig:
    """Raises ValueError for an option that is out of its range, or a directory that cannot be written."""
    config = command_line(list(words), ClaimsConfig(), " ".join(COMMAND))
    check_options(config, distinct=("seeds",), positive=("jobs",))
    device_named(config.device)  # raises
    check_writable(config.out)
    return config


def collect(config: ClaimsConfig, command: str) -> Sweep:
    """Read the runs of the seeds that are asked for, and diagnose what has not been diagnosed.

    Everything that can be wrong is looked for before the first diagnosis. Raises ValueError if there is no complete
    run, if one was not trained with 4 loops, if runs were trained with different settings, if tokens are too few, or
    if files are damaged. A run that has diverged is reported, and left out of what is judged.
    """
    results = {run: result for run, result in read_runs(config.runs).items() if run.seed in config.seeds}
    complete = [run for run in results if results[run].status == "complete"]
    if not complete:
        raise ValueError(f"runs must hold a complete run of the seeds. {config.runs} has none of {config.seeds}.")
    check_alike(config.runs)
    for run in complete:
        if len(results[run].evaluation) != N_LOOPS:
            raise ValueError(
                f"n_loops must be {N_LOOPS}, the paper's. {run.directory} has {len(results[run].evaluation)}."
            )
    seeds: dict[int, dict[str, Evidence]] = {}
    for run, diagnosis in _diagnoses(complete, config).items():
        if diagnosis is None:
            results[run] = replace(results[run], status="diverged")
        else:
            evidence = Evidence(results[run], replace(diagnosis, name=run.condition))
            seeds.setdefault(run.seed, {})[run.condition] = evidence
    if not seeds:
        raise ValueError(f"runs must hold a run that has not diverged. {config.runs} has none of {config.seeds}.")
    commands = [*sweep_command(config.runs), command]
    seeds = {seed: seeds[seed] for seed in config.seeds if seed in seeds}
    return Sweep(list(results.values()), sweep_settings(config.runs), seeds, config.seeds, commands)


def _diagnoses(runs: Sequence[Run], config: ClaimsConfig) -> dict[Run, Diagnosis | None]:
    """The diagnosis of every run, in their order, None if it has diverged."""
    seq_len = load_run(runs[0].directory).model.config.max_seq_len
    n_tokens = config.tokens // seq_len * seq_len
    diagnoses = {run: read_diagnosis_of_run(run.directory, n_tokens=n_tokens, horizon=HORIZON) for run in runs}
    waiting = []
    for run in (run for run, diagnosis in diagnoses.items() if diagnosis is None):
        try:
            check_run(load_run(run.directory), name=str(run), n_tokens=config.tokens, horizon=HORIZON)
            waiting.append(run)
        except DivergedError as error:
            print(f"left out: {error}", flush=True)
    diagnose = partial(_diagnose, n_tokens=config.tokens, device=device_named(config.device))
    if config.jobs == 1 or len(waiting) < 2:
        return diagnoses | {run: diagnose(run) for run in waiting}
    threads = max(1, torch.get_num_threads() // config.jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with ProcessPoolExecutor(config.jobs, get_context("spawn"), _begin, (threads,)) as pool:
        return diagnoses | dict(zip(waiting, pool.map(diagnose, waiting), strict=True))


def _begin(threads: int) -> None:
    """What every process that diagnoses does first."""
    torch.set_num_threads(threads)
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)


def _diagnose(run: Run, n_tokens: int, device: str) -> Diagnosis | None:
    """Diagnose a run and keep the record with it."""
    print(f"diagnosing {run}", flush=True)
    try:
        diagnosis = diagnose_run(load_run(run.directory), n_tokens=n_tokens, horizon=HORIZON, device=device)
    except DivergedError as error:  # on text that the check did not read
        print(f"left out: {error}", flush=True)
        return None
    write_diagnosis_record([diagnosis], record_of_run(run.directory))
    return diagnosis


def write_claims(sweep: Sweep, out: Path) -> list[Mark]:
    """Write the page and all that it refers to into ``out``. Returns the marks of the claims."""
    record = record_of(sweep)
    shown = sweep.seeds[record["diagnosed"]["shown"]]
    write_diagnosis([evidence.diagnosis for evidence in shown.values()], out, COLOURS)
    draw_exit_gap(out / "exit_gap.png", complete_runs(sweep.results))
    write_record(out / "claims.json", record)
    (out / "claims.md").write_text(markdown(record), encoding="utf-8")
    return [judged["mark"] for judged in record["claims"]]


def record_of(sweep: Sweep) -> dict[str, Any]:
    """claims.json: every claim as judged, and every number of the page."""
    diagnoses = [evidence.diagnosis for runs in sweep.seeds.values() for evidence in runs.values()]
    return finite(
        {
            "settings": sweep.settings,
            "seeds": sweep.asked,
            "commands": sweep.commands,
            "made": environment(torch.device("cpu")) | {"date": datetime.now(UTC).date().isoformat()},
            "diagnosed": {
                "tokens": sorted({diagnosis.n_tokens for diagnosis in diagnoses}),
                "device": distinct(diagnosis.origin.get("device") for diagnosis in diagnoses),
                "commit": distinct(diagnosis.origin.get("commit") for diagnosis in diagnoses),
                "shown": max(sweep.seeds, key=lambda seed: (len(sweep.seeds[seed]), -sweep.asked.index(seed))),
            },
            "claims": [judge(claim, sweep.seeds, sweep.settings["preset"]) for claim in CLAIMS],
            "measurements": measurements(sweep.seeds),
            "runs": [asdict(result) for result in sweep.results],
        }
    )
