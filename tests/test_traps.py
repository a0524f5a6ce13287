"""Faults that other implementations of a fused readout have had, a test each."""

import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing
from numerics import assert_no_worse_than
from readout_case import Case

from looped.kernels import looped_cross_entropy, readout_statistics
from looped.kernels.cross_entropy import LossOptions, RowResults, cross_entropy_, loss_reference
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("poisoned")


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
    head, targets = torch.randn(31, 16, device=device), torch.randint(31, (2, 3), device=device)
    base = torch.randn(2, 3, 2, 32, device=device)
    for states in (
        base.transpose(1, 2)[..., ::2],
        base.transpose(1, 2)[..., :16],
        base[:1, :1, :, 16:].transpose(1, 2).expand(3, 2, 3, 16),
    ):
        for some_head in (head, head.t().contiguous().t(), head[:1].expand(31, 16)):
            result = looped_cross_entropy(states, some_head, targets, chunk_rows=5)
            expected = looped_cross_entropy_reference(states.contiguous(), some_head.contiguous(), targets).loss
            torch.testing.assert_close(result.loss, expected)
    leaf = torch.randn(2, 2, 3, 16, device=device, requires_grad=True)
    view = leaf.transpose(1, 2)
    looped_cross_entropy(view, head, targets.t()).loss.backward()
    expected = torch.autograd.grad(looped_cross_entropy_reference(view, head, targets.t())[0], leaf)[0]
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trap_loss_scaling(device, backend, dtype):
    """A loss scale reaches float16 gradients that would be subnormal without it."""
    case = Case((2, 48, 16, 31), device, dtype, reduction="sum", weights=[2e-6, 2e-6])
    scale = 2.0**19
    scaled, _ = case.run(looped_cross_entropy, upstream=scale)
    truth, _ = case.run(looped_cross_entropy_reference, torch.float64, upstream=scale)
    plain, _ = case.run(looped_cross_entropy_reference, upstream=scale)
    for name in ("states", "head", "norm_weight"):
        assert_no_worse_than(scaled[name], plain[name], truth[name], name=name)


