import pytest
import torch
from numerics import LAYOUTS, assert_no_worse_than

from looped.kernels import radial_gradient
from looped.kernels.radial import radial_gradient_reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (2, 33, 65), (0, 8), (3, 4100)])
def test_radial_gradient(backend, device, dtype, shape):
    torch.manual_seed(0)
    h, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    upstream = [torch.randn(shape[:-1], device=device) for _ in range(3)]

    def run(function, h, grad, upstream):
        h, grad = h.detach().requires_grad_(), grad.detach().requires_grad_()
        result = function(h, grad)
        return [*result, *torch.autograd.grad(tuple(result), (h, grad), upstream)]

    actual = run(radial_gradient, h, grad, upstream)
    plain = run(radial_gradient_reference, h, grad, upstream)
    truth = run(radial_gradient_reference, h.double(), grad.double(), [u.double() for u in upstream])
    for a, p, t in zip(actual, plain, truth, strict=True):
        assert a.dtype == p.dtype
        assert_no_worse_than(a, p, t)


def test_fraction(backend, device):
    h = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], device=device)
    grad = torch.tensor([[-6.0, -8.0], [0.0, 2.0], [1.0, 1.0]], device=device)
    torch.testing.assert_close(radial_gradient(h, grad).fraction.cpu(), torch.tensor([1.0, 0.0, 0.0]))


def test_fraction_of_tiny_gradients_does_not_underflow(backend, device):
    # |g|^2 |h|^2 is below float32's range, each factor well inside it, also where denormals are flushed
    h = 1e-8 * torch.randn(5, 32, device=device)
    torch.testing.assert_close(radial_gradient(h, h * 1e-8).fraction, torch.ones(5, device=device))


@pytest.mark.parametrize(
    ("h_size", "grad_size"), [(3e19, 2.0), (1e25, 1e-25), (1.0, 3e-24), (1e-30, 1e-30), (7e22, 5e21)]
)
def test_fraction_of_sizes_whose_squares_leave_the_range(backend, device, h_size, grad_size):
    h = torch.randn(5, 33, device=device)
    fraction = radial_gradient(h * h_size, -h * grad_size).fraction
    torch.testing.assert_close(fraction, torch.ones(5, device=device))
    mixed = radial_gradient(h * h_size, torch.randn(5, 33, device=device) * grad_size).fraction
    assert ((mixed > 0) & (mixed < 1)).all()


@pytest.mark.parametrize("lost", [torch.nan, torch.inf])
def test_fraction_of_rows_that_are_not_finite(backend, device, lost):
    h, grad = torch.randn(4, 20, device=device), torch.randn(4, 20, device=device)
    h[1, 7], grad[2, 0] = lost, lost
    fraction = radial_gradient(h, grad).fraction
    assert fraction[[1, 2]].isnan().all()
    assert fraction[[0, 3]].isfinite().all()


def test_behind_rmsnorm_the_radial_part_is_epsilons():
    """<dL/dh, h> = eps * rstd^3 * <dL/dy * w, h>, exactly."""
    torch.manual_seed(0)
    h = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    weight, dy, eps = torch.rand(32, dtype=torch.float64), torch.randn(6, 32, dtype=torch.float64), 0.3
    rstd = torch.rsqrt(h.square().mean(-1) + eps)
    (grad,) = torch.autograd.grad(h * rstd.unsqueeze(-1) * weight, h, dy)
    expected = eps * rstd.detach() ** 3 * (dy * weight * h.detach()).sum(-1)
    torch.testing.assert_close(radial_gradient(h.detach(), grad).dot, expected)


def test_noncontiguous(backend, device):
    h, grad = torch.randn(5, 6, 32, device=device).transpose(0, 1), torch.randn(6, 5, 64, device=device)[..., ::2]
    for a, e in zip(radial_gradient(h, grad), radial_gradient_reference(h, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    h, grad = (LAYOUTS[layout](torch.randn(3, 4, 24)).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.looped.radial_gradient.default, (h, grad))
    sums = [torch.randn(3, 4).t().contiguous().t() for _ in range(3)]
    torch.library.opcheck(torch.ops.looped.radial_gradient_backward.default, (h.detach(), grad.detach(), *sums))


def test_compiles_without_graph_breaks():
    h, grad = torch.randn(4, 24), torch.randn(4, 24)
    compiled = torch.compile(lambda h, g: radial_gradient(h, g).fraction, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, grad), radial_gradient(h, grad).fraction)


@pytest.mark.parametrize(
    ("h", "grad", "error", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), ValueError, r"grad must have h's shape \(3, 4\). Got \(3, 5\)"),
        (torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 4), TypeError, "h must be float32.*torch.int32"),
    ],
)
def test_rejects(h, grad, error, message):
    with pytest.raises(error, match=message):
        radial_gradient(h, grad)
