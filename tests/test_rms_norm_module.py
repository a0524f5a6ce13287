"""RMSNorm beside PyTorch's."""

import pytest
import torch
from numerics import assert_no_worse_than
from torch import nn

from looped.kernels import RMSNorm

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
D = 24


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# RMSNorm --------------------------------------------------------------------------------------------------------------


def norm_of(kind, device, dtype, *arguments, **options):
    torch.manual_seed(1)
    norm = kind(*arguments, **options, device=device)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(), dict(eps=1e-3), dict(elementwise_affine=False, eps=1e-5)])
@pytest.mark.parametrize(("shape", "normalized"), [((7, 48), 48), ((2, 3, 33), [33]), ((5, 4, 10), (4, 10))])
def test_rms_norm_is_a_drop_in(backend, device, shape, normalized, options, dtype):
    """Result and gradients of rows so small that eps weighs, against nn.RMSNorm with the same state dict."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=device).to(dtype) * 1e-3, torch.randn(shape, device=device).to(dtype)

    def run(kind, dtype):
        norm = norm_of(nn.RMSNorm, device, dtype, normalized, **options)
        if kind is RMSNorm:
            ours = RMSNorm(normalized, **options, device=device, dtype=dtype)
            ours.load_state_dict(norm.state_dict())
            norm = ours
        elif norm.eps is None:
            norm.eps = torch.finfo(torch.float32).eps  # that of float64's truth too
        h = x.to(dtype).requires_grad_()
        y = norm(h)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, [h, *norm.parameters()], dy.to(dtype))]

    results = run(RMSNorm, dtype), run(nn.RMSNorm, dtype), run(nn.RMSNorm, torch.float64)
    for actual, plain, truth in zip(*results, strict=True):
        assert_no_worse_than(actual, plain, truth, dtype=dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rms_norm_without_eps_has_pytorchs(dtype):
    x = torch.full((3, D), 1e-4 if dtype != torch.float64 else 1e-8, dtype=dtype)
    expected = nn.RMSNorm(D, dtype=dtype)(x)
    assert expected.max() < 0.9  # eps weighs
    torch.testing.assert_close(RMSNorm(D, dtype=dtype)(x), expected)


def test_rms_norm_interchanges_with_pytorchs():
    ours, theirs = RMSNorm(D, eps=1e-3), nn.RMSNorm(D, 1e-3)
    assert isinstance(ours, nn.RMSNorm)
    assert str(ours) == str(theirs)
    nn.init.uniform_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == ["weight"]
    assert list(RMSNorm(D, elementwise_affine=False).state_dict()) == []


@pytest.mark.parametrize("normalized", [(D,), (3, D)])
def test_rms_norm_gives_on_request_what_the_pass_gives(backend, device, normalized):
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, D, device=device, requires_grad=True) for _ in range(2))
    norm = norm_of(RMSNorm, device, torch.float32, normalized, eps=1e-3)
    plain = norm_of(nn.RMSNorm, device, torch.float32, normalized, eps=1e-3)
    axes = tuple(range(-len(normalized), 0))
    for more in (None, residual):
        h = x if more is None else x + more
        y, mean_square, total = norm(x, more, mean_square=True)
        expected = [plain(h), h.square().mean(axes)] + ([] if more is None else [h])
        actual = [y, mean_square] + ([] if more is None else [total])
        inputs = [x, *norm.parameters()] + ([] if more is None else [more])
        plains = [x, *plain.parameters()] + ([] if more is None else [more])
        upstream = [torch.randn_like(e) for e in expected]
        assert more is not None or total is None
        assert mean_square.dtype == torch.float32
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, plains, upstream)
        )
    assert torch.equal(norm(x, residual).residual, x + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_keeps_its_inputs_dtype_under_autocast(backend, device, dtype):
    x = torch.randn(3, D, device=device).to(dtype)
    norm = norm_of(RMSNorm, device, torch.float32, D)
    with torch.autocast(device.type, torch.bfloat16):
        y = norm(x)
        assert torch.is_autocast_enabled(device.type)
    assert y.dtype == dtype == norm_of(nn.RMSNorm, device, torch.float32, D)(x).dtype
    assert torch.equal(y, norm(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_compiles_without_graph_breaks(autocast):
    norm, x = norm_of(RMSNorm, "cpu", torch.float32, D), torch.randn(3, D)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x, x, mean_square=True), norm(x, x, mean_square=True))
        torch.testing.assert_close(compiled(x), norm(x))


def test_rms_norm_knows_shapes_on_meta():
    y, mean_square, total = RMSNorm((3, D), device="meta")(torch.empty(2, 3, D, device="meta"), mean_square=True)
    assert (y.shape, mean_square.shape, total) == ((2, 3, D), (2,), None)


@pytest.mark.parametrize(
    ("normalized", "arguments", "error", "message"),
    [
        (D, ("text",), TypeError, "x must be a tensor. Got str"),
        (D, (torch.ones(2, D), 3.0), TypeError, "residual must be a tensor. Got float"),
        (D, (torch.ones(2, D + 1),), ValueError, rf"x must have shape \[..., {D}\]. Got \(2, {D + 1}\)"),
        ((2, D), (torch.ones(2, D), torch.ones(D, 2)), ValueError, rf"residual must have shape \[..., 2, {D}\]"),
        (D, (torch.ones(2, D), torch.ones(3, D)), ValueError, r"residual must have x's shape"),
        (D, (torch.ones(2, D, dtype=torch.int64),), TypeError, "x must be float32"),
    ],
)
def test_rms_norm_rejects(normalized, arguments, error, message):
    with pytest.raises(error, match=message):
        RMSNorm(normalized)(*arguments)


def test_rms_norm_rejects_a_negative_eps():
    with pytest.raises(ValueError, match=r"eps must be finite and >= 0. Got -1\.0"):
        RMSNorm(D, eps=-1.0)(torch.ones(2, D))
