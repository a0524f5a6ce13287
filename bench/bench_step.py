"""One optimisation step of the decoder: fused, plain PyTorch, either with its blocks compiled, and the eager baseline.

On a GPU each is timed twice: launched kernel by kernel, and as one CUDA graph.  All hold the same weights at first and
see the same batch; denormals are flushed for all.  Loss and gradients are checked without dropout, whose random numbers
differ from one implementation to the next.
"""

from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from bench.competitors.decoders import STEP_IMPLEMENTATIONS, decoder, decoder_roof, stepping, tokens_of
from bench.measure.accuracy import Errors, limits_with_mean_loss, relative_errors, truth_dtype
from bench.measure.measurement import Work, cases
from bench.shapes import MAIN_DTYPE, STEPS, Case, DecoderShape
from looped.supervision import Supervision
from train.step import autocast

CHECKED_TOKENS = 64  # of one sequence: what the check of loss and gradients runs on


def loss_and_gradients(shape: DecoderShape, variant: str, supervision: Supervision, dtype: torch.dtype) -> list[Tensor]:
    """Of one short sequence, without dropout; the gradients of all parameters as one vector."""
    model = decoder(shape, variant).eval()
    model = model.double() if dtype == torch.float64 else model  # else in float32, its products in `dtype`
    short = shape._replace(batch=1, seq_len=min(shape.seq_len, CHECKED_TOKENS))
    tokens = tokens_of(short, model.config.vocab_size)
    with autocast(tokens.device, dtype):
        loss = model(tokens[:, :-1], tokens[:, 1:].contiguous(), supervision=supervision).loss
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [parameters[name].grad for name in sorted(parameters)]
    return [loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])]


@lru_cache(maxsize=1)
def truth_of(case: Case[DecoderShape], supervision: Supervision) -> list[Tensor]:
    """Plain PyTorch in a wider dtype."""
    return loss_and_gradients(case.shape, "plain", supervision, truth_dtype(case.dtype))


def errors(case: Case[DecoderShape], variant: str, supervision: Supervision) -> Errors:
    found = loss_and_gradients(case.shape, variant, supervision, case.dtype)
    return relative_errors(("loss", "gradients"), found, truth_of(case, supervision))


@pytest.mark.parametrize("implementation", STEP_IMPLEMENTATIONS)
@pytest.mark.parametrize("supervision", ["per-loop", "terminal"])
@cases(STEPS)
def bench_step(measure, case: str, supervision: Supervision, implementation: str) -> None:
    step = STEPS[case]
    shape, dtype = step.shape, step.dtype
    if supervision == "terminal" and not (step.smoke or (step.dtype_name == MAIN_DTYPE and step.compiles)):
        pytest.skip(f"terminal supervision is timed in {MAIN_DTYPE}, on a CPU without bf16 on the smaller batch")
    if supervision == "terminal" and STEP_IMPLEMENTATIONS[implementation].compiles:
        pytest.skip("compiled blocks are the same with terminal supervision")
    model = decoder(shape, "fused", torch.device("meta"))  # counts FLOPs, holds no weights
    n_readouts = shape.n_loops if supervision == "per-loop" else 1
    flops = model.flops_per_token(n_readouts=n_readouts, seq_len=shape.seq_len) * shape.n_tokens
    measure(
        subject=f"training step, {supervision} supervision",
        case=step,
        implementation=STEP_IMPLEMENTATIONS[implementation],
        prepare=lambda: stepping(step, implementation, supervision)(),
        reference=lambda: stepping(step, "fused", supervision)(),
        errors=lambda _: errors(step, implementation, supervision),
        plain=lambda: errors(step, "plain", supervision),
        limits=partial(limits_with_mean_loss, dtype=dtype),
        work=Work(flops / 1e9, "GFLOP/s", lambda: decoder_roof(model, shape, dtype, flops)),
        n_tokens=shape.n_tokens,
    )
