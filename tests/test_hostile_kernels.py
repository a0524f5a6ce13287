"""The public functions of the kernels, called with anything: they give a result, or an error that says why."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hostile import assert_says_why, bounded, drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from looped.kernels import (
    LoopedReadout,
    RMSNorm,
    looped_cross_entropy,
    radial_gradient,
    readout_statistics,
    rms_norm_penalty,
    swiglu,
)

K, N, D, V = 3, 5, 8, 11
DTYPES = [torch.float32] * 4 + [
    torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e4m3fn,
]  # fmt: skip
NO_TENSORS = [None, 0, 1.5, True, "x", [], [1.0], (), {}, np.zeros((N, D), np.float32), object(), math.nan]
NUMBERS = [0, 1, -1, 0.5, 2**31, 2**63, 10**40, -0.0, 1e-45, 1e38, 1e39, math.nan, math.inf, -math.inf, True, None, "1",
           1j, [], np.float32(0.5), np.int64(3)]  # fmt: skip


class Subclass(Tensor):
    """A tensor of another class, which behaves as one."""


LAYOUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x,
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() and x.shape[0] else x,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "requires grad": lambda x: x.detach().requires_grad_() if x.is_floating_point() else x,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse() if x.dim() else x,
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    "negative view": lambda x: torch._neg_view(x) if x.dtype == torch.float32 else x,
}
FILLS = [0.0, 1.0, math.nan, math.inf, -math.inf, 1e38, 1e-40]


@st.composite
def tensors(draw: Any, *shape: int) -> Any:
    """Mostly of ``shape``, else of another; of any dtype and layout."""
    others = [(), (0,), shape[1:], (*shape, 1), (*shape[:-1], 1 + sum(shape[-1:])), (0, *shape[1:])]
    chosen = draw(st.sampled_from([shape] * 5 + others))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    values = torch.randn(chosen, generator=generator)
    if draw(st.integers(0, 4)) == 0 and values.numel():
        values.view(-1)[0] = draw(st.sampled_from(FILLS))
    values = values.to(draw(st.sampled_from(DTYPES)))
    try:
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values)
    except (RuntimeError, NotImplementedError):  # PyTorch has no such dtype in that layout
        return values


@st.composite
def targets(draw: Any) -> Any:
    values = draw(st.lists(st.sampled_from([0, 1, V - 1, V, -1, -100, 2**31 - 1, -(2**63)]), min_size=N, max_size=N))
    if draw(st.integers(0, 2)):
        values = [value % V if value != -100 else -100 for value in values]
    made = torch.tensor(values)
    made = made.to(draw(st.sampled_from([torch.int64, torch.int64, torch.int32, torch.int16, torch.float32])))
    return draw(
        st.sampled_from(
            [made, made, made, made.view(1, N), made.to("meta"), made[:-1], made.as_subclass(Subclass), None]
        )
    )


def call(good: dict[str, Any], hostile: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A good call with up to three of its arguments replaced."""
    names = st.lists(st.sampled_from(sorted(hostile)), max_size=3, unique=True)
    replaced = names.flatmap(lambda names: st.fixed_dictionaries({name: hostile[name] for name in names}))
    return replaced.map(lambda replaced: good | replaced)


def any_tensor(*shape: int) -> st.SearchStrategy[Any]:
    return tensors(*shape) | st.sampled_from(NO_TENSORS)


numbers = st.sampled_from(NUMBERS)
scalars = numbers | tensors()
several = st.lists(tensors(N, D), max_size=K) | st.lists(st.sampled_from(NO_TENSORS), max_size=2)
OPTIONS = {
    "readout": st.sampled_from(["rmsnorm", "layernorm", "raw", "final-only", "", None, 1, []]),
    "norm_weight": any_tensor(D),
    "norm_bias": any_tensor(D),
    "eps": numbers,
    "bias": any_tensor(V),
    "ignore_index": numbers,
    "softcap": numbers,
}
LOSS_OPTIONS = OPTIONS | {
    "penalty": scalars,
    "weights": any_tensor(K) | tensors(K, N) | st.lists(numbers, min_size=K, max_size=K),
    "label_smoothing": numbers,
    "z_loss": scalars,
    "reduction": st.sampled_from(["mean", "sum", "none", "", None, 0, []]),
    "n_targets": scalars,
    "statistics": st.sampled_from([True, False]),
    "chunk_rows": numbers,
}


NO_TENSOR_WEIGHTS = st.sampled_from(NO_TENSORS) | st.lists(numbers, min_size=K, max_size=K)


def good_readout() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "states": torch.randn(K, N, D, generator=generator).requires_grad_(),
        "head": torch.randn(V, D, generator=generator).requires_grad_(),
        "targets": torch.arange(N),
    }


READOUT = {"states": any_tensor(K, N, D) | several, "head": any_tensor(V, D), "targets": targets()}


def results(function: Any, arguments: dict[str, Any]) -> list[Tensor] | None:
    """The tensors that a call returns; None if it refuses the arguments in a line that says which, why and what."""
    try:
        with bounded():
            result = function(**arguments)
    except (TypeError, ValueError) as error:
        assert_says_why(error)
        return None
    parts = [result] if isinstance(result, Tensor) else list(result)
    return [x for part in parts for x in ([part] if isinstance(part, Tensor) else part or ()) if isinstance(x, Tensor)]


def take_gradients(found: list[Tensor]) -> None:
    """A result that says it is differentiable is."""
    for x in found:
        if x.requires_grad:
            with bounded():
                x.sum().backward(retain_graph=True)


