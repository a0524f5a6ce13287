"""The stand-in GPU itself: what it notices, and that packages for real GPUs do not disturb it."""

import json
from pathlib import Path

import pytest
from uninterpreted import run

FAKE_GPU = "import torch\nfrom bench.offline.fake_gpu import TARGETS, fake_gpu\n"

# As flash-attn 2 does: a custom op whose body needs a compiled library, behind an autograd function.
FLASH_ATTENTION = """
import torch

@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), device_types="cuda")
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise ImportError("the compiled library is not here")

@forward.register_fake
def _(q, k, v):
    return torch.empty_like(q)

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return forward(q, k, v)
"""


@pytest.fixture
def flash_attention(tmp_path) -> Path:
    (tmp_path / "flash_attn.py").write_text(FLASH_ATTENTION)
    information = tmp_path / "flash_attn-2.8.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    return tmp_path


def test_the_path_does_not_depend_on_an_installed_flash_attn(flash_attention):
    """The decoder's attention is PyTorch's flash kernel, forward and backward, installed or not."""
    program = """
from looped.attention import causal_attention
with fake_gpu(TARGETS["sm_90"]) as record:
    q, k, v = (torch.empty(2, 128, 4, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    causal_attention(q, k, v).sum().backward()
    print([call.name for call in record.calls if "flash_attention" in call.name], q.grad.shape)
"""
    found = run(FAKE_GPU + program, packages=flash_attention)
    assert found == run(FAKE_GPU + program)
    assert "flash_attention_backward" in found


def test_functions_that_are_imitated_compute_on_the_hosts_own_tensors():
    program = """
import torch.nn.functional as F
x, weight = torch.randn(3, 64), torch.rand(64)
heads = x.view(1, 1, 3, 64)
calls = (
    lambda: F.rms_norm(x, (64,), weight, 1e-6),
    lambda: F.linear(x, x),
    lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
)
expected = [call() for call in calls]
with fake_gpu(TARGETS["sm_90"]):
    print([torch.equal(call(), value) for call, value in zip(calls, expected)])
"""
    assert run(FAKE_GPU + program).split("\n")[-2] == "[True, True, True]"


def test_custom_ops_of_other_packages_are_only_asked_for_their_shapes(flash_attention):
    program = """
from flash_attn import flash_attn_func
with fake_gpu(TARGETS["sm_90"]) as record, torch.no_grad():
    q = torch.empty(2, 128, 4, 64, dtype=torch.bfloat16, device="cuda")
    record.clear()
    print(flash_attn_func(q, q, q).shape)
    (call,) = record.calls
    print(call.name, call.read_write_bytes == 2 * q.nbytes, record.peak_bytes - record.live_bytes)
"""
    assert "flash_attn::_flash_attn_forward True" in run(FAKE_GPU + program, packages=flash_attention)


WAITS = {  # what is recorded, or, where a value is read that nobody answers for, named by the error
    "x.sum().item()": "_local_scalar_dense",
    "float(x[0])": "_local_scalar_dense",
    "x.cpu()": "_to_copy",
    "x.to('cpu')": "_to_copy",
    "x[[0, 2]]": "made from numbers",
    "x[torch.tensor([0, 2])]": "aten.index",
    "torch.tensor([1.0], device='cuda')": "_to_copy",
    "x.copy_(torch.ones(4))": "aten.copy_",
    "torch.ones(4).to('cuda')": "_to_copy",
    "torch.ones(4).to('cuda', non_blocking=True)": "_to_copy",  # of memory that is not pinned
    "torch.ones(4).pin_memory().to('cuda')": "_to_copy",
    "torch.cuda.synchronize()": "synchronize",
}
NO_WAITS = (
    "x + 1",
    "x[:2]",
    "x * x.sum()",
    "torch.full((3,), 2.0, device='cuda')",
    "torch.ones(4).pin_memory().to('cuda', non_blocking=True) + x",
    "torch.ones(4).sum().item()",
)


@pytest.fixture(scope="module")
def noticed() -> dict[str, list[str]]:
    """By expression of a tensor x on the stand-in GPU: the host's waits."""
    program = f"""
import json
found = {{}}
with fake_gpu(TARGETS["sm_90"]) as record:
    x = torch.ones(4, device="cuda")
    for expression in {[*WAITS, *NO_WAITS]!r}:
        record.clear()
        try:
            eval(expression)
            found[expression] = list(record.host_copies)
        except Exception as error:
            found[expression] = [repr(error)]
print(json.dumps(found))
"""
    return json.loads(run(FAKE_GPU + program))


@pytest.mark.parametrize("expression", WAITS)
def test_host_waits_are_noticed(noticed, expression):
    assert any(WAITS[expression] in wait for wait in noticed[expression]), noticed[expression]


@pytest.mark.parametrize("expression", NO_WAITS)
def test_what_stays_on_the_device_is_no_wait(noticed, expression):
    assert noticed[expression] == []


def test_every_kernel_runs_on_the_gpu_of_its_tensors():
    """On the second GPU while the first is the current one; weights and losses, norms, SwiGLU, products, statistics."""
    program = """
from looped.kernels import looped_cross_entropy, radial_gradient, readout_statistics, rms_norm_penalty, swiglu
with fake_gpu(TARGETS["sm_90"]) as record:
    def gpu(*shape):
        return torch.empty(shape, device="cuda:1", requires_grad=True)
    states, head, weight = [gpu(64, 64), gpu(64, 64)], gpu(100, 64), gpu(64)
    targets = torch.empty(64, dtype=torch.int64, device="cuda:1")
    result = looped_cross_entropy(states, head, targets, norm_weight=weight, penalty=0.1)
    results = [result.loss, rms_norm_penalty(states[0], weight, residual=states[1]).y, *radial_gradient(*states)]
    results.append(swiglu(*states))
    torch.autograd.backward(results, [torch.empty_like(each) for each in results])
    readout_statistics(states, head, targets, norm_weight=weight)
    print(len({key[0] for key in record.kernels}), torch.cuda.current_device(), states[0].grad.device)
"""
    assert run(FAKE_GPU + program) == "11 0 cuda:1\n"


def test_a_graph_replays_what_it_captured_and_may_not_wait():
    program = """
with fake_gpu(TARGETS["sm_90"]) as record:
    x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x + 1) * 2
    record.clear()
    graph.replay()
    graph.replay()
    print(len(record.calls))
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.copy_(torch.ones(4))
    except RuntimeError as error:
        print(str(error).partition(":")[0])
"""
    assert run(FAKE_GPU + program) == "4\noperation not permitted when stream is capturing\n"
