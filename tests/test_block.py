"""Which blocks are computed by nodes that hold a norm and its products, and which part by part."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from tiny_decoder import D, model, tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from looped import block
from looped.attention import SelfAttention
from looped.block import SwiGLU
from looped.normed_products import normed_heads, normed_swiglu, product


@pytest.fixture
def joined(monkeypatch) -> list[str]:
    """The names of sublayers, as they are computed as one node."""
    names: list[str] = []

    def note(function) -> None:
        def noted(*arguments):
            names.append(function.__name__)
            return function(*arguments)

        monkeypatch.setattr(block, function.__name__, noted)

    note(normed_swiglu)
    note(normed_heads)
    note(product)
    return names


BOTH = ["normed_heads", "normed_swiglu"]


class Doubling(nn.Module):
    """What a library that adapts models puts in a layer's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight = linear.weight

    def forward(self, *given: Tensor) -> Tensor:
        return 2 * self.linear(*given)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def double_by_a_class(module: nn.Module) -> None:
    module.__class__ = Subclass


def double_by_a_method(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda x: 2 * own(x)


DOUBLED = {
    "hook": lambda module: module.register_forward_hook(lambda _, given, output: 2 * output),
    "hook before": lambda module: module.register_forward_pre_hook(lambda _, given: 2 * given[0]),
    "parametrised": lambda module: nn.utils.parametrize.register_parametrization(module, "weight", Twice()),
    "class": double_by_a_class,
    "method": double_by_a_method,
}


LAYERS = ("attention.qkv", "attention.output", "mlp.w1", "mlp.w2", "mlp.w3")
NORMS = itertools.product(("attention_norm", "mlp_norm"), ("hook", "parametrised", "method"))


@pytest.mark.parametrize(("name", "how"), [*itertools.product(LAYERS, DOUBLED), *NORMS])
def test_a_part_that_does_more_does_it(joined, name, how):
    decoder, expected = model(fused=True), model(fused=True)
    expected.blocks[0].get_submodule(name).weight.data.mul_(2)
    DOUBLED[how](decoder.blocks[0].get_submodule(name))
    torch.testing.assert_close(decoder.unroll(tokens(), 2), expected.unroll(tokens(), 2))
    assert joined == BOTH * (2 + 4)  # of the second layer alone, and of both


@pytest.mark.parametrize("norm", [nn.LayerNorm(D), nn.RMSNorm(D, eps=None), nn.Identity()])
def test_another_norm(joined, norm):
    decoder, plain = model(fused=True), model(fused=False)
    decoder.blocks[0].mlp_norm = plain.blocks[0].mlp_norm = norm
    torch.testing.assert_close(decoder.unroll(tokens(), 2), plain.unroll(tokens(), 2))
    assert joined == BOTH * 2


@pytest.mark.parametrize("kind", [SelfAttention, SwiGLU, nn.Linear, nn.RMSNorm])
def test_a_class_whose_forward_is_replaced(joined, monkeypatch, kind):
    """As libraries do that measure or quantise: with and without gradients it acts."""
    seen, own = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given: (seen.append(given), own(*given))[1])
    decoder = model(fused=True)
    decoder.unroll(tokens(), 2)
    called = len(seen)
    with torch.no_grad():
        decoder.unroll(tokens(), 2)
    assert 0 < called == len(seen) / 2
    assert joined == []


def test_a_part_that_is_compiled_is_called(joined):
    decoder, graphs = model(fused=True), []
    decoder.blocks[0].mlp.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    decoder.unroll(tokens(), 2)
    assert graphs
    assert joined == BOTH * 2


@pytest.mark.parametrize("grad", [False, True])
def test_float64_is_refused_on_a_gpu(monkeypatch, grad):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    decoder = model(fused=True).double()
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="float64"):
        decoder.unroll(tokens(), 1)


def test_a_norm_without_a_weight(joined):
    decoder, expected = model(fused=True), model(fused=True)
    expected.blocks[0].mlp_norm.weight.data.fill_(1)
    decoder.blocks[0].mlp_norm = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)
    torch.testing.assert_close(decoder.unroll(tokens(), 1), expected.unroll(tokens(), 1))
    assert joined == BOTH * (1 + 2)


def test_a_layer_in_anothers_place_is_called(joined):
    decoder, expected = model(fused=True), model(fused=True)
    expected.blocks[1].mlp.w2.weight.data.mul_(2)
    decoder.blocks[1].mlp.w2 = Doubling(decoder.blocks[1].mlp.w2)
    torch.testing.assert_close(decoder.unroll(tokens(), 1), expected.unroll(tokens(), 1))
    assert joined == BOTH * (1 + 2)


def test_a_hook_on_all_modules_is_called(joined):
    decoder, seen = model(fused=True), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: seen.append(type(module)))
    decoder.unroll(tokens(), 1)
    hook.remove()
    assert seen.count(nn.Linear) == 5 * len(decoder.blocks)
    assert joined == []


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_hook_on_a_part_is_called(joined, name):
    decoder, seen = model(fused=True), []
    expected = decoder.unroll(tokens(), 2)
    joined.clear()
    decoder.blocks[0].get_submodule(name).register_forward_hook(lambda module, given, output: seen.append(output[0]))
    torch.testing.assert_close(decoder.unroll(tokens(), 2), expected)
    assert [part.shape for part in seen] == [expected[0].shape] * 2
    assert joined == BOTH * 2


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_is_called(joined, register):
    decoder, seen = model(fused=True), []
    getattr(decoder.blocks[0].mlp.w3, register)(lambda module, *gradients: seen.append(module))
    decoder.unroll(tokens(), 2)[-1].sum().backward()
    assert len(seen) == 2
    assert joined == BOTH * 2


def test_a_bias_is_added(joined):
    decoder, plain = model(fused=True), model(fused=False)
    for one in (decoder, plain):
        one.blocks[1].mlp.w2.bias = nn.Parameter(torch.ones(D))
    torch.testing.assert_close(decoder.unroll(tokens(), 2), plain.unroll(tokens(), 2))
    assert joined == BOTH * 2


class Wrapped(Tensor):
    """A tensor of another kind."""


def test_a_weight_of_another_kind_is_left_to_its_operations(joined):
    decoder = model(fused=True)
    linear = decoder.blocks[0].attention.output
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped))
    decoder.unroll(tokens(), 1)
    assert joined == BOTH


def test_a_part_in_anothers_place(joined):
    """As FSDP2 has it, whose parts gather their weights when they are called."""
    decoder, expected = model(fused=True), model(fused=False).unroll(tokens(), 1)
    for part in (decoder.blocks[0].mlp, decoder.blocks[1].attention):
        part.__class__ = type("Gathering", (type(part),), {})
    torch.testing.assert_close(decoder.unroll(tokens(), 1), expected)
    assert joined == []


@pytest.mark.parametrize("without", ["fused", "gradient", "mode"])
def test_separate_operations(joined, without):
    decoder = model(fused=without != "fused")
    with (
        torch.set_grad_enabled(without != "gradient"),
        FlopCounterMode(display=False) if without == "mode" else nullcontext(),
    ):
        decoder.unroll(tokens(), 2)
    assert joined == []
