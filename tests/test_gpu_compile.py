"""Every kernel compiles for four GPUs without spills, within shared memory, with wide accesses.

bench/offline/compile_survey.py compiles them without a GPU.  By default a sample of the configurations; with
GPU_CHECK=all in the environment all of them (half an hour for two targets on two cores).
"""

import json
import os
import re

import pytest
from uninterpreted import run

from bench.offline.compile_survey import MULTIPROCESSORS, amd_field, counted_on
from bench.offline.fake_gpu import TARGETS
from looped.kernels.row_norm_triton import backward_options, norm_tile, resident_programs

ODD_TOKENS = "of 2047 tokens"  # in the name of a case
KERNELS = {
    "norm_forward_kernel",
    "norm_backward_kernel",
    "sum_rows_kernel",
    "radial_forward_kernel",
    "radial_backward_kernel",
    "swiglu_forward_kernel",
    "swiglu_backward_kernel",
    "row_weights_kernel",
    "cross_entropy_kernel",
    "parts_kernel",
    "finish_kernel",
    "loss_sums_kernel",
    "scaled_kernel",
}


def threads(kernel: dict, target: str) -> int:
    return kernel["warps"] * MULTIPROCESSORS[target].threads_of_a_warp


def has_odd_vocabulary(kernel: dict) -> bool:
    """Whether vectors of the vocabulary's length end in the middle of 16 words: they are read word by word."""
    found = re.search(r"V=(\d+)", kernel["case"])
    return found is not None and int(found.group(1)) % 16 > 0


def has_wide_tiles(kernel: dict, target: str) -> bool:
    """Whether a thread can access 16 bytes of a matrix at once.

    Not where its share of a tile is less, as of 128 words in 16 bits; nor in a loop's losses where an odd number of
    tokens leaves all loops but the first unaligned; nor in the gradient of an odd vocabulary's bias.
    """
    on, dtypes = kernel["constants"], kernel["dtypes"]
    if kernel["kernel"] == "finish_kernel" and not on["GRADIENT"]:
        return False  # it reads no row of logits
    if kernel["kernel"] in ("row_weights_kernel", "loss_sums_kernel"):
        return ODD_TOKENS not in kernel["case"]
    if kernel["kernel"] == "scaled_kernel":
        return not has_odd_vocabulary(kernel)
    if kernel["kernel"] not in ("cross_entropy_kernel", "parts_kernel", "finish_kernel"):
        return True
    itemsize = 4 if dtypes["logits"] == "torch.float32" else 2
    return on["BLOCK_VOCAB"] * itemsize >= 16 * threads(kernel, target)


