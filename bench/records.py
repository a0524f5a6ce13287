"""What is kept of a session of benchmarks: records, their ratios, the dated files under bench/results."""

import datetime
import json
import os
import platform
import re
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import closest_to_limit
from bench.implementations import is_ours
from bench.shapes import DEVICE
from looped.provenance import package_version, processor, project_commit

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "cut-cross-entropy", "liger-kernel")
INSTRUCTIONS = {"amx_bf16": "amx", "avx512_bf16": "avx512-bf16", "avx512_f": "avx512", "avx2": "avx2"}  # best first


@dataclass
class Session:
    """What one run of pytest has measured and skipped since it started."""

    records: list[Record] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)  # group, implementation, reason
    start: float = field(default_factory=time.monotonic)

    def reference_seconds(self, group: str) -> float | None:
        """Of a round of the fused implementation, where it has been timed."""
        found = [r for r in self.records if r["group"] == group and r["implementation"] == "fused"]
        return found[-1]["milliseconds"] / 1e3 if found else None


def complete(records: list[Record]) -> None:
    """Add `fastest_competitor`, `ratio_to_fastest` and `share_of_roof` to every record, as far as its group has been
    measured.

    The competitors are the implementations other than ours whose results are right.  `ratio_to_fastest` is the
    quotient of two ratios to the fused time, each of them a median of paired quotients; 0.5 means twice as fast as the
    fastest competitor.  Both are None in a group without one.  The fused implementation took turns with the roof, and
    the others with it: their share of the roof is its share over their ratio, None in a group without it.
    """
    fused = {record["group"]: record for record in records if record["implementation"] == "fused"}
    fastest: dict[str, Record] = {}
    for record in records:
        if record["correct"] and not is_ours(record["implementation"]):
            best = fastest.setdefault(record["group"], record)
            if record["ratio_to_fused"] < best["ratio_to_fused"]:
                fastest[record["group"]] = record
    for record in records:
        if record["group"] in fused:
            record["share_of_roof"] = fused[record["group"]]["share_of_roof"] / record["ratio_to_fused"]
        best_of_group = fastest.get(record["group"])
        record["fastest_competitor"] = None if best_of_group is None else best_of_group["implementation"]
        record["ratio_to_fastest"] = (
            None if best_of_group is None else record["ratio_to_fused"] / best_of_group["ratio_to_fused"]
        )


@cache
def environment() -> Record:
    """Device, what it can do and hold, threads, versions, commit and date of this run."""
    on_gpu = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "instructions": _architecture() if on_gpu else _instructions(),
        "threads": torch.get_num_threads(),
        "memory": _gpu_memory() if on_gpu else _memory(),
        "versions": {"python": platform.python_version()} | {package: package_version(package) for package in PACKAGES},
        "commit": project_commit(),
        "date": datetime.date.today().isoformat(),
    }


def _instructions() -> str:
    """The widest instructions for matrix products: two processors of one name may differ in them."""
    has = torch.cpu.get_capabilities()
    return next((name for flag, name in INSTRUCTIONS.items() if has.get(flag, False)), platform.machine())


def _architecture() -> str:
    properties = torch.cuda.get_device_properties(DEVICE)
    return getattr(properties, "gcnArchName", "").partition(":")[0] or f"sm-{properties.major}{properties.minor}"


def _gpu_memory() -> Record:
    properties = torch.cuda.get_device_properties(DEVICE)
    return {"l2_bytes": properties.L2_cache_size, "ram_bytes": properties.total_memory}


def _memory() -> Record:
    """L2 of a core, L3, and all memory, in bytes; None where the system does not say."""

    levels: dict[str, int] = {}
    for cache_of_core in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        kibibytes = (cache_of_core / "size").read_text().strip().removesuffix("K")
        levels[(cache_of_core / "level").read_text().strip()] = 1024 * int(kibibytes)
    known = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys()
    return {
        "l2_bytes": levels.get("2") or torch.cpu.get_capabilities().get("l2_cache_size"),
        "l3_bytes": levels.get("3"),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None,
    }


