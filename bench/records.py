"""What is kept of a session of benchmarks: records, their ratios, the dated files under bench/results."""

import datetime
import json
import platform
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from subprocess import SubprocessError, run
from typing import Any

import torch

from bench.shapes import DEVICE

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "cut-cross-entropy", "liger-kernel")


def complete(records: list[Record]) -> None:
    """Add `fastest_competitor` and `ratio_to_fastest` to every record, as far as its group has been measured.

    The competitors are the implementations other than ours whose results are right.  `ratio_to_fastest` is the
    quotient of two ratios to the fused time, each of them a median of paired quotients; 0.5 means twice as fast as the
    fastest competitor.  Both are None in a group without one.
    """
    fastest: dict[str, Record] = {}
    for record in records:
        if record["implementation"] != "fused" and record["correct"]:
            best = fastest.setdefault(record["group"], record)
            if record["ratio_to_fused"] < best["ratio_to_fused"]:
                fastest[record["group"]] = record
    for record in records:
        best_of_group = fastest.get(record["group"])
        record["fastest_competitor"] = None if best_of_group is None else best_of_group["implementation"]
        record["ratio_to_fastest"] = (
            None if best_of_group is None else record["ratio_to_fused"] / best_of_group["ratio_to_fused"]
        )


@cache
def environment() -> Record:
    """Device, threads, versions, commit and date of this run."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, `-dirty` behind it if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, SubprocessError):
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slug(device: str, threads: int) -> str:
    """The device in a file's name."""
    words = re.sub(r"\((r|tm)\)|@.*", "", device.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + f"-{threads}-threads"


def write(records: Iterable[Record], directory: Path = RESULTS) -> list[Path]:
    """Write `<date>-<device>.json` and the same as tables in `.md`; smoke measurements are left out.

    Where a file of the same day and device exists, the groups measured now replace theirs in it and the others stay,
    each record with its own commit.  Returns the paths, none if there was nothing to write.
    """
    kept = [record for record in records if not record["smoke"]]
    if not kept:
        return []
    path = directory / f"{kept[0]['date']}-{slug(kept[0]['device'], kept[0]['threads'])}.json"
    now = {record["group"] for record in kept}
    earlier = json.loads(path.read_text())["records"] if path.exists() else []
    merged = [record for record in earlier if record["group"] not in now] + kept
    merged.sort(key=lambda record: record["subject"])  # stable: the order of the suite within a subject
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"records": merged}, indent=1) + "\n")
    table = path.with_suffix(".md")
    table.write_text(markdown(merged))
    return [path, table]


COLUMNS = "| implementation | ms | rate | share of roof | peak MiB | ÷ fused | ÷ fastest competitor | result |"


def markdown(records: list[Record]) -> str:
    """A section for each environment, a table for each group, a row for each implementation, fastest first."""
    lines = ["# Benchmark record", "", "How to read it: [bench/README.md](../README.md).", ""]
    by_group = sorted(records, key=lambda record: (record["subject"], record["group"]))
    for group, rows in groupby(by_group, key=lambda record: record["group"]):
        members = sorted(rows, key=lambda record: record["ratio_to_fused"])
        lines += [f"## {group}", "", COLUMNS, "|---|---|---|---|---|---|---|---|", *map(_row, members), ""]
    lines += ["## Measured on", ""]
    places: dict[str, None] = dict.fromkeys(_place(record) for record in records)
    lines += [f"- {place}" for place in places]
    return "\n".join(lines) + "\n"


def _row(record: Record) -> str:
    if "gflops_per_second" in record:
        rate = f"{record['gflops_per_second']:.1f} GFLOP/s"
    else:
        rate = f"{record['gigabytes_per_second']:.1f} GB/s"
    if "tokens_per_second" in record:
        rate += f", {record['tokens_per_second']:.0f} tokens/s"
    fastest = "" if record["ratio_to_fastest"] is None else f"{record['ratio_to_fastest']:.2f}"
    return (
        f"| {record['implementation']} | {record['milliseconds']:.4g} | {rate} | {record['share_of_roof']:.0%} | "
        f"{record['peak_memory_mib']:.1f} | {record['ratio_to_fused']:.2f} | {fastest} | {_verdict(record)} |"
    )


def _verdict(record: Record) -> str:
    name, error = max(record["errors"].items(), key=lambda item: item[1])
    return f"{'right' if record['correct'] else '**wrong**'} ({name} {error:.1e})"


def _place(record: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return f"{record['date']}, {record['device']}, {record['threads']} threads, {versions}, commit {record['commit']}"
