"""Where the numbers of a diagnosis come from: when, by which code, on which machine, and of which run."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from looped.saved_run import SavedRun

PACKAGES = ("torch", "triton", "numpy")


def origin(device: torch.device, run: SavedRun | None = None) -> dict[str, str]:
    """Words by what they are of: date, commit of this project, versions, device; and the run's directory, data,
    tokenizer and step."""
    versions = [f"{package} {found}" for package in PACKAGES if (found := _version(package))]
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    words = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit() or "not known",
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
        "device": f"{device.type}: {name}",
    }
    if run is None:
        return words
    training = run.config["train"]
    return words | {
        "run": run.name,
        "step": _step(run.directory),
        "data": Path(training["data"]).name,
        "tokenizer": Path(training["tokenizer"]).name,
    }


def _step(run: Path) -> str:
    """Optimisation steps of the checkpoint that `load_run` reads."""
    for name in ("checkpoint", "checkpoint.old"):
        path = run / name / "checkpoint.json"
        if path.is_file():
            try:
                return str(json.loads(path.read_text(encoding="utf-8"))["step"])
            except (ValueError, KeyError, TypeError):
                break
    return "not known"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # triton exists on Linux only
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
