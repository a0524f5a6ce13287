"""Perplexities of conditions with their intervals.

A value is the mean over seeds. Its 95% interval is a percentile bootstrap of that mean: documents are drawn with
replacement, the same draws for all runs, and within a draw the seeds are averaged. It covers the text, and not what
another seed would give. Each token's loss belongs to the document in which the predicted token lies.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from looped.run_directory import SavedRun
from train.paper.conditions import BLIND
from train.paper.frontier_speed import DEVICE, Rate, rates_at
from train.step import autocast
from train.text.batches import evaluation_windows

BATCH = 16
DRAWS = 1000
REFERENCE = BLIND  # whose perplexity is subtracted from that of the others


@dataclass(frozen=True)
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


@torch.no_grad()
def document_sums(run: SavedRun, n_tokens: int, dtype: torch.dtype) -> Documents:
    """Losses of about ``n_tokens`` targets at K = 1..n_loops by document; documents without a target are left out.

    Where ``n_tokens`` is at least the length of the validation text, each of its tokens but the first is a target once.
    Raises ValueError for a text without a window.
    """
    validation, seq_len = run.validation, run.model.config.max_seq_len
    windows, indices = evaluation_windows(validation.tokens.numpy(), seq_len, n_tokens)
    if len(windows) == 0:
        raise ValueError(
            f"the validation text must hold a window of seq_len + 1 = {seq_len + 1} tokens. "
            f"Got {len(windows.tokens)} in {run.directory}."
        )
    model = run.model.to(DEVICE)
    losses, targets = [], []
    for start in range(0, len(indices), BATCH):
        batch_inputs, batch_targets = windows.gather(indices[start : start + BATCH])
        with autocast(DEVICE, dtype):
            loss = model.evaluation_losses(model(batch_inputs.to(DEVICE)).states, batch_targets.to(DEVICE))
        losses.append(loss.flatten(1).cpu())
        targets.append(batch_targets.flatten())
    model.cpu()
    positions = (indices[:, None] * windows.stride + 1 + np.arange(seq_len)).ravel()  # of the targets
    inside = positions < len(windows.tokens)  # the last window may be filled up
    document = np.searchsorted(validation.bounds.numpy(), positions[inside], side="right") - 1

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


def resample(n_documents: int, draws: int) -> np.ndarray:
    """[1 + draws, D] float64: how often each draw has each document. The first row is the sample itself."""
    drawn = np.random.default_rng(0).multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=draws)
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
        ppl = sampled(perplexity, name)
        paired = [ppl[seed] - reference[seed] for seed in ppl if seed in reference and name != REFERENCE]
        lossless = all(documents.n_bytes is not None for documents in seeds.values())
        columns = {
            "ppl": list(ppl.values()),
            "ppl_difference": paired,
            "bits_per_byte": list(sampled(bits_per_byte, name).values()) if lossless else [],
        }
        estimated = {key: estimates(samples, n_documents) for key, samples in columns.items() if samples}
        for loop in range(len(estimated["ppl"])):
            found.append(
                {"condition": name, "n_loops": loop + 1, "seeds": list(seeds)}
                | {key: estimated[key][loop]._asdict() if key in estimated else None for key in columns}
                | {"tokens_per_second": rates_at(rates, architectures[name], loop)}
            )
    return found
