"""One optimisation step of the decoder: fused, plain PyTorch, and the eager baseline, in turn.

All hold the same weights at first and see the same batch; denormals are flushed for all.  Loss and gradients are
checked without dropout, whose random numbers differ from one implementation to the next.
"""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.accuracy import Errors, allowing_for_luck, relative_error
from bench.decoders import IMPLEMENTATIONS, decoder, floor_seconds, stepping, tokens_of
from bench.implementations import Implementation
from bench.measurement import Measurement, Work
from bench.shapes import STEPS, Case, DecoderShape
from looped.supervision import Supervision, looped_loss
from train.step import autocast

STEP_IMPLEMENTATIONS = [implementation for implementation in IMPLEMENTATIONS if implementation.name != "compiled"]
CHECKED_TOKENS = 64  # of one sequence: what the check of loss and gradients runs on


def loss_and_gradients(shape: DecoderShape, variant: str, supervision: Supervision, dtype: torch.dtype) -> list[Tensor]:
    """Of one short sequence, without dropout; the gradients of all parameters as one vector."""
    model = decoder(shape, variant).eval()
    short = DecoderShape(shape.preset, 1, min(shape.seq_len, CHECKED_TOKENS), shape.n_loops)
    tokens = tokens_of(short, model.config.vocab_size)
    with autocast(tokens.device, dtype):
        loss = looped_loss(model, model(tokens[:, :-1]), tokens[:, 1:].contiguous(), supervision=supervision).loss
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [parameters[name].grad for name in sorted(parameters)]
    return [loss.detach(), torch.cat([g.flatten().float() for g in gradients if g is not None])]


@lru_cache(maxsize=1)
def truth_of(shape: DecoderShape, supervision: Supervision) -> list[Tensor]:
    """Plain PyTorch in float32."""
    return loss_and_gradients(shape, "plain", supervision, torch.float32)


def errors(case: Case[DecoderShape], variant: str, supervision: Supervision) -> Errors:
    loss, gradients = loss_and_gradients(case.shape, variant, supervision, case.dtype)
    true_loss, true_gradients = truth_of(case.shape, supervision)
    return {"loss": relative_error(loss, true_loss), "gradients": relative_error(gradients, true_gradients)}


@lru_cache(maxsize=1)
def plain_errors(case: Case[DecoderShape], supervision: Supervision) -> Errors:
    return errors(case, "plain", supervision)


@pytest.mark.parametrize("implementation", STEP_IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("supervision", ["per-loop", "terminal"])
@pytest.mark.parametrize("case", STEPS, ids=str)
def bench_step(measure, case: Case[DecoderShape], supervision: Supervision, implementation: Implementation) -> None:
    if supervision == "terminal" and case.dtype == torch.float32 and not case.smoke:
        pytest.skip("terminal supervision is timed in bf16")
    shape, variant = case.shape, implementation.name
    model = decoder(shape, "fused", torch.device("meta"))  # counts FLOPs, holds no weights
    n_readouts = shape.n_loops if supervision == "per-loop" else 1
    flops = model.flops_per_token(n_readouts=n_readouts, seq_len=shape.seq_len) * shape.n_tokens
    measure(
        Measurement(
            group=f"training step, {supervision} supervision",
            case=case,
            implementation=implementation,
            errors=lambda: errors(case, variant, supervision),
            allowed=lambda: allowing_for_luck(plain_errors(case, supervision), case.dtype),
            prepare=lambda: stepping(case, variant, supervision)(),
            reference=lambda: stepping(case, "fused", supervision)(),
            work=Work(flops / 1e9, "GFLOP/s", lambda: floor_seconds(model, shape, case.dtype, flops)),
            n_tokens=shape.n_tokens,
        )
    )
