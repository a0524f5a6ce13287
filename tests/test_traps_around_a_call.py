"""What surrounds a call: autograd, autocast, torch.compile, sharded parameters, memory, what nobody asked for."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from numerics import assert_no_worse_than
from ranks import run_ranks
from readout_case import Case
from torch.utils.flop_counter import FlopCounterMode

from looped.kernels import looped_cross_entropy, radial_gradient, rms_norm_penalty, swiglu
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("poisoned")


OPERATIONS = {
    "norm": lambda h, g: rms_norm_penalty(h, g[0]).y,
    "swiglu": swiglu,
    "radial": lambda h, g: radial_gradient(h, g).dot,
    "readout": lambda h, g: looped_cross_entropy([h, h], g, torch.arange(3)).loss,
    "losses": lambda h, g: looped_cross_entropy([h, h], g, torch.arange(3), reduction="none").loss,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dispatched", [False, True])
def test_second_derivatives_are_refused(operation, dispatched):
    """A first derivative that is a constant to the second would leave out a part of it."""
    h, g = torch.randn(2, 3, 8, requires_grad=True).unbind()
    with FlopCounterMode(display=False) if dispatched else nullcontext():
        result = OPERATIONS[operation](h, g).sum()
        with pytest.raises(RuntimeError, match=r"create_graph must be False\. Got True"):
            torch.autograd.grad(result, g, create_graph=True)


def test_trap_autocast(backend, device):
    """float32 states and head under autocast: products in bfloat16, sums and the head's gradient in float32."""
    case = Case((2, 33, 32, 65), device, penalty=0.01)
    low = {}
    for name, function in (("fused", looped_cross_entropy), ("plain", looped_cross_entropy_reference)):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            low[name], _ = case.run(function)
    truth, _ = case.run(looped_cross_entropy_reference, torch.float64)
    for name, value in truth.items():
        assert low["fused"][name].dtype == torch.float32, name
        assert_no_worse_than(low["fused"][name], low["plain"][name], value, name=name)


def test_trap_recompiles_for_every_length():
    counter = torch._dynamo.testing.CompileCounter()
    head = torch.randn(31, 16, requires_grad=True)
    compiled = torch.compile(
        lambda s, t: looped_cross_entropy(s, head, t).loss, backend=counter, fullgraph=True, dynamic=True
    )
    for n in (5, 9, 12, 31):
        compiled(torch.randn(2, n, 16, requires_grad=True), torch.randint(31, (n,)))
    assert counter.frame_count == 1


def _sharded_rank(rank: int) -> None:
    """One of two ranks: half of the tokens, a sharded head and norm, against the whole batch on one process."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    case = Case((2, 6, 16, 32))
    expected, _ = case.run(looped_cross_entropy)
    mesh = init_device_mesh("cpu", (2,))
    head, weight = (
        distribute_tensor(case.tensors[name].clone(), mesh, [Shard(0)]).requires_grad_()
        for name in ("head", "norm_weight")
    )
    mine = slice(3 * rank, 3 * rank + 3)
    states = case.tensors["states"][:, mine].clone().requires_grad_()
    looped_cross_entropy(states, head, case.targets[mine], norm_weight=weight).loss.backward()
    for name, parameter in (("head", head), ("norm_weight", weight)):
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(states.grad / 2, expected["states"][:, mine], rtol=1e-4, atol=1e-6)


def test_trap_sharded_head(tmp_path):
    """FSDP2's parameters outside their module's forward: gathered, their gradients averaged over the ranks."""
    run_ranks(_sharded_rank, tmp_path)


def peak_bytes(n_loops: int, n_tokens: int = 512, d: int = 16, vocabulary: int = 4000) -> int:
    """Peak of live CPU memory allocated during forward and backward, less the states' gradients."""
    states = torch.randn(n_loops, n_tokens, d, requires_grad=True)
    head, targets = torch.randn(vocabulary, d, requires_grad=True), torch.randint(vocabulary, (n_tokens,))
    looped_cross_entropy(states, head, targets, chunk_rows=64).loss.backward()
    states.grad = head.grad = None
    with torch.profiler.profile(profile_memory=True) as profiler:
        looped_cross_entropy(states, head, targets, chunk_rows=64).loss.backward()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def test_trap_memory_does_not_grow_with_the_loops():
    """One logits chunk, one dW; only the states' gradients and the rows' losses grow with K."""
    n_tokens, d, vocabulary = 512, 16, 4000
    peaks = {k: peak_bytes(k) for k in (1, 4, 8)}
    chunk, head = 64 * vocabulary * 4, vocabulary * d * 4
    for k, peak in peaks.items():
        growing = k * n_tokens * (2 * d + 6) * 4  # the states' gradients twice (saved, scaled) and row results
        assert chunk < peak <= chunk + head + growing + (1 << 16), (k, peak)
        assert peak - peaks[1] <= growing, (k, peak)


@pytest.mark.parametrize("shape", [(2, 0, 16, 31), (1, 0, 8, 3)])
def test_trap_empty_batch(backend, device, shape):
    actual, result = Case(shape, device, penalty=0.1).run(looped_cross_entropy, statistics=True)
    assert result.loss == 0
    assert actual["head"].eq(0).all()
    assert actual["states"].shape == shape[:3]
    assert result.statistics.loss.shape == shape[:2]


@pytest.mark.parametrize("target", [-1, 31, 10**9])
def test_trap_target_out_of_range(backend, device, target):
    if device.type == "cuda":
        pytest.skip("an assertion on the device ends the process's use of it")
    case = Case((2, 5, 24, 31), device)
    case.targets[3] = target
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 31\) or ignore_index=-100. Got {target}"):
        case.run(looped_cross_entropy)


def test_trap_unread_loops_cost_nothing(monkeypatch):
    """Terminal supervision of four loops makes the products of one."""
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a[0].shape) or mm(*a, **k))
    case = Case((4, 8, 16, 31), weights=[0, 0, 0, 1.0])
    _, result = case.run(looped_cross_entropy)
    assert products == [(8, 16), (31, 8), (8, 31)]  # logits, dW, dy
    assert result.per_loop[:3].isnan().all()


def test_trap_gradients_nobody_needs_are_not_computed(monkeypatch):
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a[0].shape) or mm(*a, **k))
    case = Case((2, 8, 16, 31))
    case.run(looped_cross_entropy, frozen=("states", "norm_weight"))
    assert products == [(16, 16), (31, 16)]  # logits, dW
    products.clear()
    with torch.no_grad():
        looped_cross_entropy(case.tensors["states"].requires_grad_(), case.tensors["head"], case.targets)
    assert products == [(16, 16)]


def test_deterministic(backend, device):
    case = Case((3, 40, 32, 65), device, torch.bfloat16, penalty=0.1)
    first, _ = case.run(looped_cross_entropy, chunk_rows=16)
    for _ in range(3):
        again, _ = case.run(looped_cross_entropy, chunk_rows=16)
        assert all(torch.equal(first[name], again[name]) for name in first)
