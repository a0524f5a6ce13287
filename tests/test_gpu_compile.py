"""Every kernel compiles for four GPUs without spills, within shared memory, on matrix units, with wide accesses.

No GPU is needed.  One interpreter a target, without TRITON_INTERPRET, runs bench/offline/compile_survey.py.  By
default a sample of the configurations; with GPU_CHECK=all in the environment all of them (half an hour for two targets
on two cores).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.offline.compile_survey import MATRIX_INSTRUCTIONS, MULTIPROCESSORS, amd_field, counted_on
from bench.offline.fake_gpu import TARGETS

ROOT = Path(__file__).parents[1]
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ODD_TOKENS = "of 2047 tokens"  # in the name of a case
KERNELS = {
    "norm_forward_kernel",
    "norm_backward_kernel",
    "radial_forward_kernel",
    "radial_backward_kernel",
    "swiglu_forward_kernel",
    "swiglu_backward_kernel",
    "loss_weights_kernel",
    "cross_entropy_kernel",
    "loss_sums_kernel",
    "stream_kernel",
    "combine_kernel",
}


def threads(kernel: dict, target: str) -> int:
    return kernel["constants"].get("num_warps", 4) * (64 if target == "gfx942" else 32)


def has_wide_tiles(kernel: dict, target: str) -> bool:
    """Whether a thread can access 16 bytes of a matrix at once: not where its share of a tile is less, as of 128 words
    in 16 bits, nor in a loop's losses where an odd number of tokens leaves all loops but the first unaligned."""
    on = kernel["constants"]
    if kernel["kernel"] in ("loss_weights_kernel", "loss_sums_kernel"):
        return ODD_TOKENS not in kernel["case"]
    if kernel["kernel"] != "cross_entropy_kernel":
        return True
    itemsize = 4 if kernel["dtypes"][0] == "torch.float32" else 2
    return on["BLOCK_ROWS"] * on["BLOCK_VOCAB"] * itemsize >= 16 * threads(kernel, target)


def narrow_limit(kernel: dict, target: str) -> int:
    """The most instructions that may access less than 16 bytes a thread: none of them is of a matrix.

    Narrow by nature are numbers of which a kernel reads or writes one a row (a thread may hold several rows) or one in
    all, and vectors that all rows share where a thread has too few of their elements.
    """
    on, name = kernel["constants"], kernel["kernel"]
    rows = min(8, on.get("BLOCK_ROWS", 1))
    if name in ("norm_forward_kernel", "norm_backward_kernel"):
        first = 1 + (on["HAS_RESIDUAL"] if name == "norm_forward_kernel" else on["HAS_DY"])  # of the vectors
        low = {"torch.bfloat16", "torch.float16"} & set(kernel["dtypes"][first : first + 1 + on.get("HAS_BIAS", False)])
        few = on["BLOCK_COLUMNS"] // threads(kernel, target) * 4 < 16
        vector = 2 if low or few else 0
        if name == "norm_forward_kernel":
            return rows * on["HAS_MEAN_SQUARE"] + vector * (on["HAS_WEIGHT"] + on["HAS_BIAS"])
        sums = (1 + on["ADD"]) * (on["HAS_DWEIGHT"] + on["HAS_DBIAS"]) if few else 0
        numbers = on["HAS_SCALE"] + rows * (on["HAS_DMEAN_SQUARE"] + 2 * on["HAS_RADIAL"])
        return numbers + vector * (on["HAS_WEIGHT"] + sums)
    if name in ("radial_forward_kernel", "radial_backward_kernel"):
        return 3 * rows
    if name in ("swiglu_forward_kernel", "swiglu_backward_kernel"):
        return 0
    if name == "cross_entropy_kernel":
        # an odd vocabulary's bias ends at any word, so it is read word by word: held blocks once, others twice
        bias = on["BLOCK_VOCAB"] // threads(kernel, target) * (on["HELD_BLOCKS"] or 2) if on["HAS_BIAS"] else 0
        return rows * (2 + on["HAS_GRADIENT"] + 4 * on["HAS_STATISTICS"]) + bias
    if name == "stream_kernel":  # seven results, the target; the bias as the products' layout holds it, word by word
        return 7 + 8 * on["HAS_TARGETS"] + (32 if target == "sm_100" else 16) * on["HAS_BIAS"]
    if name == "loss_weights_kernel":  # four results; weights of loops, or of tokens under the mask of the ignored
        return 4 + 20 * on["HAS_WEIGHTS"]
    assert name == "loss_sums_kernel"
    return 4  # two factors, two results