def slug(where: Record) -> str:
    """The device in a file's name, from its environment: device, instructions, threads."""
    words = re.sub(r"\((r|tm)\)", "", where["device"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {where['instructions']} {where['threads']} threads").strip("-")


def write(session: Session, directory: Path = RESULTS) -> list[Path]:
    """Write `<date>-<device>.json` and the same as tables in `.md`; smoke measurements are left out.

    Where a file of the same day and device exists, what is measured now replaces the same implementation on the same
    case in it and all else stays, each record with its own commit.  Returns the paths, none if there was nothing to
    write.
    """
    kept = [record for record in session.records if not record["smoke"]]
    if not kept:
        return []
    path = directory / f"{kept[0]['date']}-{slug(kept[0])}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {"sessions": [], "records": [], "skipped": []}
    now = {_key(record) for record in (*kept, *session.skipped)}
    found = {
        "sessions": [*earlier["sessions"], _summary(session, len(kept))],
        "records": [record for record in earlier["records"] if _key(record) not in now] + kept,
        "skipped": [record for record in earlier["skipped"] if _key(record) not in now] + session.skipped,
    }
    found["records"].sort(key=lambda record: (record["subject"], record["group"]))  # stable within a group
    complete(found["records"])
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    table = path.with_suffix(".md")
    table.write_text(markdown(**found))
    return [path, table]


def _key(record: Record) -> tuple[str, str]:
    return record["group"], record["implementation"]


def _summary(session: Session, n_records: int) -> Record:
    finished = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    wall = time.monotonic() - session.start
    return {"finished": finished, "wall_seconds": wall, "records": n_records, "skipped": len(session.skipped)}


COLUMNS = "| implementation | ms | rate | share of roof | peak MiB | ÷ fused | ÷ fastest competitor | rounds | result |"


def markdown(records: list[Record], skipped: list[Record], sessions: list[Record]) -> str:
    """A table for each group, a row for each implementation, fastest first; what was skipped; where and how long."""
    lines = ["# Benchmark record", "", "How to read it: [bench/README.md](../README.md).", ""]
    for group, rows in groupby(records, key=lambda record: record["group"]):
        members = sorted(rows, key=lambda record: record["ratio_to_fused"])
        lines += [f"## {group}", "", COLUMNS, "|---|---|---|---|---|---|---|---|---|", *map(_row, members)]
        lines += [f"\nSkipped: {s['implementation']}: {s['reason']}" for s in skipped if s["group"] == group] + [""]
    lines += ["## Measured on", "", *(f"- {place}" for place in dict.fromkeys(map(place_of, records)))]
    lines += [f"- {s['finished']}: {s['records']} measurements in {s['wall_seconds']:.0f} s" for s in sessions]
    return "\n".join(lines) + "\n"


def _row(record: Record) -> str:
    if "gflops_per_second" in record:
        rate = f"{record['gflops_per_second']:.1f} GFLOP/s"
    else:
        rate = f"{record['gigabytes_per_second']:.1f} GB/s"
    if "tokens_per_second" in record:
        rate += f", {record['tokens_per_second']:.0f} tokens/s"
    fastest = "" if record["ratio_to_fastest"] is None else f"{record['ratio_to_fastest']:.2f}"
    share = "" if record["share_of_roof"] is None else f"{record['share_of_roof']:.0%}"
    return (
        f"| {record['implementation']} | {record['milliseconds']:.4g} | {rate} | {share} | "
        f"{record['peak_memory_mib']:.1f} | {ratio_of(record)} | {fastest} | {record['rounds']} | {_verdict(record)} |"
    )


def ratio_of(record: Record) -> str:
    """The ratio to the fused time with its quartiles, which the earliest record does not have."""
    if record["implementation"] == "fused" or record["ratio_quartiles"] is None:
        return f"{record['ratio_to_fused']:.2f}"
    low, high = record["ratio_quartiles"]
    return f"{record['ratio_to_fused']:.2f} ({low:.2f}-{high:.2f})"


def _verdict(record: Record) -> str:
    name = closest_to_limit(record["errors"], record["allowed"])
    limit = f"{name} {record['errors'][name]:.1e}, allowed {record['allowed'][name]:.1e}"
    return f"{'right' if record['correct'] else '**wrong**'} ({limit})"


def place_of(record: Record) -> str:
    """Date, machine, versions and commit of a record."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    sizes = [f"{name.removesuffix('_bytes').upper()} {_size(n)}" for name, n in record["memory"].items() if n]
    machine = [record["device"], record["instructions"], f"{record['threads']} threads", *sizes]
    return f"{record['date']}, {', '.join(machine)}, {versions}, commit {record['commit']}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:g} MiB"
