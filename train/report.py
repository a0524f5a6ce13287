"""What a finished run says of its machine and its evaluation: for summary.json, and as a table on the terminal."""

import os
import platform
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from looped.provenance import package_version, processor, project_commit
from train.step import LoopResult

resource: ModuleType | None
try:
    import resource
except ModuleNotFoundError:  # not a POSIX system
    resource = None

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "datasets", "safetensors")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit of the project (None outside a git checkout) and peak memory of this process, bytes
    (None where the system does not say)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "device": f"{device.type}: {name}",
        "versions": {"python": platform.python_version()} | {package: package_version(package) for package in PACKAGES},
        "commit": project_commit(),
        "peak_memory_bytes": _peak_memory(device),
    }


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def table(results: Sequence[LoopResult]) -> str:
    """The evaluation, one line for each K. Of a task it ends with the accuracy of its answers."""
    header = f"{'K':>4} {'CE':>9} {'PPL':>10} {'bits/byte':>10} {'||H_K||':>10} {'tokens/s':>10}"
    lines = [header + "".join(f" {name:>8}" for name in shares_of(results))]
    for result in results:
        bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        rate = "-" if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f}"
        lines.append(
            f"{result.n_loops:>4} {result.ce:>9.4f} {result.ppl:>10.4g} {bits:>10} "
            f"{result.state_norm:>10.4g} {rate:>10}"
            + "".join(f" {share:>8.3f}" for share in (result.accuracy or {}).values())
        )
    return "\n".join(lines)


def shares_of(results: Sequence[LoopResult]) -> list[str]:
    """The names of a task's shares of right answers; none of text."""
    return list(results[0].accuracy or ()) if results else []
