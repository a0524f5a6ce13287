import pytest
import torch
from numerics import LAYOUTS, assert_no_worse_than

from looped.kernels import rms_norm_penalty, row_norm
from looped.kernels.rms_norm import rms_norm_penalty_reference
from looped.kernels.row_norm import NormBackward, NormForward, norm_backward, norm_forward, partial_sums

SHAPES = [(1, 16), (7, 48), (2, 33, 64), (5, 1), (3, 100), (40, 257), (2, 4100)]
pytestmark = pytest.mark.usefixtures("poisoned")


def run(function, tensors, eps, upstream):
    x, weight, residual = (None if t is None else t.detach().requires_grad_() for t in tensors)
    result = function(x, weight, eps=eps, residual=residual)
    outputs = [result.y, result.mean_square] + ([] if residual is None else [result.residual])
    inputs = [t for t in (x, weight, residual) if t is not None]
    gradients = torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=False)])
    return [*outputs, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_penalty(backend, device, dtype, shape, with_weight, with_residual):
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, device=device).to(dtype) * 3,
        torch.rand(shape[-1], device=device).to(dtype) if with_weight else None,
        torch.randn(shape, device=device).to(dtype) if with_residual else None,
    ]
    wide = [None if t is None else t.double() for t in tensors]
    upstream = [torch.randn(shape, device=device), torch.randn(shape[:-1], device=device)]
    upstream.append(torch.randn(shape, device=device))
    actual = run(rms_norm_penalty, tensors, 1e-6, upstream)
    plain = run(rms_norm_penalty_reference, tensors, 1e-6, upstream)
    truth = run(rms_norm_penalty_reference, wide, 1e-6, [u.double() for u in upstream])
    for i, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
        assert a.dtype == p.dtype
        assert_no_worse_than(a, p, t, name=f"{i}")


