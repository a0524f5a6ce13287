"""A training step of other people's models: their own computation, and the same patched by `looped.patch`.

Forward, loss and backward, without an optimiser, whose time is the same for both. `plain` is the model as it came,
`fused` the patched one; both hold the same weights in the case's dtype and see the same batch.
"""

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import looped
from bench.competitors.recurrent_models import RECURRENT_MODELS as MODELS
from bench.competitors.recurrent_models import Size
from bench.measure.accuracy import Errors, limits_with_mean_loss, relative_errors, truth_dtype
from bench.measure.implementation import Implementation, by_name, why_missing
from bench.measure.measurement import Work, cases
from bench.measure.roofs import projection_roof
from bench.measure.timing import Call, Prepare
from bench.shapes import DEVICE, RECURRENT_MODELS, Case, RecurrentShape

IMPLEMENTATIONS = by_name(Implementation(name) for name in ("fused", "plain"))
OF_TRANSFORMERS = ("hrm_text", "albert")


def model_of(case: Case[RecurrentShape], implementation: str) -> nn.Module:
    """In training mode, with the same weights for both, rounded to the case's dtype."""
    shape = case.shape
    torch.manual_seed(0)
    model = MODELS[shape.model](Size(shape.d, shape.vocabulary, shape.n_loops, shape.n_layers))
    model = model.to(DEVICE, case.dtype).train()
    if implementation == "fused":
        looped.patch(model)
    return model


def arguments_of(shape: RecurrentShape, dtype: torch.dtype) -> dict[str, Any]:
    """Random tokens and labels; of Huginn also the state that it starts from, which it would draw."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (
        torch.randint(shape.vocabulary, (shape.batch, shape.seq_len), generator=generator).to(DEVICE) for _ in range(2)
    )
    arguments: dict[str, Any] = {"input_ids": tokens, "labels": labels}
    if shape.model == "huginn":
        start = torch.randn(shape.batch, shape.seq_len, shape.d, generator=generator)
        arguments["input_states"] = start.to(DEVICE, dtype)
    return arguments if shape.model == "albert" else arguments | {"use_cache": False}


def step(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    """The loss, and the gradients of all parameters that have one."""
    loss = model(**arguments).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@lru_cache(maxsize=2)  # the patched model, with which the other takes turns, and that one
def stepping(case: Case[RecurrentShape], implementation: str) -> Prepare:
    """A step of the model; before each its gradients are forgotten."""
    model, arguments = model_of(case, implementation), arguments_of(case.shape, case.dtype)

    def prepare() -> Call:
        model.zero_grad(set_to_none=True)
        return partial(step, model, arguments)

    return prepare


@lru_cache(maxsize=1)
def truth_of(case: Case[RecurrentShape]) -> list[Tensor]:
    """The model's own computation in a wider dtype, from the same weights."""
    dtype = truth_dtype(case.dtype)
    return step(model_of(case, "plain").to(dtype), arguments_of(case.shape, dtype))


def errors(result: list[Tensor], case: Case[RecurrentShape]) -> Errors:
    """Of the loss, and of the gradients of all parameters as one vector."""

    def loss_and_vector(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        return tensors[0], torch.cat([gradient.flatten() for gradient in tensors[1:]])

    truth = truth_of(case)
    assert [tensor.shape for tensor in result] == [tensor.shape for tensor in truth]
    return relative_errors(("loss", "gradients"), loss_and_vector(result), loss_and_vector(truth))


@lru_cache(maxsize=1)
def flops_of(case: Case[RecurrentShape]) -> int:
    """Of the products of a patched step: counted, but for those of the readout's kernel, 6 N d V of one readout."""
    model = model_of(case, "fused")
    with FlopCounterMode(display=False) as counter:
        step(model, arguments_of(case.shape, case.dtype))
    head = looped.adapters.find_adapter(model).head
    return counter.get_total_flops() + 6 * case.shape.n_tokens * model.get_submodule(head).weight.numel()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@cases(RECURRENT_MODELS)
def bench_patch(measure, case: str, implementation: str) -> None:
    model = RECURRENT_MODELS[case]
    shape, dtype = model.shape, model.dtype
    missing = why_missing("transformers", extra="hf") if shape.model in OF_TRANSFORMERS else None
    flops = 0 if missing else flops_of(model)
    measure(
        subject="training step of other people's models",
        case=model,
        implementation=IMPLEMENTATIONS[implementation]._replace(missing=missing),
        prepare=lambda: stepping(model, implementation)(),
        reference=lambda: stepping(model, "fused")(),
        errors=lambda result: errors(result, model),
        plain=lambda: errors(stepping(model, "plain")()(), model),
        limits=partial(limits_with_mean_loss, dtype=dtype),
        work=Work(
            flops / 1e9, "GFLOP/s", lambda: projection_roof(shape.n_tokens, shape.d, shape.vocabulary, dtype, flops)
        ),
        n_tokens=shape.n_tokens,
    )
