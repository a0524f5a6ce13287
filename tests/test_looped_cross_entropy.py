import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_no_worse_than

from kernels import looped_cross_entropy, readout_statistics
from kernels.looped_cross_entropy import looped_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
READOUTS = ["rmsnorm", "layernorm", "raw", "final-only"]
SHAPES = [(1, 1, 16, 3), (3, 7, 48, 101), (4, 33, 64, 257), (2, 129, 96, 1000), (2, 5, 40, 1), (1, 3, 8, 40000)]


class Case:
    """Inputs of one call; `to(dtype)` gives the same numbers in another dtype."""

    def __init__(self, shape, device="cpu", dtype=torch.float32, readout="rmsnorm", seed=0, ignored=0, **options):
        n_loops, n_tokens, d, vocabulary = shape
        generator = torch.Generator().manual_seed(seed)

        def random(*size):
            return torch.randn(size, generator=generator).to(device, dtype)

        self.tensors = {"states": random(n_loops, n_tokens, d) * 3, "head": random(vocabulary, d) * (2 / d**0.5)}
        if readout != "raw":
            self.tensors["norm_weight"] = random(d) + 1
        if readout == "layernorm":
            self.tensors["norm_bias"] = random(d)
        if options.pop("bias", False):
            self.tensors["bias"] = random(vocabulary)
        weights = options.pop("weights", None)
        if weights == "token":
            self.tensors["weights"] = random(n_loops, n_tokens).float().abs()
        elif weights == "loop":
            self.tensors["weights"] = random(n_loops).float().abs()
        elif weights is not None:
            options["weights"] = weights
        self.targets = torch.randint(vocabulary, (n_tokens,), generator=generator).to(device)
        self.targets[:ignored] = -100
        self.options = {"readout": readout, **options}

    def run(self, function, dtype=None, *, sequence=False, upstream=1.0, frozen=(), **more):
        """loss, per_loop and the gradients of every tensor that is not frozen, with the whole result last."""
        tensors = {k: v.detach().to(dtype or v.dtype).requires_grad_(k not in frozen) for k, v in self.tensors.items()}
        arguments = dict(tensors)
        states = arguments.pop("states")
        states = list(states.unbind(0)) if sequence else states
        result = function(states, arguments.pop("head"), self.targets, **arguments, **self.options, **more)
        loss, per_loop = result[:2]
        if not isinstance(upstream, torch.Tensor):
            upstream = torch.full_like(loss, upstream)
        inputs = [t for k, t in tensors.items() if k not in frozen]
        gradients = torch.autograd.grad(loss, inputs, upstream.to(loss), allow_unused=True)
        names = [k for k in tensors if k not in frozen]
        return {"loss": loss, "per_loop": per_loop, **dict(zip(names, gradients, strict=True))}, result

    def check(self, *, sequence=False, upstream=1.0, frozen=(), factor=2.0, **more):
        """The op against plain PyTorch in the same dtype, truth being float64."""
        actual, result = self.run(looped_cross_entropy, sequence=sequence, upstream=upstream, frozen=frozen, **more)
        plain, _ = self.run(looped_cross_entropy_reference, upstream=upstream, frozen=frozen)
        truth, _ = self.run(looped_cross_entropy_reference, torch.float64, upstream=upstream, frozen=frozen)
        read = ~actual["per_loop"].isnan()
        for values in (actual, plain, truth):
            values["per_loop"] = values["per_loop"][read]
        for name, value in truth.items():
            if value is None or actual[name] is None:
                assert value is None or value.abs().max() == 0, name
                assert actual[name] is None or actual[name].abs().max() == 0, name
                continue
            assert actual[name].dtype == plain[name].dtype, name
            assert_no_worse_than(
                actual[name], plain[name], value, dtype=self.tensors["states"].dtype, factor=factor, name=name
            )
        return result


# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_looped_cross_entropy(backend, device, shape, dtype):
    if backend == "triton" and shape[-1] > 1000 and dtype != torch.float32:
        pytest.skip("one dtype of the two-pass kernel is enough in the interpreter")
    result = Case(shape, device, dtype, penalty=0.01).check(chunk_rows=50)
    assert result.loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("readout", READOUTS)
