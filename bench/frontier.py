"""The compute-quality frontier: validation perplexity against speed at K = 1..n_loops, a curve for each condition.

    python -m bench.frontier --runs DIR [--conditions ...] [--out bench/results] [--tokens N] [--batches 1 4 16]
    python -m bench.frontier [--seeds 42 101 202] [...] [-- options of train/sweep.py]

DIR is a sweep of train/sweep.py, of which every complete run counts.  Without it five conditions are trained at demo
scale into runs/frontier, or found there.  Writes `<date>-<device>-frontier.json`, `.md` and `.png`.

Perplexity and bits per byte: windows spread over the validation split, every loop read as if it were the last; each
token's loss belongs to the document in which the predicted token lies.  A value is the mean over seeds.  Its 95%
interval is a percentile bootstrap of that mean: documents are drawn with replacement, the same draws for all runs, and
within a draw the seeds are averaged; it covers the text, and not what another seed would give.  Speed: prefill at
several batch sizes (bench/frontier_speed.py).  The figure is after Sharma & Vu (arXiv 2606.24898), Figure 4.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.frontier_figure import PAPER_PPL, PAPER_RATES, draw, markdown
from bench.frontier_speed import Rate, architecture, competitors, throughput
from bench.records import RESULTS, environment, slug
from bench.shapes import DEVICE, DTYPES
from looped.decoder import LoopedDecoder
from looped.run_directory import SavedRun, load_run
from looped.supervision import evaluation_losses
from train import sweep
from train.batches import Windows, spread
from train.metrics import finite, write_json
from train.step import autocast
from train.sweep_report import RunResult, find_runs, read_run

CONDITIONS: tuple[sweep.Condition, ...] = (
    "per-loop-rmsnorm", "per-loop-raw", "per-loop-final-only", "per-loop-rmsnorm-penalty", "terminal-rmsnorm",
)  # fmt: skip
REFERENCE = "per-loop-rmsnorm"  # whose perplexity is subtracted from that of the others
TRAINED = Path("runs/frontier")
SEEDS = (42, 101, 202)
TOKENS = 131_072  # as in the demo's own evaluation
BATCHES = (1, 4, 16)
ROUNDS = 7
DRAWS = 1000
EVALUATION_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Documents:
    """Sums over the predicted tokens of each of D documents: losses [K, D] in nats, n_tokens [D], and n_bytes [D],
    None where bits per byte are not defined. float64."""

    losses: np.ndarray
    n_tokens: np.ndarray
    n_bytes: np.ndarray | None


class Estimate(NamedTuple):
    """mean: over seeds. low, high: the 95% interval, nan with fewer than two documents."""

    mean: float
    low: float
    high: float
    by_seed: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's). Returns the exit code: 2 after one line on stderr if the
    input is bad, that of train/sweep.py if training did not succeed."""
    words = sys.argv[1:] if argv is None else list(argv)
    own, extra = (words, []) if "--" not in words else (words[: words.index("--")], words[words.index("--") + 1 :])
    options = _parse(own)
    if options.runs is not None and extra:
        return _fail("options of train/sweep.py can follow ' -- ' only without --runs.")
    if options.runs is None:
        seeds = map(str, options.seeds)
        code = sweep.main(["--out", str(TRAINED), "--conditions", *options.conditions, "--seeds", *seeds, *extra])
        if code != 0:
            return code
    torch.set_flush_denormal(True)
    try:
        record = finite(measure(options.runs or TRAINED, options))
    except ValueError as error:
        return _fail(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{record['date']}-{slug(record)}-frontier.json"
    write_json(path, record)
    draw(path.with_suffix(".png"), record)
    path.with_suffix(".md").write_text(markdown(record, path.stem), encoding="utf-8")
    print(f"written: {path.with_suffix('.md')}, the same as .json, and the figure as .png")
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="a sweep of train/sweep.py; without it one is trained")
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, choices=get_args(sweep.Condition))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="that are trained without --runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="validation tokens that are predicted")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="sequences at a time, of the speed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds of the speed")
    options = parser.parse_args(words)
    for name in ("tokens", "batches", "rounds"):
        value = getattr(options, name)
        if np.min(value) < 1:
            parser.error(f"--{name} must be at least 1. Got {value}.")
    for name in ("conditions", "seeds", "batches"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name} must be given only once each. Got {' '.join(map(str, values))}.")
    return options


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
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
        **environment(),
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


def timed_models(
    results: Sequence[RunResult], runs: Sequence[SavedRun]
) -> tuple[dict[str, LoopedDecoder], dict[str, str]]:
    """A model of each architecture, with competitors of the first one; and the architecture of each condition."""
    architectures = {
        result.condition: architecture(run.model.config) for result, run in zip(results, runs, strict=True)
    }
    models: dict[str, LoopedDecoder] = {}
    for run in runs:
        models.setdefault(architecture(run.model.config), run.model.to(DEVICE))
    return models | competitors(next(iter(models.values()))), architectures


