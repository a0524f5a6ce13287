"""The compute-quality frontier: validation perplexity against speed at K = 1..n_loops, a curve for each condition.

    python -m train.paper frontier --runs DIR [--conditions ...] [--out bench/results] [--tokens N] [--batches 1 4 16]
    python -m train.paper frontier [--seeds 42 101 202] [...] [-- options of the sweep]

DIR is a sweep, of which every complete run counts. Without it five conditions are trained at demo scale into
runs/frontier, or found there. Writes `<date>-<device>-frontier.json`, `.md` and `.png`.

Perplexity and bits per byte: windows spread over the validation split, every loop read as if it were the last. Each
token's loss belongs to the document in which the predicted token lies. A value is the mean over seeds. Its 95% interval
is a percentile bootstrap of that mean: documents are drawn with replacement, the same draws for all runs, and within a
draw the seeds are averaged. It covers the text, and not what another seed would give. Speed: prefill at several batch
sizes (frontier_speed.py). The figure is after the paper's Figure 4.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from looped.command_line import command_line
from looped.model import LoopedLM
from looped.provenance import instructions, processor
from looped.run_directory import SavedRun, load_run
from train.batches import Windows, evaluation_windows
from train.interrupt import Interruptions
from train.metrics import finite
from train.paper import sweep
from train.paper.conditions import BLIND, FINAL_ONLY, PAPER_PPL, PAPER_RATES, PENALISED, RAW, SEEDS, TERMINAL, Condition
from train.paper.frontier_estimates import DRAWS, REFERENCE, Documents, points
from train.paper.frontier_figure import draw
from train.paper.frontier_page import markdown
from train.paper.frontier_speed import DEVICE, architecture, competitors, throughput
from train.paper.options import check_distinct, check_positive, split_words
from train.paper.record import write_record
from train.paper.runs import RunResult, find_runs, read_run
from train.report import environment
from train.step import autocast

TRAINED = Path("runs/frontier")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EVALUATION_BATCH = 16


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
    own, extra = split_words(words)
    options = command_line(own, FrontierConfig(), "python -m train.paper frontier")
    check_positive(options, "tokens", "batches", "rounds")
    check_distinct(options, "conditions", "seeds", "batches")
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
    machine = f"{record['device']} {record['instructions']} {record['threads']} threads".lower()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", machine)).strip("-")
    path = options.out / f"{record['date']}-{slug}-frontier.json"
    write_record(path, record)
    draw(path.with_suffix(".png"), record)
    path.with_suffix(".md").write_text(markdown(record, path.stem), encoding="utf-8")
    print(f"written: {path.with_suffix('.md')}, the same as .json, and the figure as .png")
    return 0


def measure(directory: Path, options: FrontierConfig) -> dict[str, Any]:
    """The record that is written. Raises ValueError if ``directory`` has no complete run, a damaged one, or runs that
    do not compare."""
    results, runs = load_complete(directory, options.conditions)
    names = list(dict.fromkeys(result.condition for result in results))
    first = runs[0]
    dtype = DTYPES[first.config["train"]["dtype"]]
    measured: dict[str, dict[int, Documents]] = {name: {} for name in names}
    for result, run in zip(tqdm(results, desc="evaluating", unit="run", disable=None, leave=False), runs, strict=True):
        measured[result.condition][result.seed] = document_sums(run, options.tokens, dtype)
    models, architectures = timed_models(results, runs)
    rates = {
        str(batch): throughput(models, window_batch(first, batch), dtype, options.rounds)
        for batch in tqdm(options.batches, desc="timing", unit="batch size", disable=None, leave=False)
    }
    documents = next(iter(measured[names[0]].values()))
    return {
        **_machine(),
        "settings": {
            "preset": first.config["train"]["preset"],
            "text": first.config["train"]["data"],
            "parameters": results[0].parameters,
            "seq_len": first.model.config.max_seq_len,
            "dtype": first.config["train"]["dtype"],
            "tokens": int(documents.n_tokens.sum()),
            "documents": len(documents.n_tokens),
            "draws": DRAWS,
            "rounds": options.rounds,
            "reference": REFERENCE,
        },
        "runs": [
            {"condition": result.condition, "seed": result.seed, "steps": result.steps, "commit": result.commit}
            for result in results
        ],
        "without_runs": [name for name in options.conditions if name not in names],
        "speeds": [
            {"model": name, "n_loops": loop + 1}
            | {"tokens_per_second": {batch: of[name][loop]._asdict() for batch, of in rates.items()}}
            for name in models
            for loop in range(first.model.config.n_loops)
        ],
        "points": points(measured, rates, architectures),
        "paper": {"tokens_per_second": PAPER_RATES, "ppl": PAPER_PPL},
    }


def _machine() -> dict[str, Any]:
    """Where and when this is measured."""
    found = environment(DEVICE)
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor(),
        "instructions": DEVICE.type if DEVICE.type == "cuda" else instructions(),
        "threads": torch.get_num_threads(),
        "versions": found["versions"],
        "commit": found["commit"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def timed_models(results: Sequence[RunResult], runs: Sequence[SavedRun]) -> tuple[dict[str, LoopedLM], dict[str, str]]:
    """A model of each architecture, with competitors of the first one; and the architecture of each condition."""
    architectures = {
        result.condition: architecture(run.model.config) for result, run in zip(results, runs, strict=True)
    }
    models: dict[str, LoopedLM] = {}
    for run in runs:
        models.setdefault(architecture(run.model.config), run.model.to(DEVICE))
    return models | competitors(next(iter(models.values()))), architectures


def load_complete(directory: Path, conditions: Sequence[Condition]) -> tuple[list[RunResult], list[SavedRun]]:
    """Every complete run of a sweep, in the order of ``conditions``. Raises as `measure` does."""
    results, runs = [], []
    for found in find_runs(directory, conditions):
        result = read_run(found)
        if result.status == "complete":
            results.append(result)
            runs.append(load_run(found.directory))
            check_comparable(runs[0], runs[-1])
    if not runs:
        raise ValueError(
            "runs must be a sweep with a complete run, DIR/<condition>/seed-<seed>/, of the conditions "
            f"{', '.join(conditions)}. {directory} has none."
        )
    return results, runs


def check_comparable(first: SavedRun, run: SavedRun) -> None:
    """Raise ValueError if two runs differ in what decides speed or text, other than readout and recurrence."""
    shapes = [dataclasses.replace(each.model.config, readout="raw", inter_loop_norm=False) for each in (first, run)]
    for field in dataclasses.fields(shapes[0]):
        there, here = (getattr(shape, field.name) for shape in shapes)
        if there != here:
            raise ValueError(
                f"runs must have one {field.name}. Got {there} in {first.directory} and {here} in {run.directory}."
            )
    there, here = (each.config["train"]["dtype"] for each in (first, run))
    if there != here:
        raise ValueError(f"runs must have one dtype. Got {there} in {first.directory} and {here} in {run.directory}.")
    if not all(
        torch.equal(getattr(first.validation, name), getattr(run.validation, name)) for name in ("tokens", "bounds")
    ):
        raise ValueError(f"runs must have one validation text. {first.directory} and {run.directory} differ in it.")


def windows_of(run: SavedRun) -> Windows:
    """The validation text in windows of the model's length."""
    seq_len = run.model.config.max_seq_len
    windows = Windows(run.validation.tokens.numpy(), seq_len, seq_len)
    if len(windows) == 0:
        raise ValueError(
            f"the validation text must hold a window of seq_len + 1 = {seq_len + 1} tokens. "
            f"Got {len(windows.tokens)} in {run.directory}."
        )
    return windows


