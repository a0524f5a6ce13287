"""Speed of prefill at K = 1..n_loops: a decoder of each architecture that was trained, and its competitors.

What is timed: tokens [B, T] through K loops of the decoder, and the logits [B, T, V] of the last state, without
gradients. Conditions that differ in training alone have one architecture and so one speed.
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from looped.config import LoopedConfig
from looped.model import LoopedLM
from looped.run_directory import SavedRun
from train.step import prefill, seconds_in_turn
from train.text.batches import Windows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NORMS = {"raw": "no norm", "layernorm": "LayerNorm"}  # before the head; otherwise RMSNorm, at the last loop at least


class Rate(NamedTuple):
    """Tokens per second: the median round, and the rounds at the lower and upper quartile."""

    median: float
    low: float
    high: float


def rates_at(rates: dict[str, dict[str, list[Rate]]], model: str, loop: int) -> dict[str, dict[str, Any]]:
    """The rates of a model after a loop (from 0) by batch size, from those by batch size and model."""
    return {batch: by_model[model][loop]._asdict() for batch, by_model in rates.items()}


def architecture(config: LoopedConfig) -> str:
    """What of a condition prefill depends on."""
    between = ", RMSNorm between loops" if config.inter_loop_norm else ""
    return f"fused, {NORMS.get(config.readout, 'RMSNorm')} before the head{between}"


def competitors(model: LoopedLM) -> dict[str, LoopedLM]:
    """The same decoder in plain PyTorch, and with its blocks by torch.compile."""
    plain, compiled = copy.deepcopy(model), copy.deepcopy(model)
    plain.fused = compiled.fused = False
    for block in compiled.blocks:
        block.compile(dynamic=False)
    return {"plain PyTorch": plain, "plain PyTorch, blocks compiled": compiled}


def window_batch(run: SavedRun, batch: int) -> Tensor:
    """[batch, T] inputs from the validation split, over again where it is short."""
    seq_len = run.model.config.max_seq_len
    windows = Windows(run.validation.tokens.numpy(), seq_len, seq_len)
    return windows.gather(np.arange(batch) % len(windows))[0].to(DEVICE)


@torch.no_grad()
def throughput(models: dict[str, LoopedLM], inputs: Tensor, dtype: torch.dtype, rounds: int) -> dict[str, list[Rate]]:
    """The rates of every model at K = 1..n_loops, on ``inputs`` [B, T].

    Each model at each K has its turn in every round.
    """
    torch.compiler.reset()  # a block may have only so many graphs
    n_loops = next(iter(models.values())).config.n_loops
    calls = [
        partial(prefill, model, depth, dtype, inputs) for depth in range(1, n_loops + 1) for model in models.values()
    ]
    rates = []
    for times in seconds_in_turn(calls, DEVICE, rounds=rounds):
        slow, middle, fast = np.quantile(times, (0.75, 0.5, 0.25))
        rates.append(Rate(*(float(inputs.numel() / quantile) for quantile in (middle, slow, fast))))
    return {name: rates[place :: len(models)] for place, name in enumerate(models)}
