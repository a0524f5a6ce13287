"""What Triton makes of every kernel for a GPU that is not there: registers, stack, shared memory, accesses.

A survey calls the public functions of `kernels` on fake CUDA tensors (bench/offline/fake_gpu.py) at the shapes and with
the options of bench/offline/cases.py.  So every kernel is compiled in every configuration that a launcher chooses
there.  No GPU is needed: Triton's package has its compiler, NVIDIA's assembler and disassembler.
"""

import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from bench.offline.cases import cases
from bench.offline.fake_gpu import TARGETS, Target, fake_gpu

NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"  # its assembler and disassembler
INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one multiprocessor share: warps, programs, registers of all threads, shared memory.

    A warp's registers are given out in units of `register_unit`; a program takes `shared_reserved` bytes beyond its
    own.  From NVIDIA's tuning guides for Ampere, Hopper and Blackwell, and AMD's CDNA 3 instruction set.
    """

    warps: int
    shared_bytes: int
    threads_of_a_warp: int = 32
    programs: int = 32
    registers: int = 65_536
    register_unit: int = 256
    shared_reserved: int = 1024

    def resident(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """How many programs are on it at a time; 0 where not even one fits."""
        of_warp = math.ceil(max(1, registers) * self.threads_of_a_warp / self.register_unit) * self.register_unit
        limits = [self.programs, self.warps // num_warps, self.registers // (of_warp * num_warps)]
        if shared_bytes + self.shared_reserved:
            limits.append(self.shared_bytes // (shared_bytes + self.shared_reserved))
        return min(limits)


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(warps=64, shared_bytes=164 * 1024),
    "sm_90": Multiprocessor(warps=64, shared_bytes=228 * 1024),
    "sm_100": Multiprocessor(warps=64, shared_bytes=228 * 1024),
    "gfx942": Multiprocessor(
        warps=32, shared_bytes=64 * 1024, threads_of_a_warp=64, programs=16, registers=4 * 512 * 64,
        register_unit=8 * 64, shared_reserved=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.  Bytes: of one program (shared) or one thread (stack).

    warps: of a program; resident: programs that a multiprocessor holds at a time; programs: of its largest launch;
    counted_on: programs a multiprocessor that its launcher counts on, where the grid is so many on each, else 0;

    spilled_registers: on NVIDIA the instructions that access local memory, on AMD the vector registers kept there.
    accesses: instructions by width in bytes a thread, e.g. {"load 16": 8}.
    """

    kernel: str
    constants: dict[str, Any]
    dtypes: dict[str, str]
    case: str
    registers: int
    stack_bytes: int
    spilled_registers: int
    shared_bytes: int
    accesses: dict[str, int]
    warps: int
    resident: int
    programs: int
    counted_on: int


# Reading what the compilers wrote -------------------------------------------------------------------------------------


def _widths(instructions: list[tuple[str, int]]) -> dict[str, int]:
    """Global accesses by kind and width in bytes a thread."""
    return dict(sorted(Counter(f"{kind} {width}" for kind, width in instructions).items()))


def _sass_width(modifiers: str) -> int:
    """Bytes of an access from its modifiers, as in LDG.E.128 or LDGSTS.E.BYPASS.LTC128B.128."""
    for name, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in modifiers.split("."):
            return width
    return 4


