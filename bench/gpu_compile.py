"""What Triton makes of every kernel for a GPU that is not there: registers, stack, shared memory, instructions.

    python -m bench.gpu_compile sm_90 [--sampled] > report.json

calls the public functions of `kernels` on fake CUDA tensors (bench/fake_gpu.py) at the shapes and with the options
below, so that every kernel is compiled in every configuration that a launcher chooses there, and writes one JSON
object a kernel.  No GPU is needed: Triton's compiler, NVIDIA's assembler and disassembler are in Triton's package.
"""

import argparse
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.fake_gpu import TARGETS, Target, fake_gpu
from kernels import looped_cross_entropy, radial_gradient, readout_statistics, rms_norm_penalty

SHAPES = ((512, 20_000), (768, 20_000), (2048, 50_257), (2048, 128_256))  # d, V
SMALL_SHAPES = ((512, 1000), (512, 16_384))  # vocabularies whose rows stay in registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.  Bytes: of one program (shared) or one thread (stack).

    spilled_registers: on NVIDIA the instructions that access local memory, on AMD the vector registers kept there.
    accesses: instructions by width in bytes a thread, e.g. {"load 16": 8}; `matrix`: instructions of the matrix units.
    """

    kernel: str
    constants: dict[str, Any]
    dtypes: tuple[str, ...]
    case: str
    registers: int
    stack_bytes: int
    spilled_registers: int
    shared_bytes: int
    matrix: int
    accesses: dict[str, int]

    @property
    def narrow(self) -> int:
        """Global accesses of less than 16 bytes a thread."""
        return sum(count for access, count in self.accesses.items() if int(access.split()[1]) < 16)


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


def _nvidia(kernel: Any) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "--print-code"))
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "spilled_registers": len(re.findall(r"\b(?:LDL|STL)\b", sass)),  # accesses of local memory
        "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass)),
        "accesses": _widths(
            [
                ("store" if name == "STG" else "load", _sass_width(modifiers))
                for name, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)+)", sass)
            ]
        ),
    }


def _amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    accesses = re.findall(
        r"\b(?:global|buffer|flat)_(load|store)_(?:[us](?=byte|short))?(byte|short|dword(?:x\d)?)", text
    )
    sizes = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spilled_registers": field("vgpr_spill_count"),  # scalar registers spill into vector registers, not to memory
        "matrix": len(re.findall(r"\bv_mfma_\w+", text)),
        "accesses": _widths([(kind, sizes[size]) for kind, size in accesses]),
    }


def resources(compiled: Any, target: Target, **known: Any) -> Resources:
    """The report of a compiled kernel; known: `kernel` (its name), `constants`, `dtypes`, `case`."""
    measured = _amd(compiled) if target.is_amd else _nvidia(compiled)
    return Resources(**known, shared_bytes=compiled.metadata.shared, **measured)


# The calls whose launches are compiled --------------------------------------------------------------------------------


def _gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=dtype.is_floating_point)


def norms(d: int, dtype: torch.dtype, rows: int = 4096) -> None:
    """rms_norm_penalty and radial_gradient, forward and backward, as a decoder and as a caller of its own uses them."""
    for residual in (None, _gpu(rows, d), _gpu(rows, d, dtype=dtype)):
        for weight in (None, _gpu(d)):
            result = rms_norm_penalty(_gpu(rows, d, dtype=dtype), weight, residual=residual)
            parts = [part.float().sum() for part in result if part is not None]
            parts[0].backward(retain_graph=True)
            sum(parts[1:], parts[0]).backward()
    radial = radial_gradient(_gpu(rows, d, dtype=dtype), _gpu(rows, d, dtype=dtype))
    radial.fraction.sum().backward()
    with torch.no_grad():
        rms_norm_penalty(_gpu(rows, d, dtype=dtype), _gpu(d))


def readouts(d: int, n_columns: int, dtype: torch.dtype, tokens: int = 2048, everything: bool = True) -> None:
    """looped_cross_entropy with every option that changes a launch."""
    states, head = [_gpu(tokens, d, dtype=dtype) for _ in range(3)], _gpu(n_columns, d, dtype=dtype)
    targets, weight = _gpu(tokens, dtype=torch.int64), _gpu(d)
    rmsnorm: dict[str, Any] = {"norm_weight": weight}
    calls: list[dict[str, Any]] = [
        rmsnorm | {"penalty": 0.01},
        rmsnorm | {"penalty": 0.01, "statistics": True},
        {"readout": "raw", "statistics": True},
        {"readout": "final-only", "penalty": 0.01, "weights": [0, 0, 1], **rmsnorm},
        {"readout": "layernorm", "norm_bias": _gpu(d), **rmsnorm},
        rmsnorm | {"bias": _gpu(n_columns), "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4},
        rmsnorm | {"bias": _gpu(n_columns), "softcap": 30.0, "statistics": True},
        rmsnorm | {"softcap": 30.0},
    ]
    for options in calls if everything else calls[:2] + calls[5:6]:
        looped_cross_entropy(states, head, targets, **options).loss.backward()
    looped_cross_entropy(states, head, targets, reduction="none", **rmsnorm).loss.sum().backward()
    with torch.no_grad():
        looped_cross_entropy(states, head, targets, statistics=True, **rmsnorm)
    looped_cross_entropy([state.detach() for state in states], head, targets, **rmsnorm).loss.backward()
    if dtype == torch.bfloat16:  # the trainer's: float32 states and parameters, bfloat16 products
        with torch.autocast("cuda", dtype=dtype):
            wide, wide_head = [state.float() for state in states], head.float()
            loss = looped_cross_entropy(wide, wide_head, targets, penalty=0.01, statistics=True, **rmsnorm).loss
        loss.backward()


def statistics(d: int, n_columns: int, dtype: torch.dtype, everything: bool = True) -> None:
    """readout_statistics, for many rows and for the few of a generation step."""
    head, bias = _gpu(n_columns, d, dtype=dtype), _gpu(n_columns)
    for tokens in (1, 32, 8192) if everything else (32, 8192):
        states, targets = _gpu(4, tokens, d, dtype=dtype), _gpu(tokens, dtype=torch.int64)
        readout_statistics(states, head, targets, norm_weight=_gpu(d))
        if everything:
            readout_statistics(states, head, norm_weight=_gpu(d))
            readout_statistics(states, head, targets, readout="raw", bias=bias, softcap=30.0)
        if everything and dtype == torch.float32:
            previous = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            readout_statistics(states, head, targets, norm_weight=_gpu(d))
            torch.backends.cuda.matmul.fp32_precision = previous


Case = tuple[str, Callable[[], None]]


def cases(sampled: bool) -> Iterator[Case]:
    """Named calls at every shape and dtype; sampled: those that a quick check takes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if sampled:
        yield "norms d=768 bf16", lambda: norms(768, bf16)
        yield "readout d=768 V=20000 fp32", lambda: readouts(768, 20_000, fp32, everything=False)
        yield "readout d=2048 V=128256 bf16", lambda: readouts(2048, 128_256, bf16, everything=False)
        yield "statistics d=768 V=20000 fp32", lambda: statistics(768, 20_000, fp32, everything=False)
        yield "statistics d=2048 V=128256 bf16", lambda: statistics(2048, 128_256, bf16, everything=False)
        return
    for dtype, d in itertools.product(DTYPES, (512, 768, 2048)):
        yield f"norms d={d} {dtype}", functools.partial(norms, d, dtype)
    for dtype, (d, n_columns) in itertools.product(DTYPES, SHAPES + SMALL_SHAPES):
        yield f"readout d={d} V={n_columns} {dtype}", functools.partial(readouts, d, n_columns, dtype)
        yield f"statistics d={d} V={n_columns} {dtype}", functools.partial(statistics, d, n_columns, dtype)


def survey(target_name: str, sampled: bool = False) -> list[Resources]:
    """Every kernel that the cases launch, compiled for the target."""
    target = TARGETS[target_name]
    found: dict[tuple, Resources] = {}
    with fake_gpu(target) as record:
        for case, call in cases(sampled):
            call()
            for key, (compiled, constants, dtypes) in record.kernels.items():
                if key not in found:
                    known = {"kernel": key[0], "constants": dict(constants), "dtypes": dtypes, "case": case}
                    found[key] = resources(compiled, target, **known)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--sampled", action="store_true", help="fewer shapes, dtypes and options")
    arguments = parser.parse_args()
    report = [asdict(kernel) for kernel in survey(arguments.target, arguments.sampled)]
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
