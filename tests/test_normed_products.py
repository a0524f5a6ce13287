"""A norm and the products that read it as one node, and the gradients of the weights that all loops share."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse_than
from tiny_decoder import gradients, model, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from looped.kernels import rms_norm_penalty, swiglu
from looped.normed_products import AttentionWeights, SwiGLUWeights, normed_heads, normed_swiglu, product
from looped.shared_weight import ProductSum, shared

EPS = 1e-6
D, D_FF, HEADS = 24, 40, 3


class Calls(TorchDispatchMode):
    """Counts the calls of ATen's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def read(kind: str, weights: list[Tensor]) -> Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]:
    """The node of a kind, with weights as all loops read them: w1 and w3 together, and of "output" Wo behind them."""
    norm, *matrices = weights
    if kind == "heads":
        (norm,), products = shared([norm], [matrices])
        attention = AttentionWeights(norm, *products, None)
        return lambda x, delta: normed_heads(x, delta, attention, EPS, HEADS)
    w1, w3, w2, *output = matrices
    (norm,), (w13, w2, *output) = shared([norm], [[w1, w3], [w2], *([wo] for wo in output)])
    return lambda x, delta: normed_swiglu(x, delta, SwiGLUWeights(norm, w13, w2), EPS, *output)


def two_loops(kind: str, x: Tensor, delta: Tensor | None, weights: list[Tensor], one_node: bool) -> list[Tensor]:
    """A sublayer applied twice to its own stream: its results in both loops, by one node a loop or by separate ones."""
    results, node = [], read(kind, weights) if one_node else None
    for _ in range(2):
        if node is not None:
            *outputs, x = node(x, delta)
        else:
            norm_weight, *matrices = weights
            y, x = plain_norm(x, F.linear(delta, matrices.pop()) if kind == "output" else delta, norm_weight)
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
    of_swiglu = [(D_FF, D), (D_FF, D), (D, D_FF)]
    shapes = {"heads": [(3 * D, D)], "swiglu": of_swiglu, "output": [*of_swiglu, (D, D)]}[kind]
    return [1 + torch.rand(D), *(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes)]


