"""The bytes that every Triton kernel loads and stores, counted in the interpreter, against the least possible.

The least is: each input read once, each output written once.  Rows of a matrix are read once by every kernel but those
that say otherwise.  A vector that all rows share (a norm's weight, a vocabulary's bias) is read once a program, from
cache: the counts are stated, and where programs take many rows, vectors and partial sums stay inside the bound too.
"""

import math

import numpy as np
import pytest
import torch

from bench.offline.accesses import Audit, Launch, View
from looped.kernels import radial_gradient, swiglu
from looped.kernels.cross_entropy import LossOptions, RowResults, cross_entropy_
from looped.kernels.readout_call import ReadoutCall, ReadoutTensors
from looped.kernels.row_norm import NormBackward, NormForward, norm_backward, norm_forward, partial_sums, summed
from looped.kernels.row_norm_triton import norm_tile
from looped.kernels.row_weights import LossScales, loss_sums, row_weights, scaled
from looped.kernels.row_weights_triton import BLOCK_TOKENS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's accesses")
DTYPES = (torch.float32, torch.bfloat16)
ROWS = 37


@pytest.fixture
def audit(monkeypatch) -> Audit:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return Audit(monkeypatch)


def check_safe(launch: Launch) -> None:
    """No address shared by two programs where one writes it.  (An access out of bounds has raised.)"""
    assert launch.conflicts() == 0
    assert launch.atomics == 0


def n_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def total(launch: Launch, *, without: tuple[str, ...] = ()) -> int:
    counts = (*launch.loaded.items(), *launch.stored.items())
    return sum(count for name, count in counts if name not in without)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [100, 768])
def test_norm_forward(audit, dtype, d):
    x, residual, weight = torch.randn(ROWS, d).to(dtype), torch.randn(ROWS, d), torch.randn(d)
    y, summed, mean_square = torch.empty_like(x), torch.empty_like(residual), torch.empty(ROWS)
    norm_forward(NormForward(x, residual, weight, y=y, total=summed, mean_square=mean_square), 1e-6, "rmsnorm")
    (launch,) = audit.launches
    check_safe(launch)
    least = n_bytes(x, residual, y, summed, mean_square)
    assert least <= total(launch, without=("weight_ptr",)) <= 1.05 * least
    programs = math.ceil(ROWS / norm_tile(d)[0])
    assert launch.loaded["weight_ptr"] == programs * n_bytes(weight)


@pytest.mark.parametrize("norm", ["none", "rmsnorm", "layernorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_forward_of_every_form(audit, norm, bias):
    """Rows once, whichever the form: a mean and a variance need no second read; vectors once a program."""
    d, dtype = 100, torch.bfloat16
    x, y, mean_square = torch.randn(ROWS, d).to(dtype), torch.empty(ROWS, d, dtype=dtype), torch.empty(ROWS)
    vectors = [torch.randn(d) if norm != "none" else None, torch.randn(d) if bias and norm != "none" else None]
    norm_forward(NormForward(x, None, *vectors, y=y, mean_square=mean_square), 1e-6, norm)
    (launch,) = audit.launches
    check_safe(launch)
    least = n_bytes(x, y, mean_square)
    assert least <= total(launch, without=("weight_ptr", "bias_ptr")) <= 1.05 * least
    programs = math.ceil(ROWS / norm_tile(d)[0])
    for name, vector in zip(("weight_ptr", "bias_ptr"), vectors, strict=True):
        assert launch.loaded[name] == (0 if vector is None else programs * n_bytes(vector))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norm_backward_with_its_vectors(audit, norm):
    """Rows are shared out between few programs: weight and both partial sums are inside the bound."""
    n_rows, d = 480, 100
    dy, h, weight = torch.randn(n_rows, d), torch.randn(n_rows, d), torch.randn(d)
    dh, dweight, dbias = torch.empty(n_rows, d), partial_sums(h), partial_sums(h)
    norm_backward(NormBackward(dy, h, weight, dh=dh, dweight=dweight, dbias=dbias), 1e-6, norm)
    (launch,) = audit.launches
    check_safe(launch)
    assert launch.programs == len(dweight) > 1
    least = n_bytes(dy, h, weight, dh) + 2 * 4 * d
    assert least <= total(launch) <= 1.05 * least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "add"), [("none", False), ("rmsnorm", False), ("rmsnorm", True), ("layernorm", True)])
