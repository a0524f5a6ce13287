"""Every kernel compiles for four GPUs without spills, within shared memory, on matrix units, with wide accesses.

No GPU is needed.  One interpreter a target, without TRITON_INTERPRET, runs bench/gpu_compile.py.  By default a sample
of the configurations; with GPU_CHECK=all in the environment all of them (minutes a target).
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
KERNELS = {
    "norm_forward_kernel",
    "norm_backward_kernel",
    "radial_forward_kernel",
    "radial_backward_kernel",
    "loss_weights_kernel",
    "cross_entropy_kernel",
    "loss_sums_kernel",
    "stream_kernel",
    "combine_kernel",
}

# The most instructions that access less than 16 bytes: a kernel's loads and stores of one number a row (or one number
# in all) are narrow by nature, and a thread may hold several rows.  combine_kernel has no others.
NARROW_INSTRUCTIONS = {
    "norm_forward_kernel": 2,  # one store
    "norm_backward_kernel": 8,  # two loads, two stores
    "radial_forward_kernel": 6,  # three stores
    "radial_backward_kernel": 6,  # three loads
    "loss_weights_kernel": 24,  # a loop's weight, in loops that the compiler unrolls; four results
    "loss_sums_kernel": 4,  # two factors, two results
    "cross_entropy_kernel": 7,  # target, weight; five results
    "stream_kernel": 15,  # target, for up to eight rows; seven results
}


def survey(target: str, everything: bool) -> list[dict]:
    command = [sys.executable, "-m", "bench.gpu_compile", target, *([] if everything else ["--sampled"])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{target}: {done.stderr[-4000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def surveys() -> dict[str, list[dict]]:
    everything = os.environ.get("GPU_CHECK") == "all"
    with ThreadPoolExecutor(max_workers=2) as pool:
        reports = pool.map(lambda target: survey(target, everything), SHARED_BYTES)
        return dict(zip(SHARED_BYTES, reports, strict=True))


@pytest.fixture(params=SHARED_BYTES)
def target(request) -> str:
    return request.param


@pytest.fixture
def compiled(target, surveys) -> list[dict]:
    return surveys[target]


def offenders(kernels: list[dict], rule) -> str:
    """The kernels that break a rule, for the test's message."""
    return "\n".join(json.dumps(kernel) for kernel in kernels if not rule(kernel))


def test_every_kernel_is_compiled(compiled):
    assert {kernel["kernel"] for kernel in compiled} == KERNELS


def test_no_stack_and_no_spills(compiled):
    assert not offenders(compiled, lambda kernel: kernel["stack_bytes"] == kernel["spilled_registers"] == 0)


def test_shared_memory_within_limit(compiled, target):
    assert not offenders(compiled, lambda kernel: kernel["shared_bytes"] <= SHARED_BYTES[target])


def test_products_use_matrix_units(compiled, target):
    """Except float32 products of full precision on NVIDIA, whose matrix units have none."""
    products = [kernel for kernel in compiled if kernel["kernel"] == "stream_kernel"]

    def on_matrix_units(kernel: dict) -> bool:
        full_precision = "torch.float32" in kernel["dtypes"][0] and kernel["constants"]["PRECISION"] == "ieee"
        return kernel["matrix"] > 0 or (full_precision and target != "gfx942")

    assert any(kernel["matrix"] > 0 for kernel in products)
    assert not offenders(products, on_matrix_units)


def test_wide_accesses(compiled):
    """16 bytes a thread and access, except what is one number a row, and a vocabulary's bias vector."""

    def wide(kernel: dict) -> bool:
        narrow = sum(count for access, count in kernel["accesses"].items() if int(access.split()[1]) < 16)
        return narrow <= NARROW_INSTRUCTIONS[kernel["kernel"]]

    matrices = [k for k in compiled if k["kernel"] != "combine_kernel" and not k["constants"].get("HAS_BIAS")]
    assert not offenders(matrices, wide)
    for kernel in matrices:
        assert any(access.endswith(" 16") for access in kernel["accesses"]), kernel
