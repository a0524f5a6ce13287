"""The compute-quality frontier, ``python -m train.paper frontier``: perplexity against speed at K = 1..n_loops.

Measures every complete run of a sweep; without one, trains five conditions at demo scale into runs/frontier. Writes
`<date>-<device>-frontier.json`, `.md` and `.png`, with a curve for each condition. Every loop is read as if it were the
last (frontier_perplexity.py). Speed is that of prefill at several batch sizes (frontier_speed.py).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from looped.command_line import command_line
from looped.model import LoopedLM
from looped.provenance import instructions, machine_slug, processor
from looped.run_directory import SavedRun, check_writable, load_run
from train.interrupt import Interruptions
from train.metrics import finite, write_record
from train.paper import sweep
from train.paper.conditions import BLIND, FINAL_ONLY, PAPER_PPL, PAPER_RATES, PENALISED, RAW, SEEDS, TERMINAL, Condition
from train.paper.figures import draw_frontier
from train.paper.frontier_page import markdown
from train.paper.frontier_perplexity import DRAWS, REFERENCE, Documents, document_sums, points
from train.paper.frontier_speed import DEVICE, architecture, competitors, rates_at, throughput, window_batch
from train.paper.options import check_options, split_words
from train.paper.runs import RunResult, read_runs
from train.report import environment

TRAINED = Path("runs/frontier")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class FrontierConfig:
    """Perplexity against speed at K = 1..n_loops. Without --runs, options after -- go to the sweep that trains them."""

    runs: Path | None = None
    """Directory of a sweep. None: one is trained."""
    conditions: tuple[Condition, ...] = (BLIND, RAW, FINAL_ONLY, PENALISED, TERMINAL)
    """Which conditions to show."""
    seeds: tuple[int, ...] = SEEDS
    """Which seeds are trained without --runs."""
    out: Path = Path("bench/results")
    """Directory of the record."""
    tokens: int = 131_072
    """Validation tokens that are predicted."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Sequences at a time, of the speed."""
    rounds: int = 7
    """Timed rounds of the speed."""


def run(words: Sequence[str], interruptions: Interruptions) -> int:
    """Measure what ``words`` ask for, after training it if it is not there. Returns the exit code: that of the sweep if
    training did not succeed. Raises ValueError or OSError if the input is bad."""
    frontier_words, extra = split_words(words)
    options = command_line(frontier_words, FrontierConfig(), "python -m train.paper frontier")
    check_options(options, positive=("tokens", "batches", "rounds"), distinct=("conditions", "seeds", "batches"))
    check_writable(options.out)  # before hours of training
    if options.runs is not None and extra:
        raise ValueError("options of the sweep can follow ' -- ' only without --runs.")
    if options.runs is None:
        chosen = ["--conditions", *options.conditions, "--seeds", *map(str, options.seeds)]
        code = sweep.run(["--out", str(TRAINED), *chosen, *extra], interruptions)
        if code != 0:
            return code
    torch.set_flush_denormal(True)
    record = finite(measure(options.runs or TRAINED, options))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{record['date']}-{machine_slug(record)}-frontier.json"
    write_record(path, record)
    draw_frontier(path.with_suffix(".png"), record)
    path.with_suffix(".md").write_text(markdown(record, path.stem), encoding="utf-8")
    print(f"written: {path.with_suffix('.md')}, the same as .json, and the figure as .png")
    return 0


def measure(directory: Path, options: FrontierConfig) -> dict[str, Any]:
    """The record that is written. Raises ValueError if ``directory`` has no complete run, a damaged one, or runs that
    do not compare."""
    runs = load_complete(directory, options.conditions)
    first_result, first = runs[0]
    trained, n_loops = first.config["train"], first.model.config.n_loops
    dtype = DTYPES[trained["dtype"]]
    measured: dict[str, dict[int, Documents]] = {}
    for result, run in tqdm(runs, desc="evaluating", unit="run", disable=None, leave=False):
        measured.setdefault(result.condition, {})[result.seed] = document_sums(run, options.tokens, dtype)
    architectures = {result.condition: architecture(run.model.config) for result, run in runs}
    models: dict[str, LoopedLM] = {}
    for result, run in runs:
        models.setdefault(architectures[result.condition], run.model.to(DEVICE))
    models |= competitors(first.model)
    rates = {
        str(batch): throughput(models, window_batch(first, batch), dtype, options.rounds)
        for batch in tqdm(options.batches, desc="timing", unit="batch size", disable=None, leave=False)
    }
    documents, origin = next(iter(measured[first_result.condition].values())), environment(DEVICE)
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor(),
        "instructions": DEVICE.type if DEVICE.type == "cuda" else instructions(),
        "threads": torch.get_num_threads(),
        "versions": origin["versions"],
        "commit": origin["commit"],
        "date": datetime.now(UTC).date().isoformat(),
        "settings": {
            "preset": trained["preset"],
            "text": trained["data"],
            "parameters": first_result.parameters,
            "seq_len": first.model.config.max_seq_len,
            "dtype": trained["dtype"],
            "tokens": int(documents.n_tokens.sum()),
            "documents": len(documents.n_tokens),
            "draws": DRAWS,
            "rounds": options.rounds,
            "reference": REFERENCE,
        },
        "runs": [
            {"condition": result.condition, "seed": result.seed, "steps": result.steps, "commit": result.commit}
            for result, _ in runs
        ],
        "without_runs": [name for name in options.conditions if name not in measured],
        "speeds": [
            {"model": name, "n_loops": loop + 1, "tokens_per_second": rates_at(rates, name, loop)}
            for name in models
            for loop in range(n_loops)
        ],
        "points": points(measured, rates, architectures),
        "paper": {"tokens_per_second": PAPER_RATES, "ppl": PAPER_PPL},
    }


def load_complete(directory: Path, conditions: Sequence[Condition]) -> list[tuple[RunResult, SavedRun]]:
    """Every complete run of a sweep, in the order of ``conditions``. Raises as `measure` does."""
    results = read_runs(directory, conditions)
    runs = [(result, load_run(run.directory)) for run, result in results.items() if result.status == "complete"]
    if not runs:
        raise ValueError(
            "runs must be a sweep with a complete run, DIR/<condition>/seed-<seed>/, of the conditions "
            f"{', '.join(conditions)}. {directory} has none."
        )
    for _, run in runs:
        check_comparable(runs[0][1], run)
    return runs


def check_comparable(first: SavedRun, run: SavedRun) -> None:
    """Raise ValueError if two runs differ in what decides speed or text, other than readout and recurrence."""
    there, here = (
        dataclasses.asdict(each.model.config)
        | {"dtype": each.config["train"]["dtype"], "readout": None, "inter_loop_norm": None}
        for each in (first, run)
    )
    for name in there:
        if there[name] != here[name]:
            raise ValueError(
                f"runs must have one {name}. Got {there[name]} in {first.directory} and {here[name]} in "
                f"{run.directory}."
            )
    if not all(
        torch.equal(getattr(first.validation, name), getattr(run.validation, name)) for name in ("tokens", "bounds")
    ):
        raise ValueError(f"runs must have one validation text. {first.directory} and {run.directory} differ in it.")