@torch.no_grad()
def document_sums(run: SavedRun, n_tokens: int, dtype: torch.dtype) -> Documents:
    """Losses of about ``n_tokens`` targets at K = 1..n_loops by document; documents without a target are left out.

    With at least as many tokens as the validation text has, every one but the first is a target once.
    """
    validation = run.validation
    windows, indices = evaluation_windows(validation.tokens.numpy(), windows_of(run).seq_len, n_tokens)
    model = run.model.to(DEVICE)
    losses, targets = [], []
    for start in range(0, len(indices), EVALUATION_BATCH):
        batch_inputs, batch_targets = windows.gather(indices[start : start + EVALUATION_BATCH])
        with autocast(DEVICE, dtype):
            loss = model.evaluation_losses(model(batch_inputs.to(DEVICE)).states, batch_targets.to(DEVICE))
        losses.append(loss.flatten(1).cpu())
        targets.append(batch_targets.flatten())
    model.cpu()
    positions = (indices[:, None] * windows.stride + 1 + np.arange(windows.seq_len)).ravel()  # of the targets
    inside = positions < len(windows.tokens)  # the last window may be filled up
    positions = positions[inside]
    document = np.searchsorted(validation.bounds.numpy(), positions, side="right") - 1

    def summed(values: np.ndarray | None) -> np.ndarray:
        return np.bincount(document, weights=values, minlength=len(validation.bounds) - 1).astype(np.float64)

    counted = summed(None)
    seen = counted > 0
    sizes = validation.bytes_per_token
    return Documents(
        np.stack([summed(loss[inside])[seen] for loss in torch.cat(losses, 1).double().numpy()]),
        counted[seen],
        None if sizes is None else summed(sizes[torch.cat(targets)[torch.from_numpy(inside)]].numpy())[seen],
    )


def window_batch(run: SavedRun, batch: int) -> Tensor:
    """[batch, T] inputs from the validation split, over again where it is short."""
    windows = windows_of(run)
    return windows.gather(np.arange(batch) % len(windows))[0].to(DEVICE)