def test_readouts(backend, device, readout, dtype):
    Case((3, 21, 48, 101), device, dtype, readout, penalty=0.1, bias=True).check(chunk_rows=16)


@pytest.mark.parametrize("weights", ["token", "loop", [0.2, 0.0, 0.8], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_reductions(backend, device, weights, reduction):
    penalty = 0.0 if reduction == "none" else 0.05
    case = Case((3, 9, 32, 65), device, weights=weights, reduction=reduction, penalty=penalty, ignored=2)
    upstream = torch.randn(3, 9, device=device) if reduction == "none" else 3.0
    case.check(upstream=upstream, chunk_rows=7)


@pytest.mark.parametrize(
    "options",
    [
        dict(label_smoothing=0.1),
        dict(softcap=5.0),
        dict(z_loss=0.01),
        dict(label_smoothing=1.0, z_loss=0.1, softcap=2.0),
    ],
)
@pytest.mark.parametrize("vocabulary", [65, 33000])
def test_loss_options(backend, device, options, vocabulary):
    Case((2, 5, 32, vocabulary), device, bias=True, **options).check()


shapes = st.tuples(st.integers(1, 4), st.integers(4, 40), st.integers(8, 70), st.integers(8, 300))
options = st.fixed_dictionaries(
    {
        "readout": st.sampled_from(READOUTS),
        "dtype": st.sampled_from(DTYPES),
        "reduction": st.sampled_from(["mean", "sum"]),
        "penalty": st.sampled_from([0.0, 0.01]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "softcap": st.sampled_from([None, 10.0]),
        "z_loss": st.sampled_from([0.0, 0.001]),
        "weights": st.sampled_from([None, "token", "loop"]),
        "bias": st.booleans(),
        "ignored": st.integers(0, 3),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape=shapes, options=options, chunk_rows=st.integers(1, 64), sequence=st.booleans())
def test_any_shape_and_options(backend, device, shape, options, chunk_rows, sequence):
    # among many drawn cases some round worse than typical: twice the usual factor
    Case(shape, device, **options).check(chunk_rows=chunk_rows, sequence=sequence, factor=4.0)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 6, 14, 1000])
def test_chunks_and_state_layouts_do_not_change_the_result(backend, device, sequence, chunk_rows):
    Case((3, 7, 16, 33), device, penalty=0.1, readout="final-only").check(sequence=sequence, chunk_rows=chunk_rows)


def test_statistics(backend, device):
    """Every field against its definition, and the loss unchanged by asking for them."""
    case = Case((3, 7, 32, 51), device, ignored=1, weights=[0.5, 0.0, 0.5], bias=True)
    actual, result = case.run(looped_cross_entropy, statistics=True)
    without, _ = case.run(looped_cross_entropy)
    assert torch.equal(actual["loss"], without["loss"])
    assert torch.equal(actual["states"], without["states"])
    seen = result.statistics
    h, head = case.tensors["states"].double(), case.tensors["head"].double()
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * case.tensors["norm_weight"]
    z = y @ head.t() + case.tensors["bias"]
    log_p = z.log_softmax(-1)
    ce = -log_p.gather(-1, case.targets.clamp(min=0).expand(3, -1).unsqueeze(-1)).squeeze(-1)
    ce[:, 0] = 0  # ignored
    top = z.topk(2).values
    grad = actual["states"].double()
    expected = {
        "loss": ce,
        "lse": z.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "margin": top[..., 0] - top[..., 1],
        "mean_square": h.square().mean(-1),
        "radial_dot": (grad * h).sum(-1),
    }
    for name, value in expected.items():
        field = getattr(seen, name)
        assert field.dtype == torch.float32, name
        assert field[1].isnan().all(), name
        torch.testing.assert_close(field[[0, 2]], value[[0, 2]].float(), rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(seen.top1[[0, 2]], z.argmax(-1)[[0, 2]])
    assert seen.top1[1].eq(-1).all()
    assert seen.radial_fraction[0, 0] == 0  # an ignored token has no gradient
    assert seen.radial_fraction[[0, 2]].max() < 1e-4  # RMSNorm hides the scale
    assert not any(field.requires_grad for field in seen)


def test_statistics_radial_fraction_of_a_raw_readout(backend, device):
    case = Case((2, 6, 32, 51), device, readout="raw", weights="loop")
    actual, result = case.run(looped_cross_entropy, statistics=True)
    h, grad = case.tensors["states"], actual["states"]
    expected = (grad * h).sum(-1).abs() / (grad.norm(dim=-1) * h.norm(dim=-1))
    torch.testing.assert_close(result.statistics.radial_fraction, expected, rtol=1e-4, atol=1e-6)
    _, result = case.run(looped_cross_entropy, statistics=True, frozen=("states",))
    assert result.statistics.radial_dot is None


def test_a_step_of_adaptive_supervision_through_per_token_weights(backend, device):
    """dL/dw[k, t] = CE[k, t] / n, so an exit gate's distribution over loops can be trained."""
    case = Case((3, 5, 16, 21), device, weights="token")
    actual, result = case.run(looped_cross_entropy, statistics=True)
    torch.testing.assert_close(actual["weights"], result.statistics.loss / 5)


# The traps ------------------------------------------------------------------------------------------------------------


def test_trap_bfloat16_loss_accumulation():
    """torch 2.13's chunked linear cross-entropy returns 10.44 in bfloat16 where the truth is 10.92."""
    torch.manual_seed(0)
    states = torch.randn(1, 4096, 64).bfloat16()
    head, targets = (torch.randn(20_000, 64) * 0.18).bfloat16(), torch.randint(20_000, (4096,))
    truth = torch.nn.functional.cross_entropy(states[0].float() @ head.float().t(), targets)
    loss = looped_cross_entropy(states, head, targets, readout="raw").loss
    assert abs(loss - truth) < 1e-3


def test_trap_bfloat16_head_gradient_over_many_chunks(backend, device):
    Case((2, 100, 32, 65), device, torch.bfloat16).check(chunk_rows=4)


def test_trap_reduction_none_with_any_upstream_gradient(backend, device):
    upstream = torch.randn(2, 9, device=device) * torch.logspace(-3, 3, 9, device=device)
    Case((2, 9, 24, 31), device, torch.float32, reduction="none", bias=True).check(upstream=upstream)


def test_trap_ignored_rows_are_written(backend, device):
    """Poisoned buffers: an early return would leave nan behind."""
    _, result = Case((2, 9, 24, 31), device, ignored=5).run(looped_cross_entropy, statistics=True)
    assert result.statistics.loss[:, :5].eq(0).all()
    assert result.statistics.lse.isfinite().all()
    Case((2, 9, 24, 31), device, ignored=5).check()


def test_trap_all_ignored(backend, device):
    actual, result = Case((2, 4, 24, 31), device, ignored=4, bias=True).run(looped_cross_entropy)
    assert result.loss == 0
    assert result.per_loop.eq(0).all()
    for name in ("states", "head", "norm_weight", "bias"):
        assert actual[name].eq(0).all(), name


def test_trap_second_backward_with_another_gradient(backend, device):
    case = Case((2, 5, 24, 31), device)
    states, head = (case.tensors[k].clone().requires_grad_() for k in ("states", "head"))
    loss = looped_cross_entropy(states, head, case.targets).loss
    first = torch.autograd.grad(loss, [states, head], torch.tensor(3.0, device=device), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [states, head], torch.tensor(0.5, device=device))
    for a, b, k in zip(first, second, kept, strict=True):
        torch.testing.assert_close(b * 6, a)
        assert torch.equal(a, k)


@pytest.mark.parametrize(
    "frozen", [("states",), ("head",), ("norm_weight",), ("states", "norm_weight", "bias"), ("states", "head", "bias")]
)
def test_trap_frozen_inputs(backend, device, frozen):
    Case((2, 5, 24, 31), device, penalty=0.1, bias=True).check(frozen=frozen)


def test_trap_some_states_detached(backend, device):
    case = Case((3, 5, 24, 31), device)
    states = [s.clone().requires_grad_(k != 1) for k, s in enumerate(case.tensors["states"])]
    looped_cross_entropy(
        states, case.tensors["head"], case.targets, norm_weight=case.tensors["norm_weight"]
    ).loss.backward()
    expected, _ = case.run(looped_cross_entropy)
    assert states[1].grad is None
    for k in (0, 2):
        torch.testing.assert_close(states[k].grad, expected["states"][k])


def test_trap_noncontiguous_and_expanded_inputs(backend, device):
    torch.manual_seed(0)
    head, targets = torch.randn(31, 16, device=device), torch.randint(31, (4, 6), device=device)
    base = torch.randn(2, 6, 4, 32, device=device)
    for states in (
        base.transpose(1, 2)[..., ::2],
        base.transpose(1, 2)[..., :16],
        base[:1, :4].transpose(1, 2).expand(3, 4, 4, 32)[:, :, :1, 16:].expand(3, 4, 6, 16),
    ):
        for some_head in (head, head.t().contiguous().t(), head[:1].expand(31, 16)):
            result = looped_cross_entropy(states, some_head, targets, chunk_rows=10)
            expected, _ = looped_cross_entropy_reference(states.contiguous(), some_head.contiguous(), targets)
            torch.testing.assert_close(result.loss, expected)
    leaf = torch.randn(2, 4, 6, 16, device=device, requires_grad=True)
    view = leaf.transpose(1, 2)
    looped_cross_entropy(view, head, targets.t()).loss.backward()
    expected = torch.autograd.grad(looped_cross_entropy_reference(view, head, targets.t())[0], leaf)[0]
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trap_loss_scaling(device, backend, dtype):
    """A loss scale reaches float16 gradients that would be subnormal without it."""
    case = Case((2, 300, 16, 31), device, dtype, reduction="sum", weights=[2e-6, 2e-6])
    scale = 2.0**19
    scaled, _ = case.run(looped_cross_entropy, upstream=scale)
    truth, _ = case.run(looped_cross_entropy_reference, torch.float64, upstream=scale)
    plain, _ = case.run(looped_cross_entropy_reference, upstream=scale)
    for name in ("states", "head", "norm_weight"):
        assert_no_worse_than(scaled[name], plain[name], truth[name], name=name)


def test_trap_float16_sums_over_many_tokens_do_not_overflow(backend, device):
    """The head's gradient is a mean, of order one, whatever the sum over tokens is before it is divided."""
    states = torch.full((1, 3000, 16), 60.0, device=device).half().requires_grad_()
    head, targets = torch.zeros(3, 16, device=device).half().requires_grad_(), torch.zeros(3000, dtype=torch.int64)
    looped_cross_entropy(states, head, targets.to(device), readout="raw").loss.backward()
    torch.testing.assert_close(head.grad[0].float(), torch.full((16,), -40.0, device=device))


def test_trap_common_logit_offset(backend, device):
    """Logits of 1e4 and a little, exact in float32: the loss keeps the precision of the differences."""
    head = torch.eye(31, device=device)
    states = 1e4 + torch.randint(-64, 64, (2, 9, 31), device=device) / 64
    targets = torch.randint(31, (9,), device=device)
    truth = looped_cross_entropy_reference(states.double(), head.double(), targets, readout="raw", label_smoothing=0.1)
    result = looped_cross_entropy(states, head, targets, readout="raw", label_smoothing=0.1)
    torch.testing.assert_close(result.loss.double(), truth[0], rtol=1e-6, atol=0)
    losses = readout_statistics(states, head, targets, readout="raw").loss
    truth = looped_cross_entropy_reference(states.double(), head.double(), targets, readout="raw", reduction="none")
    torch.testing.assert_close(losses.double(), truth[0] * 2, rtol=2e-6, atol=0)


def test_trap_masked_vocabulary(backend, device):
    """A bias of -inf takes words out of the vocabulary: everything else stays finite."""
    case = Case((2, 9, 24, 31), device)
    bias = torch.zeros(31, device=device)
    bias[[3, 30]] = -torch.inf
    case.targets[case.targets == 3] = case.targets[case.targets == 30] = 5
    _, result = case.run(looped_cross_entropy, bias=bias, statistics=True)
    keep = [word for word in range(31) if word not in (3, 30)]
    case.tensors["head"] = case.tensors["head"][keep]
    case.targets = torch.tensor([keep.index(word) for word in case.targets.tolist()], device=device)
    expected, small = case.run(looped_cross_entropy, statistics=True)
    torch.testing.assert_close(result.loss, expected["loss"])
    torch.testing.assert_close(result.statistics.entropy, small.statistics.entropy, rtol=1e-4, atol=1e-5)


def test_trap_an_infinite_upstream_gradient_stays_in_its_row(backend, device):
    case = Case((1, 6, 24, 31), device, reduction="none")
    upstream = torch.ones(1, 6, device=device)
    expected, _ = case.run(looped_cross_entropy, upstream=upstream)
    upstream[0, 2] = torch.inf
    actual, _ = case.run(looped_cross_entropy, upstream=upstream)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(actual["states"][:, others], expected["states"][:, others])


def test_trap_states_of_the_autocast_dtype(backend, device):
    """A model whose last operation autocasts gives bfloat16 states beside a float32 head."""
    case = Case((2, 9, 24, 31), device)
    states = case.tensors["states"].bfloat16().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = looped_cross_entropy(states, case.tensors["head"].requires_grad_(), case.targets).loss
        assert readout_statistics(states, case.tensors["head"]).lse.isfinite().all()
    expected, _ = looped_cross_entropy_reference(states.float(), case.tensors["head"], case.targets)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(loss, states)[0].dtype == torch.bfloat16


def test_second_derivatives_are_refused():
    case = Case((2, 5, 8, 11), weights="token")
    weights = case.tensors["weights"].requires_grad_()
    states = case.tensors["states"].requires_grad_()
    loss = looped_cross_entropy(states, case.tensors["head"], case.targets, weights=weights).loss
    first = torch.autograd.grad(loss, [weights, states], create_graph=True)
    assert not first[0].requires_grad
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first[1].square().sum(), states)


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


def _sharded_rank(rank: int, store: str) -> None:
    """One of two ranks: half of the tokens, a sharded head and norm, against the whole batch on one process."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
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
    dist.destroy_process_group()


def test_trap_sharded_head(tmp_path):
    """FSDP2's parameters outside their module's forward: gathered, their gradients averaged over the ranks."""
    torch.multiprocessing.spawn(_sharded_rank, args=(f"{tmp_path}/store",), nprocs=2)


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
    assert products == [(8, 16), (8, 31)]
    assert result.per_loop[:3].isnan().all()


def test_trap_gradients_nobody_needs_are_not_computed(monkeypatch):
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a[0].shape) or mm(*a, **k))
    case = Case((2, 8, 16, 31))
    case.run(looped_cross_entropy, frozen=("states", "norm_weight"))
    assert products == [(16, 16)]
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


# The op in PyTorch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("sequence", [True, False])
def test_opcheck(sequence, mean):
    states = (
        [torch.randn(5, 8, requires_grad=True) for _ in range(2)]
        if sequence
        else [torch.randn(2, 5, 8, requires_grad=True)]
    )
    head, weight = torch.randn(11, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    bias, coefficient = torch.randn(11, requires_grad=True), torch.rand(2, 5, requires_grad=True)
    needs = [mean] * 4
    needs[2] = False
    arguments = (
        states, head, torch.randint(11, (5,)), coefficient if mean else None, weight, None, bias, [0, 1],
        [mean] * len(states), needs, mean, "rmsnorm", 1e-6, 0.1 if mean else 0.0, -100, 0.0, None, 0.0, 4,
        torch.float32,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.looped.cross_entropy.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(reduction):
    case = Case((3, 7, 16, 33), weights="token", reduction=reduction)

    def function(states, head, targets, **options):
        return tuple(looped_cross_entropy(states, head, targets, statistics=True, **options)[:2])

    expected, _ = case.run(function)
    actual, _ = case.run(torch.compile(function, fullgraph=True, backend="aot_eager"))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(states=[]), ValueError, "states must be a tensor .* or a sequence of K >= 1 tensors. Got an empty"),
        (dict(states=torch.ones(0, 3, 8)), ValueError, r"states must have shape \[K, ..., d\] with K >= 1"),
        (dict(states=torch.ones(8)), ValueError, r"states must have shape \[K, ..., d\]"),
        (dict(states=[torch.ones(3, 8), torch.ones(4, 8)]), ValueError, "states must all have one shape"),
        (dict(states=torch.ones(2, 3, 8, dtype=torch.int64)), TypeError, "states must be float32"),
        (dict(head=torch.ones(5, 7)), ValueError, r"head must have shape \[V, 8\] with V >= 1. Got \(5, 7\)"),
        (dict(head=torch.ones(5, 8, dtype=torch.bfloat16)), TypeError, "head must have the states' dtype"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), ValueError, r"targets must have the tokens' shape \(3,\)"),
        (dict(targets=torch.zeros(3)), TypeError, "targets must be an int64 or int32 tensor. Got torch.float32"),
        (dict(readout="rms"), ValueError, "readout must be one of rmsnorm, .*Got 'rms'"),
        (dict(readout="raw", norm_weight=torch.ones(8)), ValueError, "norm_weight must be None for readout='raw'"),
        (dict(norm_weight=torch.ones(7)), ValueError, r"norm_weight must have shape \(8,\). Got \(7,\)"),
        (dict(norm_bias=torch.ones(8)), ValueError, "norm_bias must be None unless readout='layernorm'"),
        (dict(eps=-1.0), ValueError, "eps must be finite and >= 0"),
        (dict(penalty=-0.1), ValueError, "penalty must be finite and >= 0. Got -0.1"),
        (dict(penalty=0.1, reduction="none"), ValueError, "penalty .* must be 0 for reduction='none'"),
        (dict(weights=torch.ones(3)), ValueError, r"weights must have shape \(2,\) or \(2, 3\). Got \(3,\)"),
        (dict(weights=[1.0]), ValueError, "weights must have one number for each of the 2 loops. Got 1"),
        (dict(weights=[1.0, float("nan")]), ValueError, r"weights\[1\] must be finite. Got nan"),
        (dict(weights=0.5), TypeError, "weights must be a tensor, a sequence of numbers or None. Got 0.5"),
        (dict(weights=[None, 1.0]), TypeError, r"weights\[0\] must be a number. Got None"),
        (dict(weights=[0.0, 0.0]), ValueError, "weights must have a number other than 0"),
        (dict(penalty="much"), TypeError, "penalty must be a number. Got 'much'"),
        (dict(eps=None), TypeError, "eps must be a number. Got None"),
        (dict(chunk_rows=2.5), TypeError, "chunk_rows must be an integer or None. Got 2.5"),
        (dict(ignore_index=None), TypeError, "ignore_index must be an integer. Got None"),
        (dict(head=torch.ones(5, 8).to_sparse()), TypeError, "head must be a dense floating tensor"),
        (dict(weights=torch.ones(2, dtype=torch.int64)), TypeError, "weights must be a floating tensor"),
        (dict(bias=torch.ones(6)), ValueError, r"bias must have shape \(5,\). Got \(6,\)"),
        (dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]. Got 1.5"),
        (dict(softcap=0.0), ValueError, "softcap must be finite and > 0. Got 0.0"),
        (dict(z_loss=-1.0), ValueError, "z_loss must be finite and >= 0. Got -1.0"),
        (dict(reduction="max"), ValueError, "reduction must be mean, sum or none. Got 'max'"),
        (dict(chunk_rows=0), ValueError, "chunk_rows must be >= 1. Got 0"),
        (dict(head=torch.ones(5, 8, device="meta")), ValueError, "head must be on the states' device cpu. Got meta"),
    ],
)
def test_rejects(change, error, message):
    arguments = dict(states=torch.ones(2, 3, 8), head=torch.ones(5, 8), targets=torch.zeros(3, dtype=torch.int64))
    arguments.update(change)
    with pytest.raises(error, match=message):
        looped_cross_entropy(arguments.pop("states"), arguments.pop("head"), arguments.pop("targets"), **arguments)
