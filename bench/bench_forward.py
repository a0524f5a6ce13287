"""The decoder's forward pass without gradients, from tokens to the states of K loops; no readout, no dropout."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.competitors.decoders import IMPLEMENTATIONS, decoder, decoder_roof, tokens_of
from bench.measure.accuracy import Errors, limits, relative_error, truth_dtype
from bench.measure.measurement import Measurement, Work
from bench.measure.timing import Call, Prepare
from bench.shapes import FORWARDS, Case, DecoderShape
from looped.model import LoopedLM
from train.step import autocast

FORWARD_IMPLEMENTATIONS = [name for name in IMPLEMENTATIONS if name != "fused-blocks-compiled"]
States = tuple[Tensor, ...]


@lru_cache(maxsize=len(IMPLEMENTATIONS))
def model_of(preset: str, variant: str) -> LoopedLM:
    """One model for every K and dtype, so that it is compiled once."""
    if IMPLEMENTATIONS[variant].compiles:
        torch.compiler.reset()  # a block may have only so many graphs
    return decoder(DecoderShape(preset, 1, 1), variant).eval()


def states(model: LoopedLM, shape: DecoderShape, dtype: torch.dtype) -> States:
    inputs = tokens_of(shape, model.config.vocab_size)[:, :-1]
    with torch.no_grad(), autocast(inputs.device, dtype):
        return model(inputs, n_loops=shape.n_loops).states


@lru_cache(maxsize=1)
def truth_of(case: str) -> States:
    """Plain PyTorch on the same weights in a wider dtype."""
    shape, dtype = FORWARDS[case].shape, truth_dtype(FORWARDS[case].dtype)
    return states(copy.deepcopy(model_of(shape.preset, "plain")).to(dtype), shape, dtype)


def errors(found: States, case: str) -> Errors:
    """Relative error of the state after every loop."""
    pairs = zip(found, truth_of(case), strict=True)
    return {f"H_{loop}": relative_error(actual, truth) for loop, (actual, truth) in enumerate(pairs, start=1)}


def make_round(case: Case[DecoderShape], variant: str) -> Prepare:
    model = model_of(case.shape.preset, variant)

    def call() -> States:
        return states(model, case.shape, case.dtype)

    return lambda: call


@lru_cache(maxsize=1)
def allowed(case: str) -> Errors:
    plain: Call = make_round(FORWARDS[case], "plain")()
    return limits(errors(plain(), case))


@pytest.mark.parametrize("implementation", FORWARD_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", FORWARDS)
def bench_forward(measure, case: str, implementation: str) -> None:
    shape, dtype = FORWARDS[case].shape, FORWARDS[case].dtype
    model = model_of(shape.preset, "fused")
    per_token = model.flops_per_token(shape.n_loops, n_readouts=0, seq_len=shape.seq_len, training=False)
    flops = per_token * shape.n_tokens
    measure(
        Measurement(
            subject="decoder forward",
            case=FORWARDS[case],
            implementation=IMPLEMENTATIONS[implementation],
            prepare=make_round(FORWARDS[case], implementation),
            reference=make_round(FORWARDS[case], "fused"),
            errors=lambda found: errors(found, case),
            allowed=lambda: allowed(case),
            work=Work(flops / 1e9, "GFLOP/s", lambda: decoder_roof(model, shape, dtype, flops)),
            n_tokens=shape.n_tokens,
        )
    )
