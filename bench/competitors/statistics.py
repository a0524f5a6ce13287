"""Implementations of the readout without gradients: the loss of every token alone, and all that is known of a token.

The fused `readout_statistics` gives loss, lse, entropy, margin and top-1 in one pass over the vocabulary; where the
loss is all that is wanted, `looped_cross_entropy` gives it.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.competitors.readouts import CUT_MISSING, EPS, Inputs, concatenated, cut_cross_entropy
from bench.measure.accuracy import Errors, relative_error, truth_dtype
from bench.measure.implementation import Implementation, by_name, fused_plain_compiled
from looped.kernels import looped_cross_entropy, readout_statistics

Statistics = dict[str, Tensor]  # each [K, N]


def fused(inputs: Inputs) -> Statistics:
    result = readout_statistics(inputs.states, inputs.head, inputs.targets, norm_weight=inputs.weight, eps=EPS)
    assert result.loss is not None
    return result._asdict()


def fused_loss(inputs: Inputs) -> Statistics:
    result = looped_cross_entropy(
        inputs.states, inputs.head, inputs.targets, norm_weight=inputs.weight, eps=EPS, reduction="none",
        weights=[1.0] * len(inputs.states),
    )  # fmt: skip
    return {"loss": result.loss}


def plain(inputs: Inputs) -> Statistics:
    """Loop by loop: logits, then every statistic from them, in float32 at least."""
    rows: dict[str, list[Tensor]] = {name: [] for name in ("loss", "lse", "entropy", "margin", "top1")}
    for y in inputs.normed():
        z = F.linear(y, inputs.head)
        z = z if z.dtype == torch.float64 else z.float()
        lse = z.logsumexp(-1)
        top, ids = z.topk(2)
        rows["lse"].append(lse)
        rows["loss"].append(lse - z.gather(1, inputs.targets[:, None])[:, 0])
        rows["entropy"].append(lse - (z.softmax(-1) * z).sum(-1))
        rows["margin"].append(top[:, 0] - top[:, 1])
        rows["top1"].append(ids[:, 0])
    return {name: torch.stack(values) for name, values in rows.items()}


def plain_loss(inputs: Inputs) -> Statistics:
    """Loop by loop: logits, cast to float32 so that the loss is not rounded to bf16, and cross-entropy."""
    logits = (F.linear(y, inputs.head).float() for y in inputs.normed())
    return {"loss": torch.stack([F.cross_entropy(z, inputs.targets, reduction="none") for z in logits])}


def cut_cross_entropy_loss(inputs: Inputs) -> Statistics:
    rows, targets = concatenated(inputs)
    losses = cut_cross_entropy(rows, inputs.head, targets, reduction="none")
    return {"loss": losses.view(len(inputs.states), -1)}


# What is measured, by the name of the subject, by the name of the implementation.
SUBJECTS = {
    "loss": by_name(
        [
            *fused_plain_compiled(fused_loss, plain_loss),
            Implementation("cut-cross-entropy", cut_cross_entropy_loss, CUT_MISSING, compiles="inside"),
        ]
    ),
    "all statistics": by_name(fused_plain_compiled(fused, plain)),
}


@lru_cache(maxsize=1)
@torch.no_grad()
def truth(inputs: Inputs) -> Statistics:
    """Plain PyTorch on the same numbers in a wider dtype, and the logit of the most likely token."""
    wide = inputs.to(truth_dtype(inputs.head.dtype))
    expected = plain(wide)
    return {**expected, "top logit": logit_of(wide, expected["top1"])}


@torch.no_grad()
def logit_of(wide: Inputs, ids: Tensor) -> Tensor:
    """The logit of one token of the vocabulary for each row, ids [K, N]."""
    return torch.stack([(y * wide.head[row]).sum(-1) for y, row in zip(wide.normed(), ids, strict=True)])


def errors(found: Statistics, inputs: Inputs) -> Errors:
    """Relative errors of every statistic that was found.

    `top1` is held to the logit of the token named, not to its number: tokens whose logits are as good as equal may be
    named for each other.
    """
    wide, expected = inputs.to(truth_dtype(inputs.head.dtype)), truth(inputs)
    found_errors = {name: relative_error(value, expected[name]) for name, value in found.items() if name != "top1"}
    if "top1" in found:
        found_errors["top1"] = relative_error(logit_of(wide, found["top1"]), expected["top logit"])
    return found_errors
