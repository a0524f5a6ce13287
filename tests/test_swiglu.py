from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_no_worse_than
from torch import Tensor, nn

from looped.block import SwiGLU
from looped.config import LoopedConfig
from looped.context import Context
from looped.implementation import FUSED, PLAIN
from looped.kernels import swiglu
from looped.kernels.swiglu import _as_rows, swiglu_reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def permuted(*shape: int) -> tuple[Tensor, Tensor]:
    first, *rest = shape
    gate, up = (torch.randn(*rest, first).movedim(-1, 0) for _ in range(2))
    return gate, up


def expanded(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape[1:]).expand(shape), torch.randn(*shape[:-1], 1).expand(shape)


def halves(*shape: int) -> tuple[Tensor, Tensor]:
    gate, up = torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)
    return gate, up


LAYOUTS = {
    "contiguous": lambda *shape: (torch.randn(shape), torch.randn(shape)),
    "permuted": permuted,
    "expanded": expanded,
    "halves": halves,
    "halves, tokens first": lambda n, *shape: tuple(x.transpose(0, 1) for x in halves(shape[0], n, *shape[1:])),
    "one half": lambda *shape: (halves(*shape)[1], torch.randn(shape)),
    "every other": lambda *shape: (torch.randn(*shape, 2)[..., 0], torch.randn(*shape, 2)[..., 1]),
}