def test_norm_backward(audit, dtype, norm, add):
    d = 100
    dy, h, weight = torch.randn(ROWS, d).to(dtype), torch.randn(ROWS, d), torch.randn(d)
    row_weight, dmean_square, dtotal, scale = torch.ones(ROWS), torch.randn(ROWS), torch.randn(ROWS, d), torch.ones(())
    dh, dx, radial = torch.empty(ROWS, d), torch.empty(ROWS, d, dtype=dtype), (torch.empty(ROWS), torch.empty(ROWS))
    dweight = None if norm == "none" else partial_sums(h)
    tensors = NormBackward(
        dy, h, None if norm == "none" else weight, row_weight, scale, dmean_square, dtotal, dh, dx, dweight, None,
        *radial,
    )  # fmt: skip
    norm_backward(tensors, 1e-6, norm, add=add)
    (launch,) = audit.launches
    check_safe(launch)
    vectors = ("weight_ptr", "dweight_ptr", "scale_ptr")
    least = n_bytes(dy, h, row_weight, dmean_square, dtotal, dh, dx, *radial)
    assert least <= total(launch, without=vectors) <= 1.05 * least
    if dweight is not None:  # each program writes its sums to one row, or adds them
        assert launch.stored["dweight_ptr"] == launch.programs * 4 * d
        assert launch.loaded["dweight_ptr"] == (launch.programs * 4 * d if add else 0)
        assert launch.loaded["weight_ptr"] == launch.programs * 4 * d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_programs", [3, 600])
