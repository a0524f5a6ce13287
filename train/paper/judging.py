"""Which claims of the paper a sweep reproduces: ``python -m train.paper claims --runs SWEEP``.

Diagnoses every complete run (once: the diagnosis stays with the run), judges every claim, and writes one page,
claims.md, with its figures, claims.json, and the diagnosis of one seed's runs side by side.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from looped.command_line import command_line
from looped.diagnose import Diagnosis, write_diagnosis
from looped.diagnose.diagnosis import DivergedError, check_run
from looped.diagnose.record import read_diagnosis_of_run
from looped.run_directory import check_writable, load_run
from train.metrics import finite
from train.paper.claim import Claim, Mark, Seed, Untestable, judge
from train.paper.claims import CLAIMS
from train.paper.claims_page import markdown
from train.paper.conditions import N_LOOPS, SEEDS
from train.paper.evidence import HORIZON, Evidence, make_diagnosis
from train.paper.exit_gap import COLOURS, draw_exit_gap
from train.paper.options import check_distinct, check_positive
from train.paper.plan import check_runs, sweep_command
from train.paper.record import write_record
from train.paper.runs import FoundRun, RunResult, complete_runs, find_runs, read_run, sweep_settings
from train.paper.seed_tables import measurements
from train.paper.tables import distinct
from train.report import environment

COMMAND = ["python", "-m", "train.paper", "claims"]


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
    """results: of all runs, however far they got. seeds: the complete ones. asked: the seeds that should be there.
    commands: those that made the runs, if known, and the page."""

    results: list[RunResult]
    settings: dict[str, Any]
    seeds: Mapping[int, Seed]
    asked: tuple[int, ...]
    commands: list[str] = field(default_factory=list)


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
    check_distinct(config, "seeds")
    check_positive(config, "jobs")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that PyTorch finds here. Got device=cuda.")
    check_writable(config.out)
    return config


def collect(config: ClaimsConfig, command: str) -> Sweep:
    """Read the runs of the seeds that are asked for, and diagnose what has not been diagnosed.

    Everything that can be wrong is looked for before the first diagnosis. Raises ValueError if there is no complete
    run, if one was not trained with 4 loops, if runs were trained with different settings, if tokens are too few, or
    if files are damaged. A run that has diverged is reported, and left out of what is judged.
    """
    results = {run: read_run(run) for run in find_runs(config.runs) if run.seed in config.seeds}
    complete = [run for run in results if results[run].status == "complete"]
    if not complete:
        raise ValueError(f"runs must hold a complete run of the seeds. {config.runs} has none of {config.seeds}.")
    check_runs(config.runs)
    for run in complete:
        if len(results[run].evaluation) != N_LOOPS:
            raise ValueError(
                f"n_loops must be {N_LOOPS}, the paper's. {run.directory} has {len(results[run].evaluation)}."
            )
    seeds: dict[int, dict[str, Evidence]] = {seed: {} for seed in config.seeds}
    for run, diagnosis in _diagnoses(complete, config).items():
        if diagnosis is None:
            results[run] = replace(results[run], status="diverged")
        else:
            seeds[run.seed][run.condition] = Evidence(results[run], replace(diagnosis, name=run.condition))
    judged = {seed: runs for seed, runs in seeds.items() if runs}
    if not judged:
        raise ValueError(f"runs must hold a run that has not diverged. {config.runs} has none of {config.seeds}.")
    commands = [*sweep_command(config.runs), command]
    return Sweep(list(results.values()), sweep_settings(list(results)), judged, config.seeds, commands)


def _diagnoses(runs: Sequence[FoundRun], config: ClaimsConfig) -> dict[FoundRun, Diagnosis | None]:
    """The diagnosis of every run, in their order, None if it has diverged."""
    seq_len = load_run(runs[0].directory).model.config.max_seq_len
    n_tokens = config.tokens // seq_len * seq_len
    diagnoses = {run: read_diagnosis_of_run(run.directory, n_tokens=n_tokens, horizon=HORIZON) for run in runs}
    waiting = []
    for run in (run for run, kept in diagnoses.items() if kept is None):
        try:
            check_run(load_run(run.directory), name=str(run), n_tokens=config.tokens, horizon=HORIZON)
            waiting.append(run)
        except DivergedError as error:
            print(f"left out: {error}", flush=True)
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    return diagnoses | dict(zip(waiting, _diagnose_all(waiting, config, device), strict=True))


def _diagnose_all(runs: Sequence[FoundRun], config: ClaimsConfig, device: str) -> Iterator[Diagnosis | None]:
    tasks = [(run, config.tokens, device) for run in runs]
    if config.jobs == 1 or len(runs) < 2:
        yield from (_diagnose(*task) for task in tasks)
        return
    threads = max(1, torch.get_num_threads() // config.jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with ProcessPoolExecutor(config.jobs, get_context("spawn"), _begin, (threads,)) as pool:
        yield from pool.map(_diagnose, *zip(*tasks, strict=True))


def _begin(threads: int) -> None:
    """What every process that diagnoses does first."""
    torch.set_num_threads(threads)
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)


def _diagnose(run: FoundRun, n_tokens: int, device: str) -> Diagnosis | None:
    print(f"diagnosing {run}", flush=True)
    try:
        return make_diagnosis(run.directory, n_tokens, device)
    except DivergedError as error:  # on text that the check did not read
        print(f"left out: {error}", flush=True)
        return None


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
            "claims": [_judged(claim, sweep) for claim in CLAIMS],
            "measurements": measurements(sweep.seeds),
            "runs": [asdict(result) for result in sweep.results],
        }
    )


def _judged(claim: Claim | Untestable, sweep: Sweep) -> dict[str, Any]:
    if isinstance(claim, Claim):
        return judge(claim, sweep.seeds)
    why = claim.why.format(preset=sweep.settings["preset"])
    return {"title": claim.title, "paper": claim.paper, "mark": "not testable at this scale", "why": why}