def cast(tensors: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The same numbers in the same layout."""
    result = []
    for x in tensors:
        storage = torch.empty_strided((x.untyped_storage().nbytes() // 4,), (1,), dtype=dtype, device=device)
        like = storage.as_strided(x.shape, x.stride(), x.storage_offset())
        storage.copy_(torch.empty(0).set_(x.untyped_storage()))
        result.append(like)
    return tuple(result)


def results(function, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of gate and up."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = function(gate, up)
    return y, *torch.autograd.grad(y, (gate, up), dy)


def check(gate: Tensor, up: Tensor, dy: Tensor) -> None:
    actual = results(swiglu, gate, up, dy)
    plain = results(swiglu_reference, gate, up, dy)
    truth = results(swiglu_reference, gate.double(), up.double(), dy.double())
    for name, a, p, t in zip(("y", "dgate", "dup"), actual, plain, truth, strict=True):
        assert a.dtype == p.dtype
        assert a.is_contiguous()
        assert_no_worse_than(a, p, t, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7, 48), (2, 33, 65), (3, 1, 4100), (0, 8), (5, 0)])
def test_swiglu(backend, device, dtype, shape):
    torch.manual_seed(0)
    check(*(3 * torch.randn(shape, device=device).to(dtype) for _ in range(3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 3, 2500), (4, 3, 1)])
def test_layouts(backend, device, dtype, layout, shape):
    """A row longer than a program's block, one shorter, and one of a single element."""
    torch.manual_seed(0)
    gate, up = cast(LAYOUTS[layout](*shape), dtype, device)
    (dy,) = cast(permuted(*shape)[:1], dtype, device)
    check(gate, up, dy)


@pytest.mark.parametrize(
    ("layout", "rows_are"), [("contiguous", (960, 960)), ("halves", (40, 80)), ("halves, tokens first", (40, 40))]
)
def test_nothing_is_copied_that_can_be_read_where_it_is(layout, rows_are):
    """The kernels get gate and up themselves, except where rows are not at one stride."""
    gate, up = LAYOUTS[layout](4, 6, 40)
    pointers = [x.data_ptr() for x in (gate, up)]
    *rows, n_columns, stride = _as_rows(gate, up)
    assert rows[0].stride() == rows[1].stride()
    assert (n_columns, stride) == rows_are
    assert ([x.data_ptr() for x in rows] == pointers) == (layout != "halves, tokens first")


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_one_gradient_alone(backend, device, needed):
    torch.manual_seed(0)
    gate, up, dy = torch.randn(3, 6, 50, device=device)
    both = results(swiglu, gate, up, dy)[1:]
    tensors = [x.detach().requires_grad_(need) for x, need in zip((gate, up), needed, strict=True)]
    swiglu(*tensors).backward(dy)
    for tensor, need, expected in zip(tensors, needed, both, strict=True):
        assert torch.equal(tensor.grad, expected) if need else tensor.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_magnitudes(backend, device, dtype):
    """As F.silu: silu(-inf) is nan, silu(-1e4) is 0, silu(1e4) is 1e4."""
    values = [0.0, -0.0, 80.0, -80.0, 100.0, -100.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan")]
    gate, up = (x.flatten() for x in torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij"))
    gate, up = gate.to(device, dtype), up.to(device, dtype)
    dy = torch.ones_like(gate)
    wide = torch.float32 if backend == "triton" else dtype  # which of them may leave the dtype's range in between
    expected = results(swiglu_reference, *(x.to(wide) for x in (gate, up, dy)))
    for a, e in zip(results(swiglu, gate, up, dy), expected, strict=True):
        torch.testing.assert_close(a, e.to(dtype), equal_nan=True)


def test_deterministic(backend, device):
    torch.manual_seed(0)
    gate, up, dy = torch.randn(3, 37, 500, device=device)
    first = results(swiglu, gate, up, dy)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results(swiglu, gate, up, dy), first, strict=True))


# On a CPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(31,), (3, 1003), (4, 64, 512)])
def test_the_bits_on_a_cpu_are_those_of_the_definition(dtype, shape):
    torch.manual_seed(0)
    gate, up, dy = (4 * torch.randn(3, *shape)).to(dtype)
    expected = results(lambda a, b: F.silu(a) * b, gate, up, dy)
    assert all(torch.equal(a, b) for a, b in zip(results(swiglu, gate, up, dy), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_decoders_bits_on_a_cpu_are_the_same_fused_or_plain(dtype, autocast):
    torch.manual_seed(0)
    module = SwiGLU(LoopedConfig(d_model=24, d_ff=52, n_heads=2, n_layers=1, vocab_size=10, max_seq_len=4, n_loops=1))
    module, found = module.to(dtype), []
    x, dy = torch.randn(2, 3, 5, 24).to(dtype)
    for implementation in (FUSED, PLAIN):
        h = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, _ = module(h, None, nn.Identity(), Context(replace(PLAIN, glu=implementation.glu)))
        found.append((y, *torch.autograd.grad(y, (h, *module.parameters()), dy.to(y.dtype))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_float64_on_a_cpu_has_the_right_gradient():
    gate, up = torch.randn(2, 3, 7, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(swiglu, (gate.requires_grad_(), up.requires_grad_()))


# Registration ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(backend, device, layout):
    gate, up = (x.to(device).requires_grad_() for x in LAYOUTS[layout](3, 4, 24))
    torch.library.opcheck(torch.ops.looped.swiglu.default, (gate, up))


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(backend, device, layout, needed):
    gate, up = (x.to(device) for x in LAYOUTS[layout](3, 4, 24))
    dy = torch.randn(4, 3, 24, device=device).transpose(0, 1)
    torch.library.opcheck(torch.ops.looped.swiglu_backward.default, (dy, gate, up, *needed))


def test_compiles_without_graph_breaks(backend, device):
    gate, up, dy = torch.randn(3, 4, 24, device=device)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, gate, up, dy), results(swiglu, gate, up, dy), strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_the_dtype(backend, device):
    """That of the products before it."""
    x, weight = torch.randn(5, 16, device=device), torch.randn(2, 24, 16, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = swiglu(F.linear(x, weight[0]), F.linear(x, weight[1]))
        assert swiglu(x, x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        ([1.0], torch.ones(1), TypeError, "gate must be a tensor. Got list"),
        (torch.ones(1), 2.0, TypeError, "up must be a tensor. Got float"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2), TypeError, "gate must be float32.*torch.int64"),
        (torch.ones(2), torch.ones(2, dtype=torch.cfloat), TypeError, "up must be float32.*torch.complex64"),
        (torch.ones(3, 4), torch.ones(3, 1), ValueError, r"up must have gate's shape \(3, 4\). Got \(3, 1\)"),
        (torch.ones(3), torch.ones(3).half(), TypeError, "up must have gate's dtype torch.float32. Got torch.float16"),
        (torch.ones(3), torch.ones(3, device="meta"), ValueError, "up must have gate's device cpu. Got meta"),
    ],
)
def test_rejects(gate, up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up)


def test_rejects_float64_on_triton(backend, device):
    x = torch.ones(3, dtype=torch.float64, device=device)
    if backend == "triton":
        with pytest.raises(TypeError, match=r"gate must be float32.*torch.float64"):
            swiglu(x, x)
    else:
        assert swiglu(x, x).dtype == torch.float64
