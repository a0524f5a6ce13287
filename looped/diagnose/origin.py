"""Where the numbers of a diagnosis come from: when, by which code, on which machine, and of which run."""

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from looped.provenance import package_version, project_commit
from looped.run_directory import SavedRun

PACKAGES = ("torch", "triton", "numpy")


def origin(device: torch.device, run: SavedRun | None = None) -> dict[str, str]:
    """Facts by name: date, commit, versions and device; for a run its directory, step, data and tokenizer too."""
    versions = [f"{package} {version}" for package in PACKAGES if (version := package_version(package))]
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": project_commit() or "not known",
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
        "device": f"{device.type}: {name}",
    }
    if run is None:
        return facts
    training = run.config["train"]
    return facts | {
        "run": run.name,
        "step": str(run.step),
        "weights": run.weights_hash,
        "data": Path(training["data"]).name,
        "tokenizer": Path(training["tokenizer"] or "none").name,
    }