def survey(target: str, everything: bool) -> list[dict]:
    command = [sys.executable, "-m", "bench.offline.compile_survey", target, *([] if everything else ["--sampled"])]
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
    """The kernels that break a rule, a line each, which pytest's report would shorten: they are printed too."""
    broken = "\n".join(json.dumps(kernel) for kernel in kernels if not rule(kernel))
    print(broken)
    return broken


def test_every_kernel_is_compiled(compiled):
    assert {kernel["kernel"] for kernel in compiled} == KERNELS


def test_no_stack_and_no_spills(compiled):
    assert not offenders(compiled, lambda kernel: kernel["stack_bytes"] == kernel["spilled_registers"] == 0)


def test_shared_memory_within_limit(compiled, target):
    assert not offenders(compiled, lambda kernel: kernel["shared_bytes"] <= SHARED_BYTES[target])


def test_as_many_programs_are_resident_as_the_launcher_counts_on(compiled):
    """Where a grid is so many programs on each multiprocessor, so many fit: no second wave of the grid."""
    assert not offenders(compiled, lambda kernel: kernel["resident"] >= kernel["counted_on"])


def in_flight(kernel: dict) -> int:
    """Programs on a multiprocessor at a time, in a large launch."""
    return min(kernel["resident"], kernel["counted_on"] or kernel["resident"])


def test_a_pass_bound_by_memory_keeps_two_programs_and_16_warps_resident(compiled, target):
    """Else nothing loads while a program computes.  16 warps are those of 32 threads; AMD's have 64.

    A pass: what multiplies no matrices, with a program a multiprocessor at least.
    """
    of_a_warp = MULTIPROCESSORS[target].threads_of_a_warp
    passes = [k for k in compiled if not k["products"] and k["programs"] >= TARGETS[target].multiprocessors]
    assert passes
    assert not offenders(passes, lambda kernel: in_flight(kernel) >= 2)
    assert not offenders(passes, lambda kernel: in_flight(kernel) * kernel["warps"] * of_a_warp >= 16 * 32)


def test_products_use_matrix_units(compiled, target):
    """Each GPU's own instruction; except float32 products of full precision on NVIDIA, whose matrix units have none."""
    products = [kernel for kernel in compiled if kernel["kernel"] == "stream_kernel"]

    def on_matrix_units(kernel: dict) -> bool:
        full_precision = "torch.float32" in kernel["dtypes"][0] and kernel["constants"]["PRECISION"] == "ieee"
        return (kernel["matrix"] > 0) != (full_precision and target != "gfx942")

    assert any(kernel["matrix"] > 0 for kernel in products)
    assert not offenders(products, on_matrix_units)


def test_tensor_memory_within_limit(compiled, target):
    """Blackwell's: 512 columns a multiprocessor, which products of low precision use; no other GPU has it."""
    assert not offenders(compiled, lambda kernel: kernel["tensor_memory"] <= 512)
    assert any(kernel["tensor_memory"] > 0 for kernel in compiled) == (target == "sm_100")


