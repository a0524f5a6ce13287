"""Readout, forward only: what K states predict, without gradients.

The fused `readout_statistics` gives loss, lse, entropy, margin and top-1 of every token.  Competitors that give all of
them are held to all; those that give the loss alone do less work and say so in their name.
"""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import Errors, relative_error
from bench.implementations import Implementation, freshly_compiled, with_fresh_compiler
from bench.measurement import Measurement, Work
from bench.readouts import CUT_CROSS_ENTROPY, EPS, Inputs
from bench.roofs import readout_floor
from bench.shapes import DEVICE, STATISTICS, Case, ReadoutShape
from bench.timing import Prepare
from kernels import readout_statistics

Statistics = dict[str, Tensor]  # each [K, N]


def fused(inputs: Inputs) -> Statistics:
    result = readout_statistics(inputs.states, inputs.head, inputs.targets, norm_weight=inputs.weight, eps=EPS)
    assert result.loss is not None
    return {"loss": result.loss, "lse": result.lse, "entropy": result.entropy, "margin": result.margin}


def plain(inputs: Inputs) -> Statistics:
    """Loop by loop: logits, then every statistic from them."""
    rows: dict[str, list[Tensor]] = {"loss": [], "lse": [], "entropy": [], "margin": []}
    for y in inputs.normed():
        z = F.linear(y, inputs.head).float()
        lse = z.logsumexp(-1)
        top = z.topk(2).values
        rows["lse"].append(lse)
        rows["loss"].append(lse - z.gather(1, inputs.targets[:, None])[:, 0])
        rows["entropy"].append(lse - (z.softmax(-1) * z).sum(-1))
        rows["margin"].append(top[:, 0] - top[:, 1])
    return {name: torch.stack(values) for name, values in rows.items()}


def plain_loss(inputs: Inputs) -> Statistics:
    """Loop by loop: logits and cross-entropy, nothing else."""
    losses = [F.cross_entropy(F.linear(y, inputs.head), inputs.targets, reduction="none") for y in inputs.normed()]
    return {"loss": torch.stack(losses)}


def cut_cross_entropy_loss(inputs: Inputs) -> Statistics:
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "torch_compile"} if DEVICE.type == "cpu" else {}
    targets = inputs.targets.repeat(len(inputs.states))
    losses = linear_cross_entropy(torch.cat(inputs.normed()), inputs.head, targets, reduction="none", **options)
    return {"loss": losses.view(len(inputs.states), -1)}


IMPLEMENTATIONS = [
    Implementation("fused", lambda: fused),
    Implementation("plain", lambda: plain),
    Implementation("compiled", lambda: freshly_compiled(plain)),
    Implementation("plain, loss alone", lambda: plain_loss),
    Implementation("compiled, loss alone", lambda: freshly_compiled(plain_loss)),
    Implementation(
        "cut-cross-entropy, loss alone", lambda: with_fresh_compiler(cut_cross_entropy_loss), CUT_CROSS_ENTROPY.missing
    ),
]


@lru_cache(maxsize=1)
def inputs_of(case: Case[ReadoutShape]) -> Inputs:
    return Inputs.of(case.shape, case.dtype)


@lru_cache(maxsize=1)
@torch.no_grad()
def truth_of(case: Case[ReadoutShape]) -> Statistics:
    """Plain PyTorch on the same numbers in float32."""
    return plain(inputs_of(case).to(torch.float32))


@torch.no_grad()
def errors(statistics, case: Case[ReadoutShape]) -> Errors:
    """Relative errors of every statistic that the implementation gives."""
    return {name: relative_error(found, truth_of(case)[name]) for name, found in statistics(inputs_of(case)).items()}


@lru_cache(maxsize=1)
def plain_errors(case: Case[ReadoutShape]) -> Errors:
    return errors(plain, case)


def make_round(statistics, inputs: Inputs) -> Prepare:
    def call() -> object:
        with torch.no_grad():
            return statistics(inputs)

    return lambda: call


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("case", STATISTICS, ids=str)
def bench_statistics(measure, case: Case[ReadoutShape], implementation: Implementation) -> None:
    inputs, statistics = inputs_of(case), implementation.make()
    loss_alone = "loss alone" in implementation.name
    measure(
        Measurement(
            group="readout forward only",
            case=case,
            implementation=implementation,
            errors=lambda: plain_errors(case) if statistics is plain else errors(statistics, case),
            allowed=lambda: {"loss": plain_errors(case)["loss"]} if loss_alone else plain_errors(case),
            prepare=make_round(statistics, inputs),
            reference=make_round(fused, inputs),
            work=Work(case.shape.flops / 3e9, "GFLOP/s", lambda: readout_floor(case.shape, case.dtype, backward=False)),
        )
    )