@pytest.mark.parametrize(
    ("kind", "with_delta"),
    [("heads", False), ("heads", True), ("swiglu", False), ("swiglu", True), ("output", True)],
)
@pytest.mark.parametrize(
    ("stream", "dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)],
)
@pytest.mark.usefixtures("poisoned")
def test_results_and_gradients(backend, device, kind, with_delta, stream, dtype):
    """Of two loops, of shapes that fit no block, with a stream as wide as the products and a wider one, not in the
    order of memory."""
    torch.manual_seed(0)
    x, delta = (torch.randn(7, 3, D).transpose(0, 1) for _ in range(2))
    given = [x.to(stream), delta.to(dtype), *(weight.to(dtype) for weight in weights_of(kind))]
    upstream: list[Tensor] = []

    def run(one_node: bool, wide: torch.dtype | None) -> list[Tensor]:
        leaves = [tensor.to(device, wide or tensor.dtype).requires_grad_() for tensor in given]
        used = leaves if with_delta else [leaves[0], *leaves[2:]]
        results = two_loops(kind, leaves[0], leaves[1] if with_delta else None, leaves[2:], one_node)
        upstream.extend(torch.randn(*r.mT.shape).mT.to(dtype) for r in results[len(upstream) :])
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
    w1, w3, w2, wo = weights_of("output")[1:]
    y, _, total = rms_norm_penalty(delta, norm, eps=EPS, residual=x)
    *heads, h = read("heads", [norm, qkv])(x, delta)
    assert torch.equal(torch.stack(heads, 2).flatten(2), F.linear(y, qkv))
    assert torch.equal(h, total)
    z, h = read("swiglu", [norm, w1, w3, w2])(x, delta)
    assert torch.equal(z, F.linear(swiglu(F.linear(y, w1), F.linear(y, w3)), w2))
    assert torch.equal(h, total)
    attended = product(delta, shared([], [[wo]])[1][0])
    assert torch.equal(attended, F.linear(delta, wo))
    joined, apart = read("output", [norm, w1, w3, w2, wo])(x, delta), read("swiglu", [norm, w1, w3, w2])(x, attended)
    assert all(torch.equal(a, b) for a, b in zip(joined, apart, strict=True))


def test_what_is_saved_may_come_back_as_a_copy(backend, device):
    """Not in the same layout, as from a CPU that activations were moved to."""
    torch.manual_seed(0)
    x, mixed = torch.randn(2, 5, 2, D).transpose(1, 2).unbind()
    leaves = [tensor.to(device).requires_grad_() for tensor in (x, mixed, *weights_of("output"))]
    found = []
    for pack in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            results = read("output", leaves[2:])(*leaves[:2])
        found.append(torch.autograd.grad(sum(result.square().sum() for result in results), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# The gradient of a weight ---------------------------------------------------------------------------------------------


def test_a_sum_over_loops_is_rounded_once():
    """2048 + 1 + 1 is 2048 in float16 from left to right, and 2050 in a wider sum."""
    weight = torch.zeros(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        (shared_weight,) = shared([], [[weight]])[1]
    assert shared_weight.read.dtype == torch.float16
    scales = torch.tensor([1.0, 1.0, 2048.0], dtype=torch.float16)  # the backward pass begins with the last
    sum(product(scale.view(1, 1, 1), shared_weight) for scale in scales).backward()
    assert weight.grad.item() == 2050


@pytest.mark.parametrize(
    ("dtype", "summed_in"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
)
def test_sums_on_a_cpu(dtype, summed_in):
    """No product of bfloat16 gives float32 there; one of float16 is formed in float32."""
    weights = [torch.zeros(1, 2, dtype=dtype), torch.zeros(2, 2, dtype=dtype)]
    total = ProductSum(weights)
    for _ in range(2):  # what is taken is gone
        total.add(torch.full((5, 3), 100.0, dtype=dtype), torch.full((5, 2), 100.0, dtype=dtype))
        total.add(torch.ones((1, 3), dtype=dtype), torch.ones((1, 2), dtype=dtype))
        assert [each.dtype for each in total.totals.values()] == [summed_in]
        for gradient, weight in zip(total.taken(), weights, strict=True):
            assert gradient.dtype == dtype
            assert torch.equal(gradient, torch.full(weight.shape, 50_001.0).to(dtype))
    assert total.taken() == [None, None]


FROZEN = ["w1", "w1 and w3", "w2", "norm", "wo", "mixed", "mixed and wo", "all", "all but x", "all but wo"]


@pytest.mark.parametrize("frozen", FROZEN)
def test_gradients_that_nobody_needs_are_not_formed(frozen):
    torch.manual_seed(0)
    x, mixed = torch.randn(2, 2, 5, D).unbind()
    weights = weights_of("output")
    tensors = dict(zip(["x", "mixed", "norm", "w1", "w3", "w2", "wo"], [x, mixed, *weights], strict=True))
    for name, tensor in tensors.items():
        of_all = name == frozen.removeprefix("all but ")
        tensor.requires_grad_(of_all if frozen.startswith("all") else name not in frozen.split(" and "))
    results = read("output", weights)(x, mixed)
    if frozen == "all":
        assert not any(result.requires_grad for result in results)
        return
    with Calls() as calls:
        sum(result.sum() for result in results).backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == tensor.requires_grad, name
    formed = [weights[1].requires_grad or weights[2].requires_grad, *(each.requires_grad for each in weights[3:])]
    assert calls.names.count("mm") == 2 + sum(formed) + mixed.requires_grad


def test_a_frozen_stream_and_norm_need_no_gradient_of_the_norm():
    weights = weights_of("heads")
    weights[1].requires_grad_()
    *heads, _ = read("heads", weights)(torch.randn(2, 5, D), None)
    with Calls() as calls:
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


def fail(_: Tensor) -> None:
    raise ArithmeticError


def of_a_state(decoder: nn.Module, loss: Tensor, state: Tensor) -> None:
    torch.autograd.grad(loss, state, retain_graph=True)


def of_a_weight(decoder: nn.Module, loss: Tensor, state: Tensor) -> None:
    torch.autograd.grad(loss, decoder.blocks[0].mlp.w3.weight, retain_graph=True)


def of_the_embedding(decoder: nn.Module, loss: Tensor, state: Tensor) -> None:
    loss.backward(inputs=[decoder.embedding.weight], retain_graph=True)


def of_everything(decoder: nn.Module, loss: Tensor, state: Tensor) -> None:
    torch.autograd.grad(loss, list(decoder.parameters()), retain_graph=True)


def failing(decoder: nn.Module, loss: Tensor, state: Tensor) -> None:
    hook = state.register_hook(fail)
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    hook.remove()
    decoder.zero_grad()


@pytest.mark.parametrize("before", [of_a_state, of_a_weight, of_the_embedding, of_everything, failing])
@pytest.mark.parametrize("checkpoint_loops", [False, True])
def test_a_backward_pass_knows_nothing_of_those_before(before, checkpoint_loops):
    decoder = model(fused=True)
    expected = torch.autograd.grad(decoder(tokens(), tokens()).loss, list(decoder.parameters()))
    decoder.checkpoint_loops = checkpoint_loops
    output = decoder(tokens(), tokens())
    before(decoder, output.loss, output.states[0])
    actual = torch.autograd.grad(output.loss, list(decoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_gradient_of_states_forms_none_of_weights():
    decoder = model(fused=True, n_loops=1)
    state = torch.randn(2, 5, D, requires_grad=True)
    loss = decoder.apply_loop(state, 0).sum()
    with Calls() as calls:
        torch.autograd.grad(loss, state)
    assert calls.names.count("mm") == 4 * len(decoder.blocks)


def test_second_derivatives_are_refused():
    decoder = model(fused=True)
    loss = decoder.apply_loop(torch.randn(2, 5, D, requires_grad=True), 0).square().sum()
    with pytest.raises(RuntimeError, match=r"create_graph must be False\. Got True"):
        torch.autograd.grad(loss, decoder.blocks[0].mlp.w1.weight, create_graph=True)


def test_compiled_autograd_is_refused_without_a_compiled_forward_pass():
    """It adds up the gradients of all uses of a weight, and the loops' nodes give none: they sum it themselves."""
    from torch._dynamo.compiled_autograd import _enable

    loss = model(fused=True)(tokens(), tokens()).loss
    with _enable(torch.compile(backend="eager")), pytest.raises(RuntimeError, match="must be compiled, too"):
        loss.backward()


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
    qkv = weakref.ref(context.weights[decoder.blocks[0]][0].qkv.read)
    gc.disable()
    try:
        loss.backward()
        del loss, context
        assert qkv() is None
    finally:
        gc.enable()