def test_wide_accesses(compiled, target):
    """16 bytes a thread and access, for every matrix."""
    matrices = [k for k in compiled if k["kernel"] != "combine_kernel" and k["accesses"] and has_wide_tiles(k, target)]

    def narrow(kernel: dict) -> int:
        return sum(count for access, count in kernel["accesses"].items() if int(access.split()[1]) < 16)

    assert not offenders(matrices, lambda kernel: narrow(kernel) <= narrow_limit(kernel, target))
    assert not offenders(matrices, lambda kernel: any(access.endswith(" 16") for access in kernel["accesses"]))


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "name", "expected"),
    [
        (32, 0, 8, "sm_90", 8),  # 64 warps
        (64, 0, 4, "sm_90", 8),  # 65,536 registers in programs of 64 x 128
        (57, 0, 4, "sm_90", 8),  # given out in eights: 64 a thread
        (138, 0, 4, "sm_90", 3),  # a norm's backward pass as it was measured
        (124, 0, 4, "sm_90", 4),
        (255, 0, 8, "sm_80", 1),
        (16, 0, 1, "sm_100", 32),  # 32 programs at most
        (32, 100 * 1024, 4, "sm_90", 2),  # 228 KiB in programs of 101
        (32, 228 * 1024, 4, "sm_90", 0),
        (128, 0, 4, "gfx942", 4),  # 512 vector registers a lane and SIMD: 4 waves each
        (32, 40 * 1024, 4, "gfx942", 1),
    ],
)
def test_resident_programs(registers, shared_bytes, num_warps, name, expected):
    assert MULTIPROCESSORS[name].resident(registers, shared_bytes, num_warps) == expected


def test_what_a_launcher_counts_on_is_seen_in_its_grids():
    assert counted_on([(1024,), (132, 3), (264,)], 132) == 3
    assert counted_on([(1024,), (131,), (1,)], 132) == 0


def test_the_limits_of_narrow_accesses_follow_the_flags():
    flags = dict.fromkeys(("HAS_RESIDUAL", "HAS_WEIGHT", "HAS_BIAS", "HAS_MEAN_SQUARE"), False)
    flags |= {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 1024, "num_warps": 4}
    kernel = {"kernel": "norm_forward_kernel", "dtypes": ["torch.float32"] * 2, "constants": flags}
    assert narrow_limit(kernel, "sm_90") == 0
    assert narrow_limit(kernel | {"constants": flags | {"HAS_MEAN_SQUARE": True}}, "sm_90") == 2
    biased = kernel | {"constants": flags | {"HAS_BIAS": True}}
    assert narrow_limit(biased, "sm_90") == 0  # LayerNorm's bias is a vector of float32
    assert narrow_limit(biased | {"dtypes": ["torch.float32", "torch.bfloat16"]}, "sm_90") == 2


# A kernel that spills on purpose: thousands of sums that live until the end.
SPILLS = """
import sys
import torch, triton, triton.language as tl
from triton.compiler import ASTSource
from bench.offline.fake_gpu import TARGETS
from bench.offline.compile_survey import amd_field, resources
from bench.offline.record import Compiled

@triton.jit
def greedy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    held = ()
    for block in tl.static_range(24):
        held = held + (tl.load(x_ptr + block * BLOCK + at),)
    total = tl.sum(held[0])
    for block in tl.static_range(24):
        total += tl.sum(held[block])
    for block in tl.static_range(24):
        tl.store(out_ptr + block * BLOCK + at, held[block] * total)

target = TARGETS[sys.argv[1]]
source = ASTSource(greedy_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 8192})
compiled = triton.compile(source, target=target.triton, options={"num_warps": 4})
found = resources(Compiled(compiled, {}, ()), target, kernel="greedy_kernel", case="")
print(found.stack_bytes > 0, found.spilled_registers > 0)
"""


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_a_kernel_that_spills_is_noticed(name):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel from its file
        file = Path(folder) / "spills.py"
        file.write_text(SPILLS)
        done = subprocess.run(
            [sys.executable, str(file), name], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.stdout.strip() == "True True", done.stdout + done.stderr[-4000:]


def test_metadata_that_is_missing_is_an_error():
    assert amd_field("  .vgpr_count:     84\n", "vgpr_count") == 84
    with pytest.raises(ValueError, match=r"must have \.vgpr_spill_count"):
        amd_field("  .vgpr_count:     84\n", "vgpr_spill_count")


def test_the_matrix_instruction_of_one_target_is_not_that_of_another():
    lines = {
        "sm_80": "HMMA.16816.F32.BF16 R4, R132, R136, R4 ;",
        "sm_90": "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;",
        "sm_100": "UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR10], tmem[UR4], idesc[UR5], UPT ;",
        "gfx942": "v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]",
    }
    for target, pattern in MATRIX_INSTRUCTIONS.items():
        assert [name for name, line in lines.items() if re.search(pattern, line)] == [target]
