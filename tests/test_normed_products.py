"""A norm and the products that read it as one node, and the gradients of the weights that all loops share."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse_than
from tiny_decoder import gradients, model, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from looped import block
from looped.kernels import rms_norm_penalty, swiglu
from looped.normed_products import normed_heads, normed_swiglu, product
from looped.shared_weight import GradientSum, shared

EPS = 1e-6
D, D_FF, HEADS = 24, 40, 3


class Once(TorchDispatchMode):
    """Counts the calls of ATen's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def grouped(kind: str, weights: list[Tensor]) -> list[list[Tensor]]:
    """Those of one product together: w1 and w3."""
    norm, *matrices = weights
    return [[norm], matrices] if kind == "heads" else [[norm], matrices[:2], matrices[2:]]


def two_loops(kind: str, x: Tensor, delta: Tensor | None, weights: list[Tensor], one_node: bool) -> list[Tensor]:
    """A sublayer applied twice to its own stream: its results in both loops, by one node a loop or by separate ones."""
    results, read = [], shared(grouped(kind, weights)) if one_node else None
    for _ in range(2):
        if read is not None and kind == "heads":
            *outputs, x = normed_heads(x, delta, EPS, *read, HEADS)
        elif read is not None:
            *outputs, x = normed_swiglu(x, delta, EPS, *read)
        else:
            norm_weight, *matrices = weights
            y, x = plain_norm(x, delta, norm_weight)
            if kind == "heads":
                outputs = list(F.linear(y, matrices[0]).view(*x.shape[:-1], 3, HEADS, -1).unbind(-3))
            else:
                w1, w3, w2 = matrices
                outputs = [F.linear(F.silu(F.linear(y, w1)) * F.linear(y, w3), w2)]
        delta = sum(output.flatten(2) for output in outputs)
        results += [*outputs, x]
    return results


def plain_norm(x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x if delta is None else (x + delta).to(x.dtype)
    y = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (D,), eps=EPS)
    return (y * weight).to(weight.dtype), x


def weights_of(kind: str) -> list[Tensor]:
    shapes = [(3 * D, D)] if kind == "heads" else [(D_FF, D), (D_FF, D), (D, D_FF)]
    return [1 + torch.rand(D), *(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes)]


