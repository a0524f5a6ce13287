"""The decoder's forward pass without gradients, from tokens to the states of K loops; no readout, no dropout."""

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.accuracy import Errors, relative_error
from bench.decoders import IMPLEMENTATIONS, decoder, floor_seconds, tokens_of
from bench.implementations import Implementation
from bench.measurement import Measurement, Work
from bench.shapes import FORWARDS, Case, DecoderShape
from bench.timing import Prepare
from looped.decoder import LoopedDecoder
from train.step import autocast


@lru_cache(maxsize=len(IMPLEMENTATIONS))
def model_of(preset: str, variant: str) -> LoopedDecoder:
    """One model for every K and dtype, so that it is compiled once."""
    return decoder(DecoderShape(preset, 1, 1), variant).eval()


def states(case: Case[DecoderShape], variant: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    model = model_of(case.shape.preset, variant)
    inputs = tokens_of(case.shape, model.config.vocab_size)[:, :-1]
    with torch.no_grad(), autocast(inputs.device, dtype):
        return model(inputs, n_loops=case.shape.n_loops)


@lru_cache(maxsize=1)
def truth_of(case: Case[DecoderShape]) -> tuple[Tensor, ...]:
    """Plain PyTorch in float32."""
    return states(case, "plain", torch.float32)


def errors(case: Case[DecoderShape], variant: str) -> Errors:
    """Relative error of the state after every loop."""
    found = states(case, variant, case.dtype)
    pairs = zip(found, truth_of(case), strict=True)
    return {f"H_{loop}": relative_error(actual, truth) for loop, (actual, truth) in enumerate(pairs, start=1)}


@lru_cache(maxsize=1)
def plain_errors(case: Case[DecoderShape]) -> Errors:
    return errors(case, "plain")


def make_round(case: Case[DecoderShape], variant: str) -> Prepare:
    return lambda: lambda: states(case, variant, case.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("case", FORWARDS, ids=str)
def bench_forward(measure, case: Case[DecoderShape], implementation: Implementation) -> None:
    shape, model = case.shape, model_of(case.shape.preset, "fused")
    per_token = model.flops_per_token(shape.n_loops, n_readouts=0, seq_len=shape.seq_len, training=False)
    flops = per_token * shape.n_tokens
    measure(
        Measurement(
            group="decoder forward",
            case=case,
            implementation=implementation,
            errors=lambda: errors(case, implementation.name),
            allowed=lambda: plain_errors(case),
            prepare=make_round(case, implementation.name),
            reference=make_round(case, "fused"),
            work=Work(flops / 1e9, "GFLOP/s", lambda: floor_seconds(model, shape, case.dtype, flops)),
            n_tokens=shape.n_tokens,
        )
    )