def test_sum_of_partial_sums(audit, n_programs, dtype):
    partial = torch.randn(n_programs, 100)
    out = summed(partial, torch.empty(100, dtype=dtype))
    (launch,) = audit.launches
    check_safe(launch)
    assert total(launch) == n_bytes(partial, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_radial(audit, dtype):
    h, grad = torch.randn(ROWS, 100).to(dtype).requires_grad_(), torch.randn(ROWS, 100).to(dtype).requires_grad_()
    sum(radial_gradient(h, grad)).sum().backward()
    forward, backward = audit.launches
    check_safe(forward)
    check_safe(backward)
    least = n_bytes(h, grad) + 12 * ROWS
    assert least + 4 * ROWS <= total(forward) <= 1.05 * least  # the fraction
    assert least + n_bytes(h, grad) <= total(backward) <= 1.05 * (least + n_bytes(h, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["two tensors", "halves of one", "longer halves"])
def test_swiglu(audit, layout, dtype):
    """Two elements read and one written; backward three read and two written; nothing else, whatever the layout."""
    n_rows, d_ff = (3, 2500) if layout == "longer halves" else (ROWS, 100)
    gate, up = torch.randn(n_rows, 2 * d_ff).to(dtype).chunk(2, dim=-1)
    if layout == "two tensors":
        gate, up = gate.contiguous(), up.contiguous()
    y = swiglu(gate.requires_grad_(), up.requires_grad_())
    y.backward(torch.ones_like(y))
    forward, backward = audit.launches
    for launch, loads, stores in ((forward, 2, 1), (backward, 3, 2)):
        check_safe(launch)
        assert sum(launch.loaded.values()) == loads * n_bytes(y)
        assert sum(launch.stored.values()) == stores * n_bytes(y)


@pytest.mark.parametrize(("frozen", "loads"), [("gate", 2), ("up", 3)])
def test_swiglu_with_one_gradient(audit, frozen, loads):
    """One element written; up is read only for the gradient of the gate."""
    tensors = {name: torch.randn(ROWS, 100).requires_grad_(name != frozen) for name in ("gate", "up")}
    y = swiglu(**tensors)
    y.backward(torch.ones_like(y))
    backward = audit.launches[1]
    check_safe(backward)
    assert sum(backward.loaded.values()) == loads * n_bytes(y)
    assert sum(backward.stored.values()) == n_bytes(y)


def cross_entropy_launch(
    audit: Audit, n_rows: int, n_columns: int, dtype: torch.dtype, *, statistics: bool = False, gradient: bool = True,
    biased: bool = False, softcap: float | None = None,
) -> Launch:  # fmt: skip
    row_length = -(-n_columns // 16) * 16
    logits = torch.randn(n_rows, row_length).to(dtype)[:, :n_columns]
    targets = torch.arange(n_rows).mul(7).remainder(n_columns)
    results = RowResults(torch.empty(n_rows))
    if statistics:
        results = RowResults(results.loss, torch.empty(6, n_rows), torch.empty(n_rows, dtype=torch.int64))
    bias = torch.randn(n_columns) if biased else None
    options = LossOptions(softcap=softcap, bias=bias)
    cross_entropy_(logits, targets, torch.ones(n_rows), options, results, 0, gradient=gradient)
    (launch,) = audit.launches
    check_safe(launch)
    return launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("n_columns", [1003, 20_011])
def test_cross_entropy(audit, n_columns, gradient, statistics, dtype):
    """The logits read twice, the second time from cache, and written once; without gradient and statistics once.

    A row to its end in memory, a multiple of 16 words.  The target's word is read, and written, once more; for the
    statistics that step of the row is read again which holds its maximum.
    """
    n_rows = 3
    launch = cross_entropy_launch(audit, n_rows, n_columns, dtype, statistics=statistics, gradient=gradient)
    row, passes = -(-n_columns // 16) * 16 * dtype.itemsize, 1 + (gradient or statistics)
    again = launch.loaded["logits_ptr"] - n_rows * (passes * row + dtype.itemsize)
    assert (0 < again <= n_rows * 4096) if statistics else again == 0  # a step of 4 KiB
    assert launch.stored["logits_ptr"] == n_rows * (row + dtype.itemsize) * gradient
    assert sum(launch.stored.values()) - launch.stored["logits_ptr"] == n_rows * (4 + 20 * statistics)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("n_columns", "gradient", "passes"), [(1003, True, 2), (20_011, True, 2), (20_011, False, 1)])
def test_cross_entropy_with_bias_and_softcap(audit, softcap, n_columns, gradient, passes):
    """The bias once a pass and row, from cache, and the target's; a softcap moves nothing."""
    n_rows, row_length = 5, -(-n_columns // 16) * 16
    launch = cross_entropy_launch(
        audit, n_rows, n_columns, torch.float32, gradient=gradient, biased=True, softcap=softcap
    )
    assert launch.loaded["logits_ptr"] == n_rows * 4 * (passes * row_length + 1)
    assert launch.loaded["bias_ptr"] == n_rows * 4 * (passes * n_columns + 1)
    assert launch.stored["logits_ptr"] == n_rows * 4 * (row_length + 1) * gradient


# The losses' weights and sums: one program each -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["none", "loops", "tokens"])
def test_row_weights(audit, form):
    """Targets, and weights of tokens that are not ignored, twice: their maximum comes before what it divides.

    The weight of a loop once a block of tokens and pass.
    """
    n_tokens, n_loops = 3000, 3
    targets = torch.arange(n_tokens).remainder(50)
    targets[::7] = -100
    weights = {"none": None, "loops": torch.rand(n_loops, 1), "tokens": torch.rand(n_loops, n_tokens)}[form]
    space = None if weights is None else torch.empty(n_loops * n_tokens)
    tensors, call = ReadoutTensors(torch.empty(0), targets, weights), ReadoutCall("raw", 0.0, 1, (0,), mean=True)
    scales = row_weights(tensors, call, LossScales(space, torch.empty(3)), n_columns=50, n_penalised=0)
    (launch,) = audit.launches
    assert launch.programs == 1
    check_safe(launch)
    passes = 1 if weights is None else 2
    assert launch.loaded["targets_ptr"] == passes * 8 * n_tokens
    valid = int((targets != -100).sum())
    blocks = math.ceil(n_tokens / BLOCK_TOKENS)
    loads = {"none": 0, "loops": 2 * blocks * n_loops, "tokens": 2 * n_loops * valid}[form]
    assert launch.loaded["weights_ptr"] == 4 * loads
    assert launch.stored["row_weight_ptr"] == (0 if scales.row_weight is None else n_bytes(scales.row_weight))
    assert launch.stored["factors_ptr"] == 12
    assert launch.stored["in_range_ptr"] == 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalised", [False, True])
def test_loss_sums(audit, weighted, penalised):
    """Everything once."""
    n_loops, n_tokens = 3, 3000
    loss, factors = torch.rand(n_loops, n_tokens), torch.ones(3)
    row_weight = torch.rand(n_loops * n_tokens) if weighted else None
    mean_square = torch.rand(n_loops + 1, n_tokens) if penalised else None
    results = torch.empty(()), torch.empty(n_loops)
    loss_sums(loss, LossScales(row_weight, factors), mean_square, *results)
    (launch,) = audit.launches
    assert launch.programs == 1
    check_safe(launch)
    read = [tensor for tensor in (loss, row_weight, mean_square) if tensor is not None]
    assert total(launch) == n_bytes(*read, *results) + 4 * (1 + n_loops + penalised)  # factors


def test_scaled(audit):
    """The sum once, its rounded product once, the scale once a program."""
    x = torch.randn(37, 100)
    out = scaled(x, torch.tensor(2.0), torch.bfloat16)
    (launch,) = audit.launches
    check_safe(launch)
    assert total(launch) == n_bytes(x, out) + 4 * launch.programs


def test_the_audit_sees_what_is_wrong():
    """Out of bounds, and two programs at one address."""
    views, on = {"x": View(0, 4, ((16, 1),))}, np.ones(2, bool)
    launch = Launch("none", views)
    launch.note((0, 0, 0), np.array([0, 60]), on, 4, store=True)
    for start in (-4, 61, 64):
        with pytest.raises(AssertionError, match="1 accesses out of bounds"):
            Launch("none", views).note((0, 0, 0), np.array([0, start]), on, 4, store=True)
    with pytest.raises(AssertionError, match="an address twice"):
        Launch("none", views).note((0, 0, 0), np.array([8, 8]), on, 4, store=True)
    assert launch.conflicts() == 0
    launch.note((1, 0, 0), np.array([0, 4]), on, 4, store=True)
    assert launch.conflicts() == 1
    launch.note((2, 0, 0), np.array([4, 8]), on, 4, store=False)
    assert launch.conflicts() == 2


def test_the_audit_knows_views():
    """What a storage holds beside the view is out of bounds: other rows, other columns; of logits only other rows."""
    storage = torch.zeros(6, 10)
    base, view = storage.data_ptr(), storage[1:3, 2:5]
    at = {"before": 1, "first": 12, "last": 24, "column": 15, "row": 32}
    addresses = np.array([base + 4 * element for element in at.values()])
    assert dict(zip(at, View.of("x_ptr", view).holds(addresses, 4).tolist(), strict=True)) == {
        "before": False, "first": True, "last": True, "column": False, "row": False,
    }  # fmt: skip
    assert View.of("logits_ptr", view).holds(addresses, 4).tolist() == [False, True, True, True, False]
    assert not View.of("x_ptr", view).holds(addresses, 2).any()
    assert View.of("x_ptr", torch.zeros(()).expand(5)).dims == ((5, 0),)