def narrow_limit(kernel: dict, target: str) -> int:
    """The most instructions that may access less than 16 bytes a thread: none of them is of a matrix.

    Narrow by nature are numbers of which a kernel reads or writes one a row (a thread may hold several rows) or one in
    all, and vectors that all rows share where a thread has too few of their elements.
    """
    on, dtypes, name = kernel["constants"], kernel["dtypes"], kernel["kernel"]
    rows = min(8, on.get("BLOCK_ROWS", 1))

    def given(*tensors: str) -> int:
        return sum(tensor in dtypes for tensor in tensors)

    if name in ("norm_forward_kernel", "norm_backward_kernel"):
        few = on["BLOCK_COLUMNS"] // threads(kernel, target) * 4 < 16
        vectors = [dtypes[vector] for vector in ("weight", "bias") if vector in dtypes]
        narrow = 2 * sum(few or dtype != "torch.float32" for dtype in vectors)
        if name == "norm_forward_kernel":
            return narrow + rows * given("mean_square")
        sums = (1 + on["ADD"]) * given("dweight", "dbias") if few else 0
        loaded = on["STAGES"] * given("row_weight", "dmean_square")  # ahead of the loop, and in it
        return narrow + 2 * sums + given("scale") + rows * (loaded + given("dot", "fraction"))
    if name == "radial_forward_kernel":
        return 4 * rows
    if name == "radial_backward_kernel":
        return 3 * rows
    if name in ("swiglu_forward_kernel", "swiglu_backward_kernel"):
        return 0
    if name == "cross_entropy_kernel":
        reads = 1 + (on["GRADIENT"] or given("statistics"))
        # whole steps and the rest, of which compilers take one out of its loop; and the step of the maximum
        passes = 2 * reads + 2 if given("statistics") else reads
        words = passes * (on["BLOCK_VOCAB"] // threads(kernel, target)) if has_odd_vocabulary(kernel) else 0
        numbers = 3 + on["GRADIENT"] + given("row_weight", "z_loss") + 4 * given("statistics")
        return numbers + (1 + words) * given("bias")  # the numbers: the target, its logit and gradient, the loss
    if name in ("parts_kernel", "finish_kernel"):
        passes = 1 + 5 * on.get("STATISTICS", 0)
        words = passes * (on["BLOCK_VOCAB"] // threads(kernel, target)) if has_odd_vocabulary(kernel) else 0
        of_bias = (1 + words) * given("bias")  # the target's, or what label smoothing sums, which these cases have then
        if name == "parts_kernel":
            return 2 + (7 if on["STATISTICS"] else 4) + of_bias  # the target, its logit, what is sent
        # the target, its gradient, the loss, and three of what all have sent
        return 5 + on["GRADIENT"] + given("row_weight", "z_loss") + 7 * given("statistics") + of_bias
    if name == "row_weights_kernel":  # four results; weights under the mask of the ignored
        return 4 + given("penalty", "n_targets") + 20 * given("weights")
    if name == "loss_sums_kernel":
        return 5  # three factors, two results
    assert name in ("scaled_kernel", "sum_rows_kernel")
    return 1


@pytest.fixture(scope="module")
def surveys() -> dict[str, list[dict]]:
    program = "import json, sys; from bench.offline.compile_survey import surveys\n"
    return json.loads(
        run(program + "print(json.dumps(surveys(sampled=sys.argv[1] != 'all')))", os.environ.get("GPU_CHECK"))
    )


@pytest.fixture(params=TARGETS)
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
    """But for a norm's backward pass over 4,096 columns, two programs of which are quicker than one of twice the warps.

    They fill the registers, and a thread may keep 32 bytes of a hundred values.
    """

    def kept(kernel: dict) -> int:
        full = kernel["kernel"] == "norm_backward_kernel" and kernel["constants"]["BLOCK_COLUMNS"] == 4096
        return 32 if full else 0

    assert not offenders(
        compiled,
        lambda kernel: kernel["stack_bytes"] <= kept(kernel) and kernel["spilled_registers"] <= kept(kernel) / 2,
    )


OF_EVERY_NVIDIA = 99 * 1024  # bytes of shared memory that a program may have; those of the targets may have more


def test_shared_memory_within_limit(compiled, target):
    limit = TARGETS[target].shared_bytes if TARGETS[target].is_amd else OF_EVERY_NVIDIA
    assert not offenders(compiled, lambda kernel: kernel["shared_bytes"] <= limit)


@pytest.mark.parametrize("n_columns", [16, 100, 768, 4096, 5000, 8192, 16_384, 65_536])
@pytest.mark.parametrize("column_bytes", [4, 6, 10, 12])
def test_rows_loaded_ahead_fit_every_gpu(n_columns, column_bytes):
    """Beside a kilobyte for sums, in one program and in all that are resident; a wide row is not loaded ahead."""
    rows, columns = norm_tile(n_columns)
    stages, options = backward_options(n_columns, column_bytes)
    of_program = (stages - 1) * rows * columns * column_bytes + 1024
    assert of_program <= OF_EVERY_NVIDIA
    assert resident_programs(n_columns) * of_program <= 100 * 1024
    assert options["maxnreg"] >= 128


def test_as_many_programs_are_resident_as_the_launcher_counts_on(compiled):
    """Where a grid is so many programs on each multiprocessor, so many fit: no second wave of the grid."""
    assert not offenders(compiled, lambda kernel: kernel["resident"] >= kernel["counted_on"])


def in_flight(kernel: dict) -> int:
    """Programs on a multiprocessor at a time, in a large launch."""
    return min(kernel["resident"], kernel["counted_on"] or kernel["resident"])


def test_a_pass_bound_by_memory_keeps_two_programs_and_16_warps_resident(compiled, target):
    """Else nothing loads while a program computes; 12 warps where each loads ahead.  Of 32 threads: AMD's have 64.

    A pass has a program a multiprocessor at least.  Rows of a norm beyond 4,096 columns take a program of 16 warps.
    """
    passes = [kernel for kernel in compiled if kernel["programs"] >= TARGETS[target].multiprocessors]
    assert passes
    of_shorter_rows = [kernel for kernel in passes if kernel["constants"].get("BLOCK_COLUMNS", 0) <= 4096]
    assert not offenders(of_shorter_rows, lambda kernel: in_flight(kernel) >= 2)

    def needed(kernel: dict) -> int:
        return 16 if kernel["constants"].get("STAGES", 1) == 1 else 12

    assert not offenders(passes, lambda kernel: in_flight(kernel) * threads(kernel, target) >= needed(kernel) * 32)


def test_plain_rows_of_logits_keep_32_warps_resident(compiled, target):
    """The pass over the logits moves most of the bytes, and most trainings have neither bias nor softcap.

    Of float32, whose words are twice as long, 24.  A row of 128 words is a program of one warp, of which a
    multiprocessor holds 32.
    """
    plain = [
        kernel
        for kernel in compiled
        if kernel["kernel"] == "cross_entropy_kernel" and not {"bias", "statistics"} & kernel["dtypes"].keys()
    ]
    assert plain
    most = MULTIPROCESSORS[target].programs

    def warps(kernel: dict) -> int:
        return 24 if kernel["dtypes"]["logits"] == "torch.float32" else 32

    assert not offenders(
        plain,
        lambda kernel: in_flight(kernel) * threads(kernel, target) >= warps(kernel) * 32 or in_flight(kernel) == most,
    )


def test_wide_accesses(compiled, target):
    """16 bytes a thread and access, for every matrix."""
    matrices = [kernel for kernel in compiled if kernel["accesses"] and has_wide_tiles(kernel, target)]

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


def test_the_limits_of_narrow_accesses_follow_the_tensors_that_are_given():
    tile = {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 1024}
    kernel = {"kernel": "norm_forward_kernel", "dtypes": {"x": "torch.bfloat16"}, "constants": tile, "warps": 4}
    assert narrow_limit(kernel, "sm_90") == 0
    assert narrow_limit(kernel | {"dtypes": {"mean_square": "torch.float32"}}, "sm_90") == 2
    assert narrow_limit(kernel | {"dtypes": {"bias": "torch.float32"}}, "sm_90") == 0
    assert narrow_limit(kernel | {"dtypes": {"bias": "torch.bfloat16", "weight": "torch.float32"}}, "sm_90") == 2
    assert narrow_limit(kernel | {"dtypes": {"weight": "torch.float32"}, "warps": 16}, "sm_90") == 2
    rows = {"kernel": "cross_entropy_kernel", "constants": {"BLOCK_VOCAB": 2048, "GRADIENT": True}, "warps": 8}
    rows |= {"dtypes": {"logits": "torch.bfloat16", "bias": "torch.float32"}}
    assert narrow_limit(rows | {"case": "losses d=512 V=20000"}, "sm_90") == 5
    assert narrow_limit(rows | {"case": "losses d=512 V=50257"}, "sm_90") == 5 + 2 * 8


# A kernel that spills on purpose: thousands of sums that live until the end.
SPILLS = """
import triton, triton.language as tl
from triton.compiler import ASTSource
from bench.offline.fake_gpu import TARGETS
from bench.offline.compile_survey import measured

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

source = ASTSource(greedy_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 8192})
for target in (TARGETS["sm_90"], TARGETS["gfx942"]):
    compiled = triton.compile(source, target=target.triton, options={"num_warps": 4})
    (found,) = measured([compiled], target)
    print(target.name, found["stack_bytes"] > 0, found["spilled_registers"] > 0)
"""


def test_a_kernel_that_spills_is_noticed(tmp_path):
    (tmp_path / "spills.py").write_text(SPILLS)  # Triton reads a kernel from its file
    assert run("import spills", packages=tmp_path) == "H100 True True\nMI300X True True\n"


def test_metadata_that_is_missing_is_an_error():
    assert amd_field("  .vgpr_count:     84\n", "vgpr_count") == 84
    with pytest.raises(ValueError, match=r"must have \.vgpr_spill_count"):
        amd_field("  .vgpr_count:     84\n", "vgpr_spill_count")