@pytest.mark.parametrize("norm", ["none", "rmsnorm", "layernorm"])
@pytest.mark.parametrize(
    ("shape", "row_by_row"), [((1, 16), False), ((9, 48), False), ((9, 48), True), ((3, 600), False)]
)
def test_norm_forms_and_their_gradients(backend, device, norm, shape, row_by_row, monkeypatch):
    """The three norms of the readout, with bias, scale, penalty gradient and radial sums, against autograd.

    row_by_row: a CPU's blocks are as small as they can be.
    """
    if row_by_row:
        monkeypatch.setattr(row_norm, "CPU_ROW_TENSORS", 1 << 40)
    torch.manual_seed(0)
    n, d = shape
    h = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
    weight = None if norm == "none" else torch.rand(d, device=device, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(d, device=device, dtype=torch.float64, requires_grad=True) if norm == "layernorm" else None
    centred = h - h.mean(-1, keepdim=True) if norm == "layernorm" else h
    y = h if norm == "none" else centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    dy = torch.randn_like(y)
    (dh_loss,) = torch.autograd.grad(0.7 * (y * dy).sum(), [h], retain_graph=True)
    square = h.square().mean(-1)
    (dh_penalty,) = torch.autograd.grad(0.3 * square.sum(), [h], retain_graph=True)

    def single(t):
        return None if t is None else t.detach().float()

    out, mean_square = torch.empty_like(single(h)), torch.empty(n, device=device)
    parameters = {"weight": single(weight), "bias": single(bias)}
    norm_forward(NormForward(single(h), **parameters, y=out, mean_square=mean_square), 1e-3, norm)
    torch.testing.assert_close(out, single(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_square, single(square), rtol=1e-5, atol=1e-6)
    dh, radial = torch.empty_like(out), (torch.empty(n, device=device), torch.empty(n, device=device))
    dweight = None if weight is None else partial_sums(single(h))
    dbias = None if bias is None else partial_sums(single(h))
    for partial in (dweight, dbias):
        if partial is not None:
            partial.fill_(torch.nan)
    for add in (False, True):  # the partial sums are written over, then added to
        tensors = NormBackward(
            single(dy), single(h), single(weight), dh=dh, dweight=dweight, dbias=dbias,
            scale=torch.tensor(0.7, device=device), dmean_square=torch.tensor(0.3, device=device).expand(n),
            radial_dot=radial[0], radial_fraction=radial[1],
        )  # fmt: skip
        norm_backward(tensors, 1e-3, norm, add=add)
    torch.testing.assert_close(dh, single(dh_loss + dh_penalty), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(radial[0], single((dh_loss * h).sum(-1)), rtol=1e-4, atol=1e-4)
    fraction = (dh_loss * h).sum(-1).abs() / (dh_loss.norm(dim=-1) * h.norm(dim=-1))
    torch.testing.assert_close(radial[1], single(fraction), rtol=1e-4, atol=1e-5)
    for partial, parameter in ((dweight, weight), (dbias, bias)):
        if partial is not None:
            (expected,) = torch.autograd.grad(2 * 0.7 * (y * dy).sum(), [parameter], retain_graph=True)
            torch.testing.assert_close(partial.sum(0), single(expected), rtol=1e-4, atol=1e-4)


def test_mixed_dtypes_keep_the_residual_stream_wide(backend, device):
    x = torch.randn(6, 40, device=device).bfloat16().requires_grad_()
    residual = torch.randn(6, 40, device=device, requires_grad=True)
    result = rms_norm_penalty(x, torch.ones(40, device=device), residual=residual)
    assert result.y.dtype == torch.bfloat16
    assert result.residual.dtype == torch.float32
    torch.testing.assert_close(result.residual, x.float() + residual)
    dx, dresidual = torch.autograd.grad((result.residual * 2).sum() + result.mean_square.sum(), [x, residual])
    assert dx.dtype == torch.bfloat16
    torch.testing.assert_close(dresidual, 2 + result.residual.detach() / 20)
    torch.testing.assert_close(dx.float(), dresidual, rtol=1e-2, atol=1e-2)


def test_autocast_gives_its_dtype(backend, device):
    x = torch.randn(4, 32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert rms_norm_penalty(x).y.dtype == torch.bfloat16
        assert rms_norm_penalty(x).mean_square.dtype == torch.float32


def test_noncontiguous(backend, device):
    base = torch.randn(6, 5, 32, device=device)
    for x in (base.transpose(0, 1), base[:, ::2], base[..., :16], base[..., ::2], base[:1].expand(6, 5, 32)):
        expected = rms_norm_penalty_reference(x)
        actual = rms_norm_penalty(x)
        torch.testing.assert_close(actual.y, expected.y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(actual.mean_square, expected.mean_square)


def test_only_the_mean_square_is_differentiated(backend, device):
    x = torch.randn(4, 24, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm_penalty(x).mean_square.sum(), x)
    torch.testing.assert_close(gradient, x.detach() * 2 / 24)


def test_empty(backend, device):
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    result = rms_norm_penalty(x, torch.ones(8, device=device))
    assert result.y.shape == (0, 8)
    assert torch.autograd.grad(result.y.sum(), x)[0].shape == (0, 8)


def test_a_zero_row_without_eps_is_as_in_pytorch(backend, device):
    x = torch.randn(5, 8, device=device)
    x[3] = 0.0
    weight = torch.rand(8, device=device)
    result = rms_norm_penalty(x, weight, eps=0.0)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 0.0)
    torch.testing.assert_close(result.y, expected, equal_nan=True)


def test_zero_rows_have_no_nan(backend, device):
    x = torch.zeros(3, 8, device=device, requires_grad=True)
    result = rms_norm_penalty(x)
    (gradient,) = torch.autograd.grad(result.y.sum(), x)
    assert result.y.eq(0).all()
    assert gradient.isfinite().all()


def test_deterministic(backend, device):
    x, weight = torch.randn(100, 48, device=device), torch.randn(48, device=device, requires_grad=True)
    first, *others = (torch.autograd.grad(rms_norm_penalty(x, weight).y.sum(), weight)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(not hasattr(torch.Tensor, "as_strided"), reason="needs as_strided")
def test_int32_offsets(monkeypatch):
    """Row offsets past 2^31 elements, with a stride that itself fits int32."""
    torch.use_deterministic_algorithms(False)  # poisoning would touch 4 GiB; untouched pages cost nothing
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    stride = 2**30 + 16
    storage = torch.empty(2 * stride + 16, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
    x = storage.as_strided((3, 16), (stride, 1))
    x.copy_(torch.randn(3, 16))
    torch.testing.assert_close(rms_norm_penalty(x).y, rms_norm_penalty_reference(x).y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, residual = (LAYOUTS[layout](torch.randn(4, 24)).requires_grad_() for _ in range(2))
    weight = torch.rand(24, requires_grad=True)
    op = torch.ops.looped.rms_norm_mean_square.default
    for arguments in [(x, weight, residual), (x, None, None), (x.detach(), weight, None)]:
        torch.library.opcheck(op, (*arguments, 1e-6, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(layout):
    dy, h, weight = LAYOUTS[layout](torch.randn(4, 24)), LAYOUTS[layout](torch.randn(4, 24)), torch.rand(24)
    op = torch.ops.looped.rms_norm_mean_square_backward.default
    for x_dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op, (dy, torch.randn(4), torch.randn(4, 24), h, weight, 1e-6, x_dtype, True))
    torch.library.opcheck(op, (None, torch.randn(4), None, h, None, 1e-6, torch.float32, False))


def test_compiles_without_graph_breaks():
    def function(x, weight, residual):
        result = rms_norm_penalty(x, weight, residual=residual)
        return result.y.sum() + result.mean_square.sum() + result.residual.square().sum()

    tensors = [torch.randn(4, 24), torch.rand(24), torch.randn(4, 24)]
    expected = torch.autograd.grad(function(*[t.requires_grad_() for t in tensors]), tensors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.ones(3, 4, dtype=torch.int64)), TypeError, "x must be float32.*torch.int64"),
        (dict(x=torch.ones(())), ValueError, r"x must have shape \[..., d\].*Got \(\)"),
        (dict(x=torch.ones(3, 4), weight=torch.ones(5)), ValueError, r"weight must have shape \(4,\). Got \(5,\)"),
        (dict(x=torch.ones(3, 4), eps=-1.0), ValueError, "eps must be finite and >= 0. Got -1.0"),
        (dict(x=torch.ones(3, 4), residual=torch.ones(3, 5)), ValueError, r"residual must have x's shape \(3, 4\)"),
        (dict(x="text"), TypeError, "x must be a tensor. Got str"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm_penalty(**arguments)
