"""The host's benchmark: without a GPU every call must take the path of CUDA tensors, down to Triton's launcher."""

import json

import pytest
import torch
from uninterpreted import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without a GPU")

# Kernels are launched as in the benchmark; the launcher that does nothing counts.
LAUNCHES = """
import json, sys
import torch
from bench import bench_host
from bench.offline import host_only

launches = []
host_only._no_launch = lambda *arguments: launches.append(arguments[0])
found = {}
for name, mode in bench_host.cases():
    with bench_host.path():
        call = bench_host.prepared(bench_host.subjects()[name], mode)
        launches.clear()
        call()
        found[f"{name}, {mode}"] = len(launches)
x = torch.zeros(1)
json.dump({"launches": found, "after": [x.is_cuda, x.device.type, torch.cuda.is_available()]}, sys.stdout)
"""


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads(run(LAUNCHES))


def test_our_operations_launch_and_pytorchs_do_not(report):
    for case, count in report["launches"].items():
        theirs = case.startswith(("F.", "bare autograd", "decoder, plain"))
        assert (count == 0) == theirs, case
    assert report["launches"]["bare Triton launch, no gradient"] == 1
    for mode, count in (("no gradient", 1), ("forward", 1), ("backward", 2)):  # and the sum of the weight's gradient
        assert report["launches"][f"rms_norm_penalty, residual, {mode}"] == count


def test_a_step_launches_two_norms_a_block_and_loop_and_one_a_readout(report):
    """Forward and backward; twelve layers, four loops; and at least one launch a readout's chunk."""
    for dtype in ("fp32", "bf16"):
        assert report["launches"][f"decoder, fused, {dtype}, training step"] > 2 * (2 * 12 * 4 + 4)


def test_a_chunk_more_is_a_launch_more(report):
    one, eight = (report["launches"][f"looped_cross_entropy, {n}, forward"] for n in ("1 chunk", "8 chunks"))
    assert eight - one == 7


def test_nothing_of_it_stays(report):
    assert report["after"] == [False, "cpu", False]