SPARSE, BYTES = torch.eye(D).to_sparse(), torch.ones(D, dtype=torch.float8_e4m3fn)
FOUND: dict[str, tuple[Any, dict[str, Any]]] = {
    "a loss without targets": (looped_cross_entropy, good_readout() | {"targets": None}),
    "sparse states": (looped_cross_entropy, good_readout() | {"states": good_readout()["states"].detach().to_sparse()}),
    "sparse targets": (looped_cross_entropy, good_readout() | {"targets": torch.arange(N).to_sparse()}),
    "a bias of 8 bits": (readout_statistics, good_readout() | {"bias": torch.ones(V, dtype=torch.float8_e4m3fn)}),
    "a head of 8 bits": (readout_statistics, good_readout() | {"head": torch.ones(V, D).to(torch.float8_e4m3fn)}),
    "a norm's weight of 8 bits": (rms_norm_penalty, {"x": torch.ones(N, D), "weight": BYTES}),
    "sparse rows to norm": (rms_norm_penalty, {"x": SPARSE}),
    "a sparse residual": (rms_norm_penalty, {"x": torch.ones(D, D), "residual": SPARSE}),
    "a sparse gradient": (radial_gradient, {"h": torch.ones(D, D), "grad": SPARSE}),
    "a sparse gate": (swiglu, {"gate": SPARSE, "up": SPARSE}),
    "a number of several lines": (looped_cross_entropy, good_readout() | {"softcap": torch.eye(9)}),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    """What has once come out as another error than those that are documented."""
    function, arguments = FOUND[name]
    assert results(function, arguments) is None


@given(call(good_readout(), READOUT | LOSS_OPTIONS))
@drawn(30)
def test_looped_cross_entropy(arguments):
    found = results(looped_cross_entropy, arguments)
    if found is not None:
        states = arguments["states"]
        assert found[1].shape == (len(states),)
        expected = (len(states), *states[0].shape[:-1]) if arguments.get("reduction") == "none" else ()
        assert found[0].shape == expected
        take_gradients(found)


@given(call(good_readout(), READOUT | OPTIONS))
@drawn(20)
def test_readout_statistics(arguments):
    found = results(readout_statistics, arguments)
    if found is not None:
        states = arguments["states"]
        assert all(x.shape == (len(states), *states[0].shape[:-1]) for x in found)


@given(call({"x": torch.ones(N, D)}, {"x": any_tensor(N, D), "weight": any_tensor(D), "eps": numbers,
                                      "residual": any_tensor(N, D)}))  # fmt: skip
@drawn(20)
def test_rms_norm_penalty(arguments):
    found = results(rms_norm_penalty, arguments)
    if found is not None:
        assert found[0].shape == arguments["x"].shape
        assert found[1].shape == arguments["x"].shape[:-1]
        take_gradients(found)


@given(call({"h": torch.ones(N, D), "grad": torch.ones(N, D)}, {"h": any_tensor(N, D), "grad": any_tensor(N, D)}))
@drawn(15)
def test_radial_gradient(arguments):
    found = results(radial_gradient, arguments)
    if found is not None:
        assert all(x.shape == arguments["h"].shape[:-1] for x in found)
        take_gradients(found)


@given(call({"gate": torch.ones(N, D), "up": torch.ones(N, D)}, {"gate": any_tensor(N, D), "up": any_tensor(N, D)}))
@drawn(15)
def test_swiglu(arguments):
    found = results(swiglu, arguments)
    if found is not None:
        assert found[0].shape == arguments["gate"].shape
        take_gradients(found)


@given(
    call({"states": good_readout()["states"], "targets": torch.arange(N)},
         {"states": READOUT["states"], "targets": targets()}
         | {name: LOSS_OPTIONS[name] for name in ("n_targets", "weights", "penalty", "statistics")}),
    st.sampled_from([None, 1e-5]),
)  # fmt: skip
@drawn(20)
def test_the_readout_as_a_module(arguments, eps):
    head, norm = torch.nn.Linear(D, V), torch.nn.RMSNorm(D, eps)
    found = results(LoopedReadout(head, norm), arguments)
    if found is not None:
        take_gradients(found)


@given(call({"x": torch.ones(N, D)}, {"x": any_tensor(N, D), "residual": any_tensor(N, D)}), st.booleans())
@drawn(15)
def test_the_norm_as_a_module(arguments, affine):
    found = results(RMSNorm(D, elementwise_affine=affine), arguments)
    if found is not None:
        take_gradients(found)


HEADS = [
    torch.nn.Linear(D, V),
    torch.nn.Embedding(V, D),
    torch.nn.Linear(D, V, device="meta"),
    torch.nn.Linear(D, V, dtype=torch.float64),
    torch.nn.Identity(),
    None,
    1,
]
NORMS = [
    torch.nn.RMSNorm(D),
    torch.nn.LayerNorm(D),
    torch.nn.RMSNorm(V),
    torch.nn.RMSNorm(D, math.nan),
    torch.nn.RMSNorm(D, -1.0),
    torch.nn.LayerNorm((N, D)),
    torch.nn.BatchNorm1d(D),
    torch.nn.Identity(),
    None,
    "rmsnorm",
]
OF_A_MODULE = ("penalty", "label_smoothing", "softcap", "z_loss", "ignore_index", "reduction", "chunk_rows")
MODULE = {
    "head": st.sampled_from(HEADS),
    "norm": st.sampled_from(NORMS),
    "final_only": st.sampled_from([True, False]),
    "weights": NO_TENSOR_WEIGHTS,
    **{name: LOSS_OPTIONS[name] for name in OF_A_MODULE},
}


@given(call({"head": HEADS[0], "norm": NORMS[0]}, MODULE))
@drawn(20)
def test_a_module_is_refused_when_it_is_made(arguments):
    try:
        LoopedReadout(**arguments)
    except (TypeError, ValueError) as error:
        assert_says_why(error)
