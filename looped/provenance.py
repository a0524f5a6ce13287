"""Where a measured number comes from: the commit of this project, the versions of packages, the processor."""

import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def project_commit() -> str | None:
    """The commit of this checkout, followed by `-dirty` if its files have been changed. None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def package_version(package: str) -> str | None:
    """The version of a package that is installed, else None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name: as Linux gives it, or else what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instructions() -> str:
    """The processor's widest instructions for matrix products: two processors of one name may differ in them."""
    widest_first = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512_f": "avx512", "avx2": "avx2"}
    has = torch.cpu.get_capabilities()
    return next((name for flag, name in widest_first.items() if has.get(flag, False)), platform.machine())


def machine_slug(where: Mapping[str, Any]) -> str:
    """A record's device, instructions and threads as a part of a file's name."""
    words = re.sub(r"\((r|tm)\)", "", where["device"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {where['instructions'].lower()} {where['threads']} threads").strip("-")
