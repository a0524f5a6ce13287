"""Occupancy, bytes and predicted times of single calls, against numbers worked out by hand."""

import pytest
import torch

from bench.gpu_compile import Resources
from bench.gpu_record import Call, launch_bytes, traffic
from bench.gpu_roofline import DEVICES, LAUNCH_SECONDS, ROUND_TRIP_SECONDS, Compiled, predict, resident_programs

H100, MI300 = DEVICES["sm_90"], DEVICES["gfx942"]


def kernel(registers: int = 32, shared_bytes: int = 0) -> Resources:
    return Resources("kernel", {}, (), "", registers, 0, 0, shared_bytes, 0, {})


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "device", "expected"),
    [
        (32, 0, 8, H100, 8),  # 64 warps
        (64, 0, 4, H100, 8),  # 65,536 registers in programs of 64 x 128
        (57, 0, 4, H100, 8),  # given out in eights: 64 a thread
        (255, 0, 8, H100, 1),
        (16, 0, 1, H100, 32),  # 32 programs at most
        (32, 100 * 1024, 4, H100, 2),  # 228 KiB in programs of 101
        (32, 228 * 1024, 4, H100, 0),
        (128, 0, 4, MI300, 4),  # 512 vector registers a lane and SIMD: 4 waves each
        (32, 40 * 1024, 4, MI300, 1),
    ],
)
def test_resident_programs(registers, shared_bytes, num_warps, device, expected):
    assert resident_programs(kernel(registers, shared_bytes), num_warps, device) == expected


def test_the_largest_bound_counts():
    flops, n_bytes = Call("mm", 10**6, 10**12), Call("mm", 10**10, 10**9)
    assert predict(flops, "sm_90", {})[:2] == (pytest.approx(1e12 / (0.81 * 989e12)), "FLOPs")
    assert predict(n_bytes, "sm_90", {})[:2] == (pytest.approx(1e10 / (0.9 * 3.35e12)), "bytes")
    assert predict(Call("add", 8, 0), "sm_90", {})[:2] == (LAUNCH_SECONDS, "launch")


def triton_call(name: str, grid: int, arguments: dict) -> Call:
    return Call(name, 1000, 0, (grid,), arguments, key=(name, "hash"))


def test_rows_in_turn_wait_for_each_other():
    """One program a multiprocessor, 249 rows each: 249 trips; two waves of them twice as many."""
    for grid, trips in ((132, 249), (264, 498)):
        call = triton_call("_rms_norm_backward_kernel", grid, {"rows_per_program": 249})
        compiled = {call.key: Compiled(kernel(), 1, 0.5)}
        assert predict(call, "sm_90", compiled)[:2] == (pytest.approx(trips * ROUND_TRIP_SECONDS), "round trips")


@pytest.mark.parametrize(("grid", "resident", "again"), [(4096, 1, False), (4096, 16, True), (132, 16, False)])
def test_rows_read_twice_from_memory_where_the_cache_is_too_small(grid, resident, again):
    """4096 rows of 40,000 bytes: 132 of them are 5 MB, 2112 of them 84 MB, and the H100's cache holds 50."""
    arguments = {
        "HELD_BLOCKS": 0, "n_rows": 4096, "BLOCK_ROWS": 1, "n_columns": 20_000, "BLOCK_VOCAB": 2048,
        "logits_ptr": 4096 * 40_000,
    }  # fmt: skip
    call = triton_call("cross_entropy_kernel", grid, arguments)
    predicted = predict(call, "sm_90", {call.key: Compiled(kernel(), resident, 0.5)})
    assert predicted.bytes == 1000 + again * 4096 * 40_000


def test_a_kernel_that_does_not_fit_is_an_error():
    call = triton_call("norm_forward_kernel", 1, {})
    with pytest.raises(ValueError, match="norm_forward_kernel must fit H100"):
        predict(call, "sm_90", {call.key: Compiled(kernel(), 0, 0.0)})


def test_traffic_of_ops_that_touch_a_part():
    aten, x, index = torch.ops.aten, torch.zeros(1000, 8), torch.zeros(5, dtype=torch.int64)
    part = torch.zeros(5, 8)
    assert traffic(aten.add.Tensor, (x, x), [x.clone()]) == 2 * 32_000  # the same tensor twice is read once
    assert traffic(aten.new_zeros.default, (x, [2]), [torch.zeros(2)]) == 8
    assert traffic(aten.zeros_like.default, (x,), [x.clone()]) == 32_000
    assert traffic(aten.index_select.default, (x, 0, index), [part]) == 40 + 2 * 160
    assert traffic(aten.index_add_.default, (x, 0, index, part), [x]) == 40 + 160 + 2 * 160


def test_bytes_of_a_launch_that_gathers_rows():
    """cut-cross-entropy's target logits: one row of the head a token, not the head."""
    tensors = {"E": torch.zeros(5, 8), "C": torch.zeros(1000, 8), "Inds": torch.zeros(5, dtype=torch.int64)}
    assert launch_bytes("_indexed_neg_dot_forward_kernel", tensors, set()) == 160 + 160 + 40
    assert launch_bytes("_cce_lse_forward_kernel", tensors, {"E"}) == 2 * 160 + 32_000 + 40