def load_complete(directory: Path, conditions: Sequence[str]) -> tuple[list[RunResult], list[SavedRun]]:
    """Every complete run of a sweep, in the order of ``conditions``. Raises as `measure` does."""
    results, runs = [], []
    for condition, seed, path in find_runs(directory, conditions):
        result = read_run(condition, seed, path)
        if result.status == "complete":
            results.append(result)
            runs.append(load_run(path))
            check_comparable(runs[0], runs[-1])
    if not runs:
        raise ValueError(
            "--runs must be a sweep with a complete run, DIR/<condition>/seed-<seed>/, of the conditions "
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
    """Windows in which every validation token but the first, and what is left over at the end, is a target once."""
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
    """Losses of about ``n_tokens`` targets at K = 1..n_loops by document; documents without a target are left out."""
    windows, validation = windows_of(run), run.validation
    indices = spread(len(windows), max(1, n_tokens // windows.seq_len))
    model = run.model.to(DEVICE)
    losses, targets = [], []
    for start in range(0, len(indices), EVALUATION_BATCH):
        batch_inputs, batch_targets = windows.gather(indices[start : start + EVALUATION_BATCH])
        with autocast(DEVICE, dtype):
            loss = evaluation_losses(model, model(batch_inputs.to(DEVICE)), batch_targets.to(DEVICE))
        losses.append(loss.flatten(1).cpu())
        targets.append(batch_targets.flatten())
    model.cpu()
    positions = (indices[:, None] * windows.stride + 1 + np.arange(windows.seq_len)).ravel()  # of the targets
    document = np.searchsorted(validation.bounds.numpy(), positions, side="right") - 1

    def summed(values: np.ndarray | None) -> np.ndarray:
        return np.bincount(document, weights=values, minlength=len(validation.bounds) - 1).astype(np.float64)

    counted = summed(None)
    seen = counted > 0
    sizes = validation.bytes_per_token
    return Documents(
        np.stack([summed(loss)[seen] for loss in torch.cat(losses, 1).double().numpy()]),
        counted[seen],
        None if sizes is None else summed(sizes[torch.cat(targets)].numpy())[seen],
    )


def resample(n_documents: int, draws: int, seed: int = 0) -> np.ndarray:
    """[1 + draws, D] float64: how often each draw has each document. The first row is the sample itself."""
    drawn = np.random.default_rng(seed).multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=draws)
    return np.concatenate([np.ones((1, n_documents)), drawn])


def perplexity(documents: Documents, counts: np.ndarray) -> np.ndarray:
    """exp of the mean loss of a token, [draws, K], of the draws ``counts`` [draws, D]."""
    with np.errstate(over="ignore"):
        return np.exp(counts @ documents.losses.T / (counts @ documents.n_tokens)[:, None])


def bits_per_byte(documents: Documents, counts: np.ndarray) -> np.ndarray:
    """All bits over all bytes, [draws, K]: end-of-document tokens are charged to the text."""
    assert documents.n_bytes is not None
    return counts @ documents.losses.T / math.log(2) / (counts @ documents.n_bytes)[:, None]


def estimates(samples: Sequence[np.ndarray], n_documents: int) -> list[Estimate]:
    """An estimate for each K from a sample [1 + draws, K] for each seed, whose first row is the value itself."""
    values = np.stack([sample[0] for sample in samples])  # [seeds, K]
    ends = np.quantile(np.mean(samples, axis=0)[1:], (0.025, 0.975), axis=0)
    if n_documents < 2:
        ends = np.full_like(ends, np.nan)
    return [
        Estimate(float(seeds.mean()), float(low), float(high), seeds.tolist())
        for seeds, low, high in zip(values.T, *ends, strict=True)
    ]


def points(
    measured: dict[str, dict[int, Documents]],
    rates: dict[str, dict[str, list[Rate]]],
    architectures: dict[str, str],
) -> list[dict[str, Any]]:
    """A point for each condition and K, from the sums by condition and seed, the rates by batch size and architecture.

    ``ppl_difference``: from the reference's perplexity at the same K, paired by seed and by draw; None without one.
    """
    n_documents = len(next(iter(next(iter(measured.values())).values())).n_tokens)
    counts = resample(n_documents, DRAWS)

    def sampled(quantity: Callable[[Documents, np.ndarray], np.ndarray], name: str) -> dict[int, np.ndarray]:
        return {seed: quantity(documents, counts) for seed, documents in measured.get(name, {}).items()}

    reference = sampled(perplexity, REFERENCE)
    found = []
    for name, seeds in measured.items():
        own = sampled(perplexity, name)
        paired = [own[seed] - reference[seed] for seed in own if seed in reference and name != REFERENCE]
        lossless = all(documents.n_bytes is not None for documents in seeds.values())
        columns = {
            "ppl": list(own.values()),
            "ppl_difference": paired,
            "bits_per_byte": list(sampled(bits_per_byte, name).values()) if lossless else [],
        }
        estimated = {key: estimates(samples, n_documents) for key, samples in columns.items() if samples}
        for loop in range(len(estimated["ppl"])):
            found.append(
                {"condition": name, "n_loops": loop + 1, "seeds": list(seeds)}
                | {key: estimated[key][loop]._asdict() if key in estimated else None for key in columns}
                | {"tokens_per_second": {batch: of[architectures[name]][loop]._asdict() for batch, of in rates.items()}}
            )
    return found


def window_batch(run: SavedRun, batch: int) -> Tensor:
    """[batch, T] inputs from the validation split, over again where it is short."""
    windows = windows_of(run)
    return windows.gather(np.arange(batch) % len(windows))[0].to(DEVICE)


if __name__ == "__main__":
    sys.exit(main())
