"""What the benchmark of patched models counts and checks."""

import pytest
import torch

from bench.bench_patch import IMPLEMENTATIONS, errors, flops_of, model_of, stepping
from bench.measure.accuracy import is_correct
from bench.shapes import RECURRENT_MODELS

CASES = {case.shape.model: case for case in RECURRENT_MODELS.values() if case.smoke}


def test_flops_are_those_of_the_products():
    """Of every layer its two projections, with mixing by the mask; of one readout. The backward pass has twice those
    of the forward pass, but for the first layer's mixing and the mask, which needs no gradient."""
    shape = CASES["nanbeige"].shape
    n, d = shape.n_tokens, shape.d
    projections, mixing = 2 * 2 * n * d * d, 2 * n * shape.seq_len * d
    layers = shape.n_loops * shape.n_layers
    readout = 6 * n * d * shape.vocabulary
    assert flops_of(CASES["nanbeige"]) == layers * (3 * projections + 2 * mixing) + readout


@pytest.mark.parametrize("model", CASES)
def test_both_implementations_start_from_the_same_weights(model):
    case = CASES[model]
    weights = [model_of(case, implementation).state_dict() for implementation in IMPLEMENTATIONS]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_wrong_gradient_is_found():
    case = CASES["ouro"]
    loss, *gradients = stepping(case, "fused")()()
    right = errors([loss, *gradients], case)
    assert max(right.values()) < 1e-5
    wrong = errors([loss, *gradients[:-1], 1.01 * gradients[-1]], case)
    assert not is_correct(wrong, {"loss": 1e-5, "gradients": 1e-5})
