"""How long a recorded launch would take on a GPU that is not there: a roofline, always *predicted*, never measured.

The time of a launch is the largest of

- its FLOPs at 0.81 of the peak dense bf16 rate that the maker states;
- its bytes at 0.9 of the peak bandwidth: every tensor read and written once, whether or not a cache held it, and what a
  kernel reads again once more if all that its resident programs hold exceeds the last cache level;
- its dependent round trips to memory, one after the other, at 0.7 us: a program that takes its rows in turn waits for
  each, and so does a wave of programs for the one before it;
- the launch itself, 3 us.

Resident programs follow from registers, shared memory and warps of the compiled kernel and the device's limits.
Not charged: waits of the host, traffic between caches, locks, instructions that are not matrix products.
Limits: NVIDIA's tuning guides for Ampere, Hopper, Blackwell; AMD's CDNA 3 instruction set and white paper.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.fake_gpu import TARGETS
from bench.gpu_compile import Resources, resources
from bench.gpu_record import Call, Record

LAUNCH_SECONDS = 3e-6
ROUND_TRIP_SECONDS = 0.7e-6
FLOPS_SHARE, BYTES_SHARE = 0.81, 0.9


@dataclass(frozen=True)
class Device:
    """Peaks in FLOP/s and bytes/s; last cache level in bytes; per multiprocessor: registers, warps, programs, shared.

    A warp's registers come in units of `register_unit`; every program takes `shared_reserved` bytes more.
    """

    peak_flops: float
    peak_bytes: float
    cache_bytes: int
    warps: int
    programs: int
    shared_bytes: int
    registers: int = 65_536
    register_unit: int = 256
    shared_reserved: int = 1024
    threads_of_a_warp: int = 32

    @property
    def flops(self) -> float:
        return FLOPS_SHARE * self.peak_flops

    @property
    def bytes(self) -> float:
        return BYTES_SHARE * self.peak_bytes


MIB = 2**20
DEVICES = {
    "sm_80": Device(312e12, 2.04e12, 40 * MIB, warps=64, programs=32, shared_bytes=164 * 1024),
    "sm_90": Device(989e12, 3.35e12, 50 * MIB, warps=64, programs=32, shared_bytes=228 * 1024),
    "sm_100": Device(2250e12, 8.0e12, 126 * MIB, warps=64, programs=32, shared_bytes=228 * 1024),
    "gfx942": Device(
        1307e12, 5.3e12, 256 * MIB, warps=32, programs=16, shared_bytes=64 * 1024,
        registers=4 * 512 * 64, register_unit=8 * 64, shared_reserved=0, threads_of_a_warp=64,
    ),
}  # fmt: skip


def resident_programs(kernel: Resources, num_warps: int, device: Device) -> int:
    """Programs of a kernel that one multiprocessor holds at a time; 0 where not even one fits."""
    unit = device.register_unit
    per_warp = math.ceil(max(1, kernel.registers) * device.threads_of_a_warp / unit) * unit
    limits = [device.programs, device.warps // num_warps, device.registers // (per_warp * num_warps)]
    if kernel.shared_bytes + device.shared_reserved:
        limits.append(device.shared_bytes // (kernel.shared_bytes + device.shared_reserved))
    return min(limits)


class Compiled(NamedTuple):
    """A kernel's resources, the programs that a multiprocessor holds, and the share of its warps that they fill."""

    resources: Resources
    resident: int
    occupancy: float


@functools.cache  # disassembled once, however many records hold the kernel
def _resources(kernel: Any, target: str, name: str, constants: tuple, dtypes: tuple[str, ...]) -> Resources:
    return resources(kernel, TARGETS[target], kernel=name, constants=dict(constants), dtypes=dtypes, case="")


def compiled_kernels(record: Record, target: str) -> dict[Any, Compiled]:
    """Every compiled kernel of a record."""
    device, found = DEVICES[target], {}
    for key, (kernel, constants, dtypes) in record.kernels.items():
        used = _resources(kernel, target, key[0], constants, dtypes)
        warps = kernel.metadata.num_warps
        resident = resident_programs(used, warps, device)
        found[key] = Compiled(used, resident, resident * warps / device.warps)
    return found


# What a launch does beyond reading and writing its tensors once ------------------------------------------------------


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


