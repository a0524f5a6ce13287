"""The readout on the CPU in each dtype its products may take there, and the losses of bfloat16 rows of every kind."""

import pytest
import torch
from readout_case import Case

import looped.kernels.device
from looped.kernels.cross_entropy import LossOptions, RowResults, cross_entropy_, loss_reference
from looped.kernels.device import constant_in_graphs
from looped.kernels.products import HEAD_ROWS, accumulate_head

HALVES = [torch.bfloat16, torch.float16]
V = 301


@pytest.fixture(params=[True, False], ids=["low-precision-products", "float32-products"])
def multiplies_faster(request, monkeypatch) -> bool:
    """This machine's CPU with, and without, fast products of low precision."""
    monkeypatch.setattr(looped.kernels.device, "multiplies_faster", lambda dtype: request.param)
    return request.param


def test_a_constant_is_marked_as_the_compiler_marks_it():
    def ours() -> None: ...
    def theirs() -> None: ...

    constant_in_graphs(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "options", [{}, dict(weights="token", ignored=3), dict(weights="loop", penalty=0.1), dict(bias=True, z_loss=0.01)]
)
def test_products_of_either_dtype(multiplies_faster, dtype, options):
    Case((3, 41, 48, V), dtype=dtype, **options).check(chunk_rows=50)


@pytest.mark.parametrize("vocabulary", [HEAD_ROWS + 1, 2 * HEAD_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_products_in_several_blocks_of_the_head(multiplies_faster, dtype, vocabulary):
    Case((2, 19, 16, vocabulary), dtype=dtype).check(chunk_rows=16)


@pytest.mark.parametrize("dtype", HALVES)
def test_head_gradient_has_the_heads_layout(multiplies_faster, dtype):
    found, _ = Case((2, 19, 16, 65), dtype=dtype).run(looped.kernels.looped_cross_entropy)
    assert found["head"].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("transposed", [True, False])  # as on a CPU with fast products of low precision, and on ROCm
def test_sum_of_the_head_gradient_over_chunks(dtype, transposed):
    torch.manual_seed(0)
    total = torch.full((16, HEAD_ROWS + 3), torch.nan).t() if transposed else torch.full((HEAD_ROWS + 3, 16), torch.nan)
    chunks = [(torch.randn(7, HEAD_ROWS + 3).to(dtype), torch.randn(7, 16).to(dtype)) for _ in range(3)]
    for index, (g, y) in enumerate(chunks):
        accumulate_head(total, g, y, index == 0)
    truth = sum(g.double().t() @ y.double() for g, y in chunks)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(total.double(), truth, rtol=rounding, atol=rounding * 16)  # products of up to 12


def rows_of_every_kind() -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 logits [rows, V] and targets: ordinary, confident and wrong ones, all negative, ignored."""
    torch.manual_seed(0)
    z = torch.randn(40, V) * 3
    targets = torch.randint(V, (40,))
    row = torch.arange(40)
    z[8:16] += 15.0 * torch.nn.functional.one_hot(targets[8:16], V)  # p_t near 1
    z[16:24] *= 200.0  # most p_t under the range of float32
    z[24:32] -= 500.0
    z[32:34, 0] = 3000.0
    z[row[36:], targets[36:]] = z[36:].amax(-1) + 1.0
    targets[5] = targets[20] = -100
    return z.bfloat16(), targets


@pytest.mark.parametrize("weighted", [True, False])
def test_bfloat16_rows_of_every_kind(weighted):
    """Of the weights only those that are 0 matter to the rows' own gradients."""
    z, targets = rows_of_every_kind()
    truth = loss_reference(z.double(), targets, LossOptions())[0]
    row_weight = torch.rand(40) if weighted else torch.ones(40)
    row_weight[[3, 17]] = 0.0
    expected = torch.softmax(z.double(), -1)
    expected[torch.arange(40), targets.clamp(min=0)] = torch.expm1(-truth)
    expected *= ((row_weight != 0) & (targets != -100)).unsqueeze(-1)
    loss = torch.full((45,), torch.nan)
    logits = z.clone()
    weights = torch.cat([torch.ones(5), row_weight])
    cross_entropy_(logits, targets.roll(5), weights, LossOptions(), RowResults(loss), 5, gradient=True)
    torch.testing.assert_close(loss[5:].double(), truth, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(logits.double(), expected, rtol=2**-7, atol=1e-7)
    assert loss[:5].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_bfloat16_row_that_is_not_finite_stays_in_its_row(value):
    z, targets = rows_of_every_kind()
    truth = loss_reference(z.double(), targets, LossOptions())[0]
    z[2, 7] = value
    loss = torch.empty(40)
    cross_entropy_(z, targets, None, LossOptions(), RowResults(loss), 0, gradient=True)
    assert loss[2].isnan()
    others = torch.arange(40) != 2
    torch.testing.assert_close(loss[others].double(), truth[others], rtol=2**-8, atol=1e-6)