@pytest.mark.parametrize("kind", ["heads", "swiglu"])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(
    ("stream", "dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)],
)
@pytest.mark.usefixtures("poisoned")
def test_results_and_gradients(backend, device, kind, with_delta, stream, dtype):
    """Of two loops, of shapes that fit no block, with a stream as wide as the products and a wider one."""
    torch.manual_seed(0)
    x, delta = torch.randn(2, 3, 7, D).unbind()
    given = [x.to(stream), delta.to(dtype), *(weight.to(dtype) for weight in weights_of(kind))]
    upstream: list[Tensor] = []

    def run(one_node: bool, wide: torch.dtype | None) -> list[Tensor]:
        leaves = [tensor.to(device, wide or tensor.dtype).requires_grad_() for tensor in given]
        used = leaves if with_delta else [leaves[0], *leaves[2:]]
        results = two_loops(kind, leaves[0], leaves[1] if with_delta else None, leaves[2:], one_node)
        upstream.extend(torch.randn(r.shape).to(dtype) for r in results[len(upstream) :])
        dys = [g.to(r) for g, r in zip(upstream, results, strict=True)]
        return [r.detach() for r in results] + list(torch.autograd.grad(results, used, dys))

    actual, plain, truth = run(True, None), run(False, None), run(False, torch.float64)
    for number, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
        assert a.dtype == p.dtype
        assert_no_worse_than(a.cpu(), p.cpu(), t.cpu(), dtype=dtype, name=str(number))


def test_the_operations_one_by_one_give_the_same():
    """On a CPU to the bit, where every product is summed up for itself."""
    torch.manual_seed(0)
    x, delta = torch.randn(2, 2, 5, D).unbind()
    norm, qkv = weights_of("heads")
    w1, w3, w2 = weights_of("swiglu")[1:]
    y, _, total = rms_norm_penalty(delta, norm, eps=EPS, residual=x)
    read = shared([[norm], [qkv], [w1, w3], [w2]])
    *heads, h = normed_heads(x, delta, EPS, read[0], read[1], HEADS)
    assert torch.equal(torch.stack(heads, 2).flatten(2), F.linear(y, qkv))
    assert torch.equal(h, total)
    z, h = normed_swiglu(x, delta, EPS, read[0], *read[2:])
    assert torch.equal(z, F.linear(swiglu(F.linear(y, w1), F.linear(y, w3)), w2))
    assert torch.equal(h, total)
    assert torch.equal(product(x, read[1]), F.linear(x, qkv))


# The gradient of a weight ---------------------------------------------------------------------------------------------


def test_a_sum_over_loops_is_rounded_once():
    """256 + 1 + 1 is 256 in bfloat16 from left to right, and 258 in a wider sum."""
    weight = torch.zeros(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (read,) = shared([[weight]])
    assert read.read.dtype == torch.bfloat16
    scales = torch.tensor([1.0, 1.0, 256.0], dtype=torch.bfloat16)  # the backward pass begins with the last
    sum(product(scale.view(1, 1, 1), read) for scale in scales).backward()
    assert weight.grad.item() == 258


def test_a_sum_of_low_precision_is_float32_for_every_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        total = GradientSum([torch.zeros(3, 2, dtype=dtype)])
        total.add_product(torch.full((5, 3), 100.0, dtype=dtype), torch.full((5, 2), 100.0, dtype=dtype))
        assert total.total.dtype == torch.float32
        total.add_product(torch.ones((1, 3), dtype=dtype), torch.ones((1, 2), dtype=dtype))
        (taken,) = total.taken()
        assert taken.dtype == dtype
        assert total.taken() == [None]
        assert torch.equal(taken, torch.full((3, 2), 50_001.0).to(dtype))


@pytest.mark.parametrize("frozen", ["w1", "w1 and w3", "w2", "norm", "all", "all but the stream"])
def test_gradients_that_nobody_needs_are_not_formed(frozen):
    torch.manual_seed(0)
    names = ["norm", "w1", "w3", "w2"]
    weights = weights_of("swiglu")
    for name, weight in zip(names, weights, strict=True):
        weight.requires_grad_(name not in frozen and "all" not in frozen)
    x = torch.randn(2, 5, D, requires_grad=frozen != "all")
    results = normed_swiglu(x, None, EPS, *shared(grouped("swiglu", weights)))
    if frozen == "all":
        assert not any(result.requires_grad for result in results)
        return
    with Once() as calls:
        sum(result.sum() for result in results).backward()
    for name, weight in zip(names, weights, strict=True):
        assert (weight.grad is not None) == weight.requires_grad, name
    products = [name for name in calls.names if name == "mm"]
    assert len(products) == 2 + (weights[1].requires_grad or weights[2].requires_grad) + weights[3].requires_grad


def test_a_frozen_stream_and_norm_need_no_gradient_of_the_norm():
    weights = weights_of("heads")
    weights[1].requires_grad_()
    *heads, _ = normed_heads(torch.randn(2, 5, D), None, EPS, *shared(grouped("heads", weights)), HEADS)
    with Once() as calls:
        sum(head.sum() for head in heads).backward()
    assert calls.names.count("mm") == 1
    assert weights[1].grad is not None


def test_loops_that_a_loss_does_not_see_add_nothing():
    decoder = model(fused=True, n_loops=3)
    alone = gradients(decoder, decoder.unroll(tokens(), 1))
    states = decoder.unroll(tokens(), 3)
    assert gradients(decoder, states[:1]).keys() == alone.keys()
    for name, gradient in gradients(decoder, decoder.unroll(tokens(), 3)[:1]).items():
        assert torch.equal(gradient, alone[name]), name


def test_a_second_backward_pass_starts_anew():
    decoder = model(fused=True)
    loss = decoder(tokens(), tokens()).loss
    first, second = (torch.autograd.grad(loss, list(decoder.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    weight = decoder.blocks[0].mlp.w3.weight
    (alone,) = torch.autograd.grad(loss, weight)
    assert torch.equal(alone, first[[p is weight for p in decoder.parameters()].index(True)])


def test_second_derivatives_are_refused():
    decoder = model(fused=True)
    weight, state = decoder.blocks[0].attention.qkv.weight, torch.randn(2, 5, D, requires_grad=True)
    first = torch.autograd.grad(decoder.apply_loop(state, 0).square().sum(), [weight, state], create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient.square().sum(), state)


def test_a_backward_pass_under_autocast_is_the_same():
    """It would round float32 operands to bfloat16."""
    decoder = model(fused=True)
    expected = torch.autograd.grad(decoder.unroll(tokens(), 2)[-1].square().sum(), decoder.blocks[0].mlp.w1.weight)
    loss = decoder.unroll(tokens(), 2)[-1].square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, decoder.blocks[0].mlp.w1.weight)
    assert torch.equal(actual[0], expected[0])


def test_nothing_of_a_step_is_kept():
    """Without the garbage collector: a graph that held itself would hold all its activations."""
    decoder = model(fused=True)
    context = decoder.context(tokens())
    loss = decoder.apply_loop(torch.randn(2, 5, D), 0, context=context).sum()
    read = weakref.ref(context.weights[decoder.blocks[0]][1].read)
    gc.disable()
    try:
        loss.backward()
        del loss, context
        assert read() is None
    finally:
        gc.enable()


# Which blocks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch) -> list[str]:
    """The sublayers that were one node."""
    names: list[str] = []

    def note(function):
        def noted(*arguments):
            names.append(function.__name__)
            return function(*arguments)

        return noted

    monkeypatch.setattr(block, "normed_swiglu", note(normed_swiglu))
    return names


class LowRank(nn.Module):
    """What a library that adapts models puts in a linear layer's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.linear(x)


def doubled(decoder: nn.Module, how: str) -> None:
    """The first layer's w2 gives twice what it gave, by a way that is not its weight."""
    mlp = decoder.blocks[0].mlp
    if how == "hook":
        mlp.w2.register_forward_hook(lambda module, given, output: 2 * output)
    elif how == "hook before":
        mlp.w2.register_forward_pre_hook(lambda module, given: 2 * given[0])
    elif how == "another class":
        mlp.w2 = LowRank(mlp.w2)
    elif how == "parametrised":
        nn.utils.parametrize.register_parametrization(mlp.w2, "weight", Twice())


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("how", ["hook", "hook before", "another class", "parametrised"])
def test_a_layer_that_does_more_does_it(joined, how):
    decoder, expected = model(fused=True), model(fused=True)
    expected.blocks[0].mlp.w2.weight.data.mul_(2)
    doubled(decoder, how)
    torch.testing.assert_close(decoder.unroll(tokens(), 2), expected.unroll(tokens(), 2))
    assert len(joined) == 2 + 4  # the second layer alone, and both


def test_a_bias_is_added(joined):
    decoder = model(fused=True)
    decoder.blocks[1].mlp.w2.bias = nn.Parameter(torch.ones(D))
    plain = model(fused=False)
    plain.blocks[1].mlp.w2.bias = nn.Parameter(torch.ones(D))
    torch.testing.assert_close(decoder.unroll(tokens(), 2), plain.unroll(tokens(), 2))
    assert len(joined) == 2


@pytest.mark.parametrize("without", ["fused", "gradient"])
def test_separate_operations(joined, without):
    decoder = model(fused=without != "fused")
    with torch.set_grad_enabled(without != "gradient"):
        decoder.unroll(tokens(), 2)
    assert joined == []