def test_trap_float16_sums_over_many_tokens_do_not_overflow(backend, device):
    """The head's gradient is a mean, of order one, whatever the sum over tokens is before it is divided."""
    states = torch.full((1, 60, 16), 3000.0, device=device).half().requires_grad_()
    head, targets = torch.zeros(3, 16, device=device).half().requires_grad_(), torch.zeros(60, dtype=torch.int64)
    looped_cross_entropy(states, head, targets.to(device), readout="raw").loss.backward()
    torch.testing.assert_close(head.grad[0].float(), torch.full((16,), -2000.0, device=device))


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
    expected = looped_cross_entropy_reference(states.float(), case.tensors["head"], case.targets).loss
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(loss, states)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 33, 19, 37), (2, 7, 40, 23)])
@pytest.mark.parametrize(
    "options", [{}, dict(softcap=4.0), dict(label_smoothing=0.2), dict(z_loss=0.1), dict(bias=True)]
)
def test_trap_nothing_lies_beyond_the_vocabulary(device, backend, shape, options):
    """A chunk's rows are longer than V in memory; a product that reads them whole finds zeros there."""
    n_loops, n_tokens, _, vocabulary = shape
    length = -(-vocabulary // 16) * 16
    buffer = torch.full((n_loops * n_tokens, length), torch.nan, device=device)
    logits = buffer[:, :vocabulary].copy_(torch.randn(len(buffer), vocabulary, device=device) * 9)
    z_loss = torch.tensor(options["z_loss"], device=device) if "z_loss" in options else None
    bias = torch.randn(vocabulary, device=device) if "bias" in options else None
    chosen = LossOptions(-100, options.get("label_smoothing", 0.0), options.get("softcap"), z_loss, bias)
    targets = torch.randint(vocabulary, (n_tokens,), device=device)
    targets[1] = -100
    results = RowResults(torch.empty(len(buffer), device=device))
    cross_entropy_(logits, targets, None, chosen, results, 0, gradient=True)
    assert logits.isfinite().all()
    assert backend == "cpu" or buffer[:, vocabulary:].eq(0).all()
    Case(shape, device, torch.bfloat16, "raw", **options).check()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("gradient", [False, True])
def test_trap_a_logit_that_is_nan_makes_its_row_nan(device, backend, gradient, softcap):
    """However the softcap bounds it: a step with such a loss is not taken."""
    logits = torch.randn(4, 48, device=device)
    logits[1, 5] = torch.nan
    targets = torch.tensor([3, 7, 11, 40], device=device)
    results = RowResults(torch.empty(4, device=device))
    cross_entropy_(logits, targets, None, LossOptions(softcap=softcap), results, 0, gradient=gradient)
    assert results.loss.isnan().tolist() == [False, True, False, False]
    if gradient:
        assert logits.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("softcap", [5.0, 30.0, 1e6, 1e30])
def test_trap_a_softcap_keeps_the_difference_of_small_logits(device, backend, dtype, size, softcap):
    """Margins and top-1 tokens as precisely as plain PyTorch in float32, and losses, too, but of 16-bit logits.

    Their losses may be off by 2^-20 of a usual softcap for each logit.
    """
    logits = (torch.randn(64, 3, device=device) * size).to(dtype)
    options, targets = LossOptions(softcap=softcap), torch.zeros(64, dtype=torch.int64, device=device)
    truth, plain = (loss_reference(logits.to(wide), targets, options) for wide in (torch.float64, torch.float32))
    results = RowResults(torch.empty(64, device=device))
    cross_entropy_(logits.clone(), targets, None, options, results, 0, gradient=False)
    if dtype == torch.float32 or softcap > 100:
        assert_no_worse_than(results.loss, plain[0], truth[0])
    else:
        assert (results.loss - truth[0]).abs().max() <= 3 * softcap * 2**-20
    results = results._replace(statistics=torch.empty(3, 64, device=device), top1=torch.empty_like(targets))
    cross_entropy_(logits.clone(), targets, None, options, results, 0, gradient=False)
    margin, plain_margin = (top.values[:, 0] - top.values[:, 1] for top in (truth[1].topk(2), plain[1].topk(2)))
    assert_no_worse_than(results.statistics[2], plain_margin, margin)
    chosen, largest = truth[1].gather(1, results.top1.unsqueeze(1)).squeeze(1), truth[1].amax(1)
    assert (largest - chosen <= 4e-7 * largest.abs()).all()  # equal, or so to float32


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("vocabulary", [7, 3000])
def test_trap_statistics_of_a_row_without_a_finite_logit(device, backend, gradient, vocabulary):
    """A margin that is not known is nan, not infinite; the top-1 token is one of the vocabulary all the same."""
    logits = torch.randn(5, vocabulary, device=device)
    logits[0], logits[1], logits[2], logits[4, 5] = torch.finfo(torch.float32).min, -torch.inf, torch.nan, torch.nan
    top = logits[3].topk(2)
    targets = torch.zeros(5, dtype=torch.int64, device=device)
    top1 = torch.empty(5, dtype=torch.int64, device=device)
    results = RowResults(torch.empty(5, device=device), torch.empty(3, 5, device=device), top1)
    cross_entropy_(logits, targets, None, LossOptions(), results, 0, gradient=gradient)
    margin = results.statistics[2]
    assert margin.isnan().tolist() == [False, True, True, False, True]
    assert margin[0] == 0
    assert top1[0] == 0
    assert margin[3] == top.values[0] - top.values[1]
    assert top1[3] == top.indices[0]
    assert ((top1 >= 0) & (top1 < vocabulary)).all()


@pytest.mark.parametrize("readout", ["rmsnorm", "layernorm", "final-only"])
@pytest.mark.parametrize("n_tokens", [1, 5, 19])
def test_trap_no_eps(device, backend, readout, n_tokens):
    """Rows past the last one of a tile have no rstd that is finite, and add nothing all the same."""
    Case((2, n_tokens, 24, 11), device, readout=readout, eps=0.0, penalty=0.1).check()


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("states_dtype", [torch.float32, torch.bfloat16])
def test_trap_a_head_of_another_dtype(backend, device, states_dtype, head_dtype):
    """Products in the states' dtype, each gradient in its tensor's: what FSDP2's mixed precision asks for."""
    case = Case((2, 21, 24, 31), device)
    leaves = {}
    for name, dtype in (("actual", None), ("plain", None), ("truth", torch.float64)):
        states, head = case.tensors["states"].to(states_dtype), case.tensors["head"].to(head_dtype)
        states, head = (x.to(dtype or x.dtype).detach().requires_grad_() for x in (states, head))
        function = looped_cross_entropy if name == "actual" else looped_cross_entropy_reference
        loss = function(states, head, case.targets)[0]
        leaves[name] = [loss.detach(), *torch.autograd.grad(loss, [states, head])]
    assert leaves["actual"][2].dtype == head_dtype
    for actual, plain, truth in zip(*leaves.values(), strict=True):
        assert_no_worse_than(actual, plain, truth, dtype=torch.bfloat16 if states_dtype != torch.float32 else None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
def test_trap_lightly_weighted_rows(backend, device, dtype, per_token):
    """Each row keeps its gradient's precision, however small its weight is beside the others'."""
    case = Case((3, 40, 24, 31), device, dtype)
    weights = torch.tensor([3e-8, 1.0, 2e-6], device=device)
    if per_token:
        weights = torch.logspace(-8, 0, 40, device=device).expand(3, 40).contiguous()
    case.options["weights"] = weights
    scale = 2.0**15
    actual, _ = case.run(looped_cross_entropy, upstream=scale)
    plain, _ = case.run(looped_cross_entropy_reference, upstream=scale)
    truth, _ = case.run(looped_cross_entropy_reference, torch.float64, upstream=scale)
    for name in ("head", "norm_weight"):
        assert_no_worse_than(actual[name], plain[name], truth[name], name=name)
    light = truth["states"].abs().amax(-1) > 1e-4  # float16 holds less only as denormals
    for loop in range(3):
        for rows in light[loop].nonzero().squeeze(-1).split(10):
            states = [values["states"][loop, rows] for values in (actual, plain, truth)]
            assert_no_worse_than(*states, name=f"loop {loop}")


@pytest.mark.parametrize("lost", [torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_trap_a_row_without_weight_may_have_any_loss(backend, device, reduction, lost):
    case = Case((2, 6, 24, 31), device, reduction=reduction)
    weights = torch.rand(2, 6, device=device) + 0.1
    weights[1, 4] = 0.0
    case.options["weights"] = weights
    expected, _ = case.run(looped_cross_entropy)
    case.tensors["states"][1, 4] = lost
    for function in (looped_cross_entropy, looped_cross_entropy_reference):
        actual, _ = case.run(function, frozen=("states",) if function is looped_cross_entropy_reference else ())
        torch.testing.assert_close(actual["loss"], expected["loss"])
    actual, _ = case.run(looped_cross_entropy)
    others = torch.ones(2, 6, dtype=torch.bool, device=device)
    others[1, 4] = False
    torch.testing.assert_close(actual["states"][others], expected["states"][others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_a_row_without_weight_whose_logits_are_not_finite_has_no_gradient(backend, device, dtype):
    case = Case((2, 6, 24, 31), device, dtype, readout="raw", bias=True)
    weights = torch.rand(2, 6, device=device) + 0.1
    weights[1, 4] = 0.0
    case.options["weights"] = weights
    expected, _ = case.run(looped_cross_entropy)
    case.tensors["states"][1, 4] = torch.finfo(dtype).max
    actual, result = case.run(looped_cross_entropy, statistics=True)
    assert not result.statistics.loss[1, 4].isfinite()
    assert actual["states"][1, 4].eq(0).all()
    for name in ("loss", "head", "bias"):
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("weights", [None, "token"])
def test_trap_the_mean_of_parts_is_that_of_the_whole(backend, device, weights, as_tensor):
    """3 and 13 targets in two micro-batches: the sum of their losses over 16, not the mean of their means."""
    case = Case((2, 20, 24, 31), device, weights=weights)
    case.targets[3:7] = -100
    expected, whole = case.run(looped_cross_entropy)
    n_targets = torch.tensor(16, device=device) if as_tensor else 16
    total, per_loop, gradients = 0.0, 0.0, []
    for tokens in (slice(0, 7), slice(7, 20)):
        part = Case((2, 20, 24, 31), device, weights=weights)
        part.targets = case.targets[tokens]
        for name in ("states", *(["weights"] if weights else [])):
            part.tensors[name] = case.tensors[name][:, tokens]
        values, _ = part.run(looped_cross_entropy, n_targets=n_targets)
        reference, _ = part.run(looped_cross_entropy_reference, n_targets=n_targets)
        torch.testing.assert_close(values["loss"], reference["loss"])
        total, per_loop = total + values["loss"], per_loop + values["per_loop"]
        gradients.append(values)
    torch.testing.assert_close(total, expected["loss"])
    torch.testing.assert_close(per_loop, whole.per_loop)
    torch.testing.assert_close(gradients[0]["head"] + gradients[1]["head"], expected["head"], rtol=1e-4, atol=1e-7)
    states = torch.cat([part["states"] for part in gradients], 1)
    torch.testing.assert_close(states, expected["states"], rtol=1e-4, atol=1e-7)


def test_trap_recompiles_for_every_penalty():
    """An annealed penalty or z-loss, as a number or as a tensor, stays in one compiled graph."""
    states, targets = torch.randn(2, 9, 16, requires_grad=True), torch.randint(31, (9,))
    head = torch.randn(31, 16)

    def function(penalty, z_loss):
        return looped_cross_entropy(states, head, targets, penalty=penalty, z_loss=z_loss).loss

    for kind, frames in ((torch.tensor, 1), (float, 2)):  # the second number makes it a symbol
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for step in range(12):
            penalty, z_loss = kind(0.01 * 0.9**step), kind(1e-3 * 0.8**step)
            torch.testing.assert_close(compiled(penalty, z_loss), function(penalty, z_loss))
        assert counter.frame_count <= frames, kind
