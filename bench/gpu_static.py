"""Times and shares on GPUs that are not there, all *predicted* by a roofline, never measured.

    python -m bench.gpu_static [--out bench/results]

runs the readout and one training step on fake CUDA tensors (bench/fake_gpu.py) and gives every recorded launch the
largest of: its FLOPs at the rate of large products, its bytes at the rate of memory, and the launch itself.  Rates are
0.81 of the peak dense bf16 FLOP/s and 0.9 of the peak bandwidth that the makers state; bytes are of every tensor read
and written once, whether or not a cache held it, and a kernel's second read of its own rows is free.
Writes gpu_static.md and gpu_static.json.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.fake_gpu import TARGETS, Call, Record
from bench.gpu_path import readout_record, step_record

LAUNCH_SECONDS = 3e-6
READOUTS = ((768, 20_000), (2048, 128_256))


class Rates(NamedTuple):
    """FLOP/s and bytes/s that large work reaches."""

    flops: float
    bytes: float


RATES = {
    "sm_80": Rates(0.81 * 312e12, 0.9 * 2.04e12),
    "sm_90": Rates(0.81 * 989e12, 0.9 * 3.35e12),
    "sm_100": Rates(0.81 * 2250e12, 0.9 * 8.0e12),
    "gfx942": Rates(0.81 * 1307e12, 0.9 * 5.3e12),
}
PARTS = (
    ("attention", ("attention",)),
    ("norm kernels", ("norm_",)),
    ("softmax and gradient kernel", ("cross_entropy_kernel",)),
    ("matrix products", ("mm",)),
    ("optimiser", ("adam",)),
)


def predicted_seconds(call: Call, rates: Rates) -> float:
    """Of one launch: the largest of its FLOPs, its bytes and the launch."""
    return max(call.flops / rates.flops, call.read_write_bytes / rates.bytes, LAUNCH_SECONDS)


def part_of(call: Call) -> str:
    return next((part for part, names in PARTS if any(name in call.name for name in names)), "elementwise and copies")


def summary(record: Record, target: str, floor_flops: int) -> dict[str, Any]:
    """Predicted milliseconds in all and by part, beside the counts that they come from."""
    rates = RATES[target]
    parts: dict[str, float] = defaultdict(float)
    for call in record.calls:
        parts[part_of(call)] += 1e3 * predicted_seconds(call, rates)
    floor = 1e3 * floor_flops / rates.flops
    total = sum(parts.values())
    return {
        "gpu": TARGETS[target].name,
        "predicted_ms": total,
        "predicted_ms_by_part": dict(parts),
        "floor_ms": floor,
        "predicted_over_floor": total / floor,
        "launches": record.launches(),
        "gigabytes": sum(call.read_write_bytes for call in record.calls) / 1e9,
        "teraflops": sum(call.flops for call in record.calls) / 1e12,
    }


def predictions() -> list[dict[str, Any]]:
    rows = []
    for target in TARGETS:
        for d, n_columns in READOUTS:
            record, temporary = readout_record(d, n_columns, target)
            row = summary(record, target, 6 * 4 * 8192 * d * n_columns)
            rows.append({"case": f"readout K=4 N=8192 d={d} V={n_columns}", **row, "temporary_MiB": temporary / 2**20})
        for fused in (True, False):
            step = step_record("paper-129m", target, batch=32, fused=fused)
            row = summary(step.record, target, step.expected_flops)
            name = f"step of paper-129m, 32 x 256, {'fused' if fused else 'plain'}"
            rows.append({"case": name, **row, "temporary_MiB": step.record.peak_bytes / 2**20})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a case and GPU."""
    lines = [
        "# Predicted, not measured",
        "",
        "By `python -m bench.gpu_static` on a machine without a GPU; see its docstring for the roofline. Memory: of a",
        "readout the temporaries and gradients, of a step the peak in all.",
        "",
        "| case | GPU | *predicted* ms | FLOP floor, ms | *predicted* / floor | launches | GB moved | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['gpu']} | {row['predicted_ms']:.2f} | {row['floor_ms']:.2f} | "
            f"{row['predicted_over_floor']:.2f} | {row['launches']} | {row['gigabytes']:.1f} | "
            f"{row['temporary_MiB']:.0f} |"
        )
    lines += ["", "Where the *predicted* milliseconds go:", ""]
    for row in rows:
        parts = sorted(row["predicted_ms_by_part"].items(), key=lambda part: -part[1])
        lines.append(f"- {row['case']}, {row['gpu']}: " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    rows = predictions()
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_static.md").write_text(table(rows))
    (out / "gpu_static.json").write_text(json.dumps({"torch": torch.__version__, "predicted": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
