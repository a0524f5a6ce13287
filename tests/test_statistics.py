import pytest
import torch
from numerics import assert_no_worse_than

from looped.kernels import readout, readout_statistics
from looped.kernels.cross_entropy_cpu import top2
from looped.kernels.products import CPU_WIDE_CHUNK_ROWS
from looped.kernels.statistics import ReadoutStatistics, readout_statistics_reference

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1, 16, 3), (3, 7, 48, 101), (2, 17, 64, 257), (3, 11, 24, 1000), (1, 2, 8, 1), (1, 3, 200, 5000)]
SHAPES += [(1, 2, 8, 4096)]  # whole steps alone


def inputs(shape, device, dtype):
    n_loops, n_tokens, d, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    states, head, weight, bias = (
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((n_loops, n_tokens, d), (vocabulary, d), (d,), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (n_tokens,), generator=generator).to(device)
    if n_tokens > 1:
        targets[0] = -100
    return states, head * (2 / d**0.5), targets, weight, bias


def plain(states, head, targets, weight, bias, softcap, dtype):
    """All logits in memory, in `dtype`."""
    tensors = (tensor.to(dtype) for tensor in (states, head))
    result = readout_statistics_reference(*tensors, targets, norm_weight=weight, bias=bias, softcap=softcap)
    return ReadoutStatistics(*(column.flatten() for column in result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_readout_statistics(backend, device, shape, dtype, softcap):
    states, head, targets, weight, bias = inputs(shape, device, dtype)
    actual = readout_statistics(states, head, targets, norm_weight=weight, bias=bias, softcap=softcap)
    same = plain(states, head, targets, weight, bias, softcap, dtype)
    truth = plain(states, head, targets, weight, bias, softcap, torch.float64)
    for name in ("loss", "lse", "entropy", "margin"):
        value = getattr(actual, name)
        assert value.dtype == torch.float32
        assert value.shape == shape[:2]
        if shape[-1] == 1 and name == "margin":
            assert value.isinf().all()
            continue
        assert_no_worse_than(value.flatten(), getattr(same, name), getattr(truth, name), dtype=dtype, name=name)
    # where rounding may swap the two largest logits, the margin says so
    clear = truth.margin > 0.05
    assert torch.equal(actual.top1.flatten()[clear], truth.top1[clear])


@pytest.mark.parametrize("which", ["layernorm", "raw", "final-only"])
def test_other_readouts(backend, device, which):
    states, head, targets, weight, bias = inputs((3, 9, 32, 65), device, torch.float32)
    options = dict(readout=which, norm_weight=None if which == "raw" else weight, bias=bias)
    expected = readout_statistics_reference(states, head, targets, **options)
    for layout in (states, list(states.unbind(0))):
        for actual, wanted in zip(readout_statistics(layout, head, targets, **options), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_without_targets(backend, device):
    states, head, targets, *_ = inputs((2, 5, 16, 33), device, torch.float32)
    actual, known = readout_statistics(states, head), readout_statistics(states, head, targets)
    assert actual.loss is None
    torch.testing.assert_close(actual.lse, known.lse)


def test_equal_logits_give_the_lowest_id_and_no_margin(backend, device):
    states, head = torch.ones(1, 3, 16, device=device), torch.ones(300, 16, device=device)
    actual = readout_statistics(states, head, readout="raw")  # exact sums: rounding would break the ties
    assert actual.top1.eq(0).all()
    assert actual.margin.eq(0).all()
    torch.testing.assert_close(actual.entropy, torch.full((1, 3), 300.0, device=device).log())


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_an_unchecked_target_out_of_range_has_no_loss(backend, device, monkeypatch):
    """As in the training pass, should a GPU be built without the assertion that would have stopped it."""
    monkeypatch.setattr(readout, "check_range", lambda *arguments: None)
    states, head, targets, *_ = inputs((2, 5, 16, 33), device, torch.float32)
    targets[1], targets[3] = -1, 33
    loss = readout_statistics(states, head, targets).loss
    assert loss[:, [1, 3]].isnan().all()
    assert not loss[:, [0, 2, 4]].isnan().any()


def test_needs_no_gradient_and_leaves_none(backend, device):
    states, head, targets, *_ = inputs((2, 5, 16, 33), device, torch.float32)
    actual = readout_statistics(states.requires_grad_(), head.requires_grad_(), targets)
    assert not any(value.requires_grad for value in actual)


def test_empty(backend, device):
    actual = readout_statistics(torch.zeros(2, 0, 8, device=device), torch.zeros(5, 8, device=device))
    assert actual.lse.shape == (2, 0)


def test_no_logits_larger_than_a_chunk():
    """On the CPU: the largest product is one chunk of rows, not all of them."""
    products, mm = [], torch.mm
    states, head = torch.randn(3, 2048, 8), torch.randn(5000, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda a, b, **k: products.append((len(a), b.shape[1])) or mm(a, b, **k))
        readout_statistics(states, head)
    assert sum(rows * columns for rows, columns in products) == 3 * 2048 * 5000
    assert max(rows for rows, _ in products) <= CPU_WIDE_CHUNK_ROWS


def test_compiles_without_graph_breaks():
    states, head, targets, *_ = inputs((2, 5, 16, 33), "cpu", torch.float32)
    compiled = torch.compile(lambda *t: readout_statistics(*t).entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states, head, targets), readout_statistics(states, head, targets).entropy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(states=[]), ValueError, "states must be a tensor .* or a sequence"),
        (dict(head=torch.ones(5, 7)), ValueError, r"head must have shape \[V, 8\]"),
        (dict(targets=torch.full((3,), 5)), ValueError, r"targets must be in \[0, 5\).*Got 5"),
        (dict(softcap=-1.0), ValueError, "softcap must be finite and > 0. Got -1.0"),
        (dict(readout="none"), ValueError, "readout must be one of"),
        (dict(bias=torch.ones(4)), ValueError, r"bias must have shape \(5,\)"),
    ],
)
def test_rejects(change, error, message):
    arguments = dict(states=torch.ones(2, 3, 8), head=torch.ones(5, 8), targets=torch.zeros(3, dtype=torch.int64))
    arguments.update(change)
    with pytest.raises(error, match=message):
        readout_statistics(arguments.pop("states"), arguments.pop("head"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize("n_columns", [1, 2, 127, 128, 129, 300, 1024])
def test_top2_of_short_runs_are_those_of_the_whole_row(n_columns):
    """Also where both are in one run, where they tie, and where all is -inf; the first of equal ones is named."""
    z = torch.randn(64, n_columns, generator=torch.Generator().manual_seed(0)).mul_(4).round_()  # many ties
    z[0], z[1, : n_columns // 2] = -torch.inf, -torch.inf
    expected = z.clone()
    largest, index, second = top2(z)
    assert torch.equal(z, expected), "the logits stay"
    ordered = torch.cat([z.sort(-1, descending=True).values, torch.full((64, 1), -torch.inf)], -1)
    assert torch.equal(largest, ordered[:, 0])
    assert torch.equal(second, ordered[:, 1])
    assert torch.equal(index, torch.tensor([row.tolist().index(max(row.tolist())) for row in z]))