def _code_of(cubin: bytes) -> bytes:
    """The instructions of a kernel's ELF file: its section .text."""
    (sections,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    found = [struct.unpack_from("<IIQQQQ", cubin, sections + size * number) for number in range(count)]
    (code,) = (
        cubin[offset : offset + length]
        for name, *_, offset, length in found
        if cubin.startswith(b".text.", found[names][4] + name)
    )
    return code


def _disassembled(codes: list[bytes], target: Target) -> list[str]:
    """The instructions of every kernel as text.

    All are disassembled at once: the disassembler takes a quarter of a second to begin, and almost nothing a kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [NVIDIA / "nvdisasm", "--binary", f"SM{target.triton.arch}", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    instructions = [line for line in lines if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    ends = [end // INSTRUCTION_BYTES for end in accumulate(map(len, codes))]
    assert len(instructions) == ends[-1], f"{len(instructions)} instructions in {sum(map(len, codes))} bytes"
    return ["\n".join(instructions[start:end]) for start, end in pairwise([0, *ends])]


def _nvidia(cubin: bytes, sass: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "spilled_registers": len(re.findall(r"\b(?:LDL|STL)\b", sass)),  # accesses of local memory
        "accesses": _widths(
            [
                ("store" if name == "STG" else "load", _sass_width(modifiers))
                for name, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)+)", sass)
            ]
        ),
    }


def amd_field(text: str, name: str) -> int:
    """A number of the metadata of AMD assembly; one that is missing would read as a kernel without faults."""
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    if found is None:
        raise ValueError(f"AMD's metadata must have .{name}. Got {text[-500:]}")
    return int(found.group(1))


def _amd(text: str) -> dict[str, Any]:
    accesses = re.findall(
        r"\b(?:global|buffer|flat)_(load|store)_(?:[us](?=byte|short))?(byte|short|dword(?:x\d)?)", text
    )
    sizes = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    return {
        "registers": amd_field(text, "vgpr_count"),
        "stack_bytes": amd_field(text, "private_segment_fixed_size"),
        "spilled_registers": amd_field(text, "vgpr_spill_count"),  # scalar registers spill into these, not to memory
        "accesses": _widths([(kind, sizes[size]) for kind, size in accesses]),
    }


def counted_on(grids: Iterable[tuple[int, ...]], multiprocessors: int) -> int:
    """Programs a multiprocessor that a launcher counts on: the most of the grids that are so many on each, 0 if none.

    The sizes of the cases have no multiprocessor's odd factors, so that no other grid is such a multiple.
    """
    sizes = [math.prod(grid) for grid in grids]
    return max((size // multiprocessors for size in sizes if size % multiprocessors == 0), default=0)


def measured(kernels: list[Any], target: Target) -> list[dict[str, Any]]:
    """Registers, stack, spills and accesses of Triton's compiled kernels."""
    if target.is_amd:
        return [_amd(kernel.asm["amdgcn"]) for kernel in kernels]
    cubins = [kernel.asm["cubin"] for kernel in kernels]
    return list(map(_nvidia, cubins, _disassembled(list(map(_code_of, cubins)), target)))


# The survey ---------------------------------------------------------------------------------------------------------


def survey(target_name: str, sampled: bool = False) -> list[Resources]:
    """Every kernel that the cases launch, compiled for the target."""
    target, first_case = TARGETS[target_name], {}
    with fake_gpu(target) as record:
        for case, call in cases(sampled):
            call()
            first_case |= {key: case for key in record.kernels if key not in first_case}
    found = measured([compiled.kernel for compiled in record.kernels.values()], target)
    report = []
    for (key, compiled), own in zip(record.kernels.items(), found, strict=True):
        shared, warps = compiled.kernel.metadata.shared, compiled.kernel.metadata.num_warps
        report.append(Resources(
            **own, kernel=key[0], case=first_case[key], constants=compiled.constants, dtypes=compiled.dtypes,
            shared_bytes=shared, warps=warps,
            resident=MULTIPROCESSORS[target_name].resident(own["registers"], shared, warps),
            programs=max(map(math.prod, compiled.grids)),
            counted_on=counted_on(compiled.grids, target.multiprocessors),
        ))  # fmt: skip
    return report


def surveys(sampled: bool) -> dict[str, list[dict[str, Any]]]:
    """The survey of every target, two at a time, each in a process of its own: launchers keep what they chose."""
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        reports = pool.starmap(survey, [(name, sampled) for name in TARGETS], chunksize=1)
    return {name: [asdict(kernel) for kernel in report] for name, report in zip(TARGETS, reports, strict=True)}
