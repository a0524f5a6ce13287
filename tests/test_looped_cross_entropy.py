import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import LAYOUTS
from readout_case import DTYPES, READOUTS, Case

from looped.kernels import looped_cross_entropy
from looped.kernels.looped_cross_entropy import looped_cross_entropy_reference
from looped.kernels.readout_call import ReadoutCall, ReadoutTensors

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1, 16, 3), (3, 7, 48, 101), (4, 17, 64, 257), (2, 33, 96, 1000), (2, 5, 40, 1), (1, 3, 8, 40000)]


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
@pytest.mark.parametrize(("n_tokens", "vocabulary"), [(5, 65), (2, 33000)])
def test_loss_options(backend, device, options, n_tokens, vocabulary):
    Case((2, n_tokens, 32, vocabulary), device, bias=True, **options).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [4096, 5000])
def test_gradients_beside_statistics(backend, device, dtype, vocabulary):
    """Of whole steps over a row, which have no mask then, and of the rest."""
    Case((1, 3, 24, vocabulary), device, dtype).check(statistics=True)


shapes = st.tuples(st.integers(1, 3), st.integers(4, 12), st.integers(8, 70), st.integers(8, 300))
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


@pytest.mark.parametrize("readout", READOUTS)
def test_the_reference_is_its_equations(readout):
    """In float64, without the functions of PyTorch that the reference is made of."""
    options = {"label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.03, "n_targets": 11}
    case = Case((2, 6, 24, 31), dtype=torch.float64, readout=readout, bias=True, weights="token", ignored=2, **options)
    tensors, targets = case.tensors, case.targets
    found, result = case.run(looped_cross_entropy_reference, penalty=0.4)
    losses = torch.zeros(2, 6, dtype=torch.float64)
    for k, t in itertools.product(range(2), range(6)):
        y = tensors["states"][k, t]
        y = y - y.mean() if readout == "layernorm" else y
        if readout in ("rmsnorm", "layernorm") or (readout == "final-only" and k == 1):
            y = y / (y.square().mean() + 1e-6).sqrt() * tensors["norm_weight"]
        y = y + tensors["norm_bias"] if readout == "layernorm" else y
        z = 3.0 * torch.tanh((tensors["head"] @ y + tensors["bias"]) / 3.0)
        lse = z.exp().sum().log()
        if targets[t] != -100:
            losses[k, t] = 0.8 * (lse - z[targets[t]]) + 0.2 * (lse - z).mean() + 0.03 * lse**2
    square = tensors["states"].square().mean()
    torch.testing.assert_close(result.per_loop, losses.sum(1) / 11)
    torch.testing.assert_close(found["loss"], (tensors["weights"] * losses).sum() / 11 + 0.4 * square)
    none = case.run(looped_cross_entropy_reference, reduction="none", n_targets=None)[1]
    torch.testing.assert_close(none.loss, tensors["weights"] * losses)


@pytest.mark.parametrize("weights", ["token", [0.5, 0.0, 1.5]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_of_the_reference(weights, reduction):
    """Those of the op: also of loops that are not read, and of states that need no gradient."""
    case = Case((3, 7, 24, 31), readout="raw", bias=True, weights=weights, ignored=1, softcap=4.0, reduction=reduction)
    options = {"statistics": True, "n_targets": 9 if reduction == "mean" else None}
    for frozen in ((), ("states",)):
        wanted = case.run(looped_cross_entropy, frozen=frozen, **options)[1].statistics
        found = case.run(looped_cross_entropy_reference, frozen=frozen, **options)[1].statistics
        assert (found.radial_dot is None) == (bool(frozen) or reduction == "none")
        for name, a, b in zip(found._fields, found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_statistics_where_some_states_need_a_gradient(backend, device):
    case = Case((3, 7, 24, 31), device, readout="raw")
    states = [state.detach().requires_grad_(loop == 1) for loop, state in enumerate(case.tensors["states"])]
    found, wanted = (
        readout(states, case.tensors["head"], case.targets, readout="raw", statistics=True).statistics
        for readout in (looped_cross_entropy, looped_cross_entropy_reference)
    )
    assert wanted.radial_fraction[[0, 2]].isnan().all()
    assert wanted.radial_fraction[1].isfinite().all()
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_of_adaptive_supervision_through_per_token_weights(backend, device):
    """dL/dw[k, t] = CE[k, t] / n, so an exit gate's distribution over loops can be trained."""
    case = Case((3, 5, 16, 21), device, weights="token")
    actual, result = case.run(looped_cross_entropy, statistics=True)
    torch.testing.assert_close(actual["weights"], result.statistics.loss / 5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", ["token", "loop"])
def test_weights_of_a_frozen_model(backend, device, weights, reduction):
    """An exit gate that is trained behind a model that is not."""
    case = Case((3, 7, 16, 21), device, weights=weights, reduction=reduction, bias=True)
    upstream = torch.rand(3, 7, device=device) if reduction == "none" else 2.0
    case.check(upstream=upstream, frozen=("states", "head", "norm_weight", "bias"))


# The op in PyTorch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("sequence", [True, False])
def test_opcheck(sequence, formed, layout):
    def tensor(*size):
        return LAYOUTS[layout](torch.rand(size)).requires_grad_()

    states = [tensor(5, 8) for _ in range(2)] if sequence else [tensor(2, 5, 8)]
    parameters = dict(
        head=tensor(11, 8), norm_weight=torch.rand(8).requires_grad_(), bias=torch.rand(11).requires_grad_()
    )
    call = ReadoutCall("rmsnorm", 1e-6, n_loops=2, active=(0, 1), chunk_rows=4)
    tensors = parameters | dict(targets=torch.randint(11, (5,)))
    if formed:
        call = call._replace(
            differentiated=(0, 1), needs=("head", "norm_weight"), penalised=True, mean=True, statistics=True
        )
        tensors |= dict(weights=tensor(2, 5), penalty=torch.tensor(0.1), z_loss=torch.tensor(0.01))
    arguments = (states, *ReadoutTensors(**tensors), *call.flat())
    torch.library.opcheck(torch.ops.looped.readout.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(layout):
    states = [LAYOUTS[layout](torch.rand(2, 5, 8))]
    call = ReadoutCall(
        "layernorm", 1e-6, n_loops=2, active=(1,), differentiated=(0, 1), penalised=True,
        needs=("head", "norm_weight", "norm_bias", "bias"),
    )  # fmt: skip
    arguments = (
        states, torch.rand(8), torch.rand(8), torch.rand(5, 8), torch.rand(11, 8), torch.rand(11), torch.rand(3),
        torch.rand(5), torch.tensor(2.0), torch.float32, torch.bfloat16, *call.flat(),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.looped.readout_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(reduction, dtype):
    case = Case((3, 7, 16, 33), weights="token", reduction=reduction, dtype=dtype)

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
        (
            dict(head=torch.ones(5, 8, dtype=torch.float64)),
            TypeError,
            "head and states must both be float64 or neither",
        ),
        (dict(n_targets=-3), ValueError, "n_targets must be finite and >= 0. Got -3"),
        (dict(n_targets=3, reduction="sum"), ValueError, "n_targets divides a mean .* reduction='sum'. Got 3"),
        (dict(n_targets=torch.ones(2)), ValueError, r"n_targets must be a number or a real tensor \[\]. Got .*\(2,\)"),
        (
            dict(penalty=torch.ones((), device="meta")),
            ValueError,
            "penalty must be on the states' device cpu. Got meta",
        ),
        (dict(penalty=torch.ones(()), reduction="none"), ValueError, "penalty .* must be 0 for reduction='none'"),
        (dict(penalty=1e39), ValueError, "penalty must be finite and >= 0. Got 1e[+]39"),
        (dict(softcap=float("inf")), ValueError, "softcap must be finite and > 0. Got inf"),
        (dict(weights=[1.0, -1e300]), ValueError, r"weights\[1\] must be finite. Got -1e[+]300"),
        (
            dict(ignore_index=-(2**63) - 1),
            ValueError,
            r"ignore_index must be in \[-9223372036854775808, 92.*807\]. Got",
        ),
        (dict(ignore_index=2**64), ValueError, r"ignore_index must be in \[-9223372036854775808, 92.*807\]. Got 184"),
        (dict(chunk_rows=2**66), ValueError, r"chunk_rows must be in \[1, 2147483647\]. Got 737"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), ValueError, r"targets must have the tokens' shape \(3,\)"),
        (dict(targets=torch.zeros(3)), TypeError, "targets must be a dense int64 or int32 tensor. Got torch.float32"),
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
        (dict(weights=torch.ones(2, dtype=torch.int64)), TypeError, "weights must be a dense floating tensor"),
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
