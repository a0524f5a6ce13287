"""The decoder's forward pass without gradients, from tokens to the states of K loops; no readout, no dropout."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.competitors.decoders import IMPLEMENTATIONS, decoder, decoder_roof, tokens_of
from bench.measure.accuracy import Errors, relative_errors, truth_dtype
from bench.measure.measurement import Work, cases
from bench.measure.timing import Prepare
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


def make_round(case: Case[DecoderShape], model: LoopedLM, dtype: torch.dtype) -> Prepare:
    """The model's pass over tokens that are there."""
    inputs = tokens_of(case.shape, model.config.vocab_size)[:, :-1]

    def call() -> States:
        with torch.no_grad(), autocast(inputs.device, dtype):
            return model(inputs, n_loops=case.shape.n_loops).states

    return lambda: call


@lru_cache(maxsize=1)
def truth_of(case: Case[DecoderShape]) -> States:
    """Plain PyTorch on the same weights in a wider dtype."""
    dtype = truth_dtype(case.dtype)
    return make_round(case, copy.deepcopy(model_of(case.shape.preset, "plain")).to(dtype), dtype)()()


@pytest.mark.parametrize("implementation", FORWARD_IMPLEMENTATIONS)
@cases(FORWARDS)
def bench_forward(measure, case: str, implementation: str) -> None:
    shape, dtype = FORWARDS[case].shape, FORWARDS[case].dtype

    def round_of(variant: str) -> Prepare:
        return make_round(FORWARDS[case], model_of(shape.preset, variant), dtype)

    def errors(found: States) -> Errors:
        """Of the state after every loop."""
        return relative_errors([f"H_{loop}" for loop in range(1, 1 + shape.n_loops)], found, truth_of(FORWARDS[case]))

    model = model_of(shape.preset, "fused")
    per_token = model.flops_per_token(shape.n_loops, n_readouts=0, seq_len=shape.seq_len, training=False)
    flops = per_token * shape.n_tokens
    measure(
        subject="decoder forward",
        case=FORWARDS[case],
        implementation=IMPLEMENTATIONS[implementation],
        prepare=round_of(implementation),
        reference=round_of("fused"),
        errors=errors,
        plain=lambda: errors(round_of("plain")()()),
        work=Work(flops / 1e9, "GFLOP/s", lambda: decoder_roof(model, shape, dtype, flops)),
        n_tokens=shape.n_tokens,
    )
