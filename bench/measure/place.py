"""Where a measurement was made: device, what it can do and hold, threads, versions, commit, date."""

import datetime
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.shapes import DEVICE
from looped.provenance import instructions, machine_slug, package_version, processor, project_commit

Record = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "triton", "cut-cross-entropy", "liger-kernel", "quack-kernels", "flash-attn")


@cache
def environment(device: torch.device = DEVICE) -> Record:
    """The device that the measured work runs on, what it can do and hold, threads, versions, commit and date."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "instructions": _architecture() if on_gpu else instructions(),
        "threads": torch.get_num_threads(),
        "memory": _gpu_memory() if on_gpu else _memory(),
        "versions": {"python": platform.python_version()} | {package: package_version(package) for package in PACKAGES},
        "commit": project_commit(),
        "date": datetime.date.today().isoformat(),
    }


def _architecture() -> str:
    properties = torch.cuda.get_device_properties(DEVICE)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm-{properties.major}{properties.minor}"


def _gpu_memory() -> Record:
    properties = torch.cuda.get_device_properties(DEVICE)
    return {"l2_bytes": properties.L2_cache_size, "ram_bytes": properties.total_memory}


def _memory() -> Record:
    """L2 of a core, L3, and all memory, in bytes; None where the system does not say."""

    levels: dict[str, int] = {}
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        kibibytes = size.read_text().strip().removesuffix("K")
        levels[size.with_name("level").read_text().strip()] = 1024 * int(kibibytes)
    known = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys()
    return {
        "l2_bytes": levels.get("2") or torch.cpu.get_capabilities().get("l2_cache_size"),
        "l3_bytes": levels.get("3"),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None,
    }


def path_in(directory: Path, where: Record, ending: str) -> Path:
    """`<date>-<device><ending>`."""
    return directory / f"{where['date']}-{machine_slug(where)}{ending}"


def place_of(record: Record) -> str:
    """Date, machine, versions and commit of a record."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    sizes = [f"{name.removesuffix('_bytes').upper()} {_size(n)}" for name, n in record["memory"].items() if n]
    machine = [record["device"], record["instructions"], f"{record['threads']} threads", *sizes]
    return f"{record['date']}, {', '.join(machine)}, {versions}, commit {record['commit']}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:g} MiB"