TRIPS: dict[str, Callable[[Call], int]] = {
    "norm_backward_kernel": lambda c: _blocks(
        _blocks(c.arguments["n_rows"], c.arguments["BLOCK_ROWS"]), math.prod(c.grid)
    ),
    "cross_entropy_kernel": lambda c: (
        1
        if c.arguments["HELD_BLOCKS"]
        else _blocks(c.arguments["n_rows"], math.prod(c.grid))
        * (2 * _blocks(c.arguments["n_columns"], c.arguments["BLOCK_VOCAB"]))
    ),  # a row that registers hold is loaded at once
    "loss_weights_kernel": lambda c: (
        _blocks(c.arguments["n_tokens"], c.arguments["BLOCK_TOKENS"])
        * (2 * c.arguments["n_loops"] + 2 if c.arguments["HAS_WEIGHTS"] else 1)
    ),
    "loss_sums_kernel": lambda c: (
        c.arguments["n_loops"] * _blocks(c.arguments["n_tokens"], c.arguments["BLOCK_TOKENS"])
        + _blocks(c.arguments["n_rows"], c.arguments["BLOCK_TOKENS"])
    ),
    "_rms_norm_backward_kernel": lambda c: c.arguments["rows_per_program"],
    "liger_cross_entropy_kernel": lambda c: 2 * _blocks(c.arguments["n_cols"], c.arguments["BLOCK_SIZE"]),
}


def read_again(call: Call, at_once: float, cache_bytes: int) -> int:
    """Bytes that a kernel reads a second time from memory; at_once: the share of its programs that are resident."""
    arguments = call.arguments
    if call.name == "cross_entropy_kernel" and not arguments["HELD_BLOCKS"]:
        rows, n_groups = arguments["logits_ptr"], _blocks(arguments["n_rows"], arguments["BLOCK_ROWS"])
        held = rows * at_once * math.prod(call.grid) / n_groups  # a program holds one group of rows after the other
        return rows if held > cache_bytes else 0
    if call.name == "liger_cross_entropy_kernel":
        rows = arguments["X_ptr"]
        return rows if at_once * rows > cache_bytes else 0
    if call.name == "stream_kernel":  # resident programs sweep the vocabulary side by side
        head = arguments["head_ptr"]
        return head * (math.ceil(1 / at_once) - 1) if head > cache_bytes else 0
    if call.name in ("_cce_lse_forward_kernel", "_cce_backward_kernel"):  # a group of row blocks sweeps it
        sweeps = _blocks(_blocks(arguments["B"], arguments["BLOCK_B"]), arguments["GROUP_B"])
        head = arguments["C"] * (3 if "backward" in call.name else 1)  # its gradient is read and written too
        return head * (sweeps - 1) if head > cache_bytes else 0
    return 0


class Prediction(NamedTuple):
    """Predicted seconds of a launch, what bounds them, and the bytes that they are predicted from."""

    seconds: float
    bound: str
    bytes: int


def predict(call: Call, target: str, compiled: dict[Any, Compiled]) -> Prediction:
    """See the module's docstring."""
    device, n_bytes, trips = DEVICES[target], call.read_write_bytes, 0
    if call.key is not None:
        programs = math.prod(call.grid)
        resident = compiled[call.key].resident * TARGETS[target].multiprocessors
        if resident == 0:
            raise ValueError(f"{call.name} must fit {TARGETS[target].name}. Got {compiled[call.key].resources}.")
        n_bytes += read_again(call, min(1.0, resident / programs), device.cache_bytes)
        trips = TRIPS.get(call.name, lambda _: 1)(call) * _blocks(programs, resident)
    bounds = {
        "FLOPs": call.flops / device.flops,
        "bytes": n_bytes / device.bytes,
        "round trips": trips * ROUND_TRIP_SECONDS,
        "launch": LAUNCH_SECONDS,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return Prediction(bounds[bound], bound, n_bytes)


class Total(NamedTuple):
    """Of all launches of a record, predicted."""

    seconds: float
    bytes: int
    flops: int
    launches: int


def total(record: Record, target: str) -> Total:
    compiled = compiled_kernels(record, target)
    predicted = [predict(call, target, compiled) for call in record.calls]
    return Total(
        sum(p.seconds for p in predicted),
        sum(p.bytes for p in predicted),
        sum(call.flops for call in record.calls),
        record.launches(),
    )
