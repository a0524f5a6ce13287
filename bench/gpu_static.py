"""Times and shares on GPUs that are not there, all *predicted* by a roofline.

    python -m bench.gpu_static [--out bench/results] [--targets sm_90 ...]

runs on fake CUDA tensors (bench/fake_gpu.py), for every target: each kernel, whose compiled form gives registers,
shared memory and instructions; the readout of this project and of other libraries (bench/gpu_peers.py); norm and
penalty; and a training step of paper-129m, fused and plain.  Every recorded launch gets a predicted time
(bench/gpu_roofline.py).  Writes gpu_static.md and gpu_static.json.

Where a GPU is present that is one of the targets, bench/gpu_measured.py then measures readouts, norms and steps on it,
and both files are written again with the times beside that GPU's predictions.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.fake_gpu import TARGETS, fake_gpu
from bench.gpu_measured import (
    BATCH,
    NORM_ROWS,
    NORMS,
    PRESET,
    READOUTS,
    measure,
    norm_inputs,
    target_present,
)
from bench.gpu_path import StepRecord, step_record
from bench.gpu_peers import IMPLEMENTATIONS, Implementation, Inputs, dhead_error, readout_record
from bench.gpu_record import Call
from bench.gpu_roofline import BYTES_SHARE, DEVICES, FLOPS_SHARE, compiled_kernels, predict, total
from bench.gpu_tables import page
from bench.records import environment
from bench.shapes import ReadoutShape
from looped.config import PRESETS
from looped.kernels import radial_gradient, readout_statistics, rms_norm_penalty
from looped.provenance import package_version

Row = dict[str, Any]


# Readouts -------------------------------------------------------------------------------------------------------------


def readout_row(implementation: Implementation, shape: ReadoutShape, target: str) -> Row:
    """An implementation's readout, forward and backward, predicted."""
    record, temporary = readout_record(implementation, shape, target)
    predicted = total(record, target)
    floor = shape.flops / DEVICES[target].flops
    calls, error = implementation.rounded_calls, None
    if calls:
        error = dhead_error(calls, sum(call.name == "aten.addmm.out" for call in record.calls) // calls)
    return {
        "implementation": implementation.name,
        "ours": implementation.ours,
        "weighted": implementation.weighted,
        "shape": str(shape),
        "gpu": TARGETS[target].name,
        "launches": predicted.launches,
        "host_waits": len(record.host_copies),
        "flops_over_6KNdV": predicted.flops / shape.flops,
        "predicted_gigabytes": predicted.bytes / 1e9,
        "temporary_MiB": temporary / 2**20,
        "dhead_error": error,
        "predicted_ms": 1e3 * predicted.seconds,
        "predicted_floor_ms": 1e3 * floor,
        "predicted_over_floor": predicted.seconds / floor,
    }


def readouts(targets: list[str]) -> list[Row]:
    installed = [implementation for implementation in IMPLEMENTATIONS if implementation.missing is None]
    return [readout_row(i, shape, target) for target in targets for shape in READOUTS for i in installed]


# Norm and penalty -----------------------------------------------------------------------------------------------------


def norm_row(name: str, d: int, target: str) -> Row:
    """RMSNorm and penalty of K N rows in bfloat16: predicted times of forward and backward over their byte roofs."""
    matrix = NORM_ROWS * d * 2  # one read or write of the rows
    with fake_gpu(TARGETS[target]) as record:
        h, weight, dy, dpenalty = norm_inputs(d)
        record.clear()
        y, penalty = NORMS[name](h, weight)
        forward = total(record, target)
        record.clear()
        torch.autograd.backward([y, penalty], [dy, dpenalty])
        backward = total(record, target)
    row: Row = {"implementation": name, "rows": NORM_ROWS, "d": d, "gpu": TARGETS[target].name}
    for part, predicted, matrices in (("forward", forward, 2), ("backward", backward, 3)):
        roof = matrices * matrix / DEVICES[target].bytes
        row |= {
            f"{part}_launches": predicted.launches,
            f"{part}_predicted_us": 1e6 * predicted.seconds,
            f"{part}_predicted_roof_us": 1e6 * roof,
            f"{part}_predicted_over_roof": predicted.seconds / roof,
        }
    return row


def norms(targets: list[str]) -> list[Row]:
    names = [name for name in NORMS if "Liger" not in name or package_version("liger-kernel")]
    return [norm_row(name, shape.d, target) for target in targets for shape in READOUTS for name in names]


# A training step ------------------------------------------------------------------------------------------------------


def part_of(call: Call) -> str:
    """Where in a step a launch belongs, by its name, its op and the sizes of what it reads."""
    config = PRESETS[PRESET]
    if "adam" in call.name or "_foreach" in call.name:
        return "optimiser and clipping"
    if "attention" in call.name:
        return "attention"
    if call.op.startswith("looped::rms_norm") or "rms_norm" in call.name:
        return "norms"
    if call.op.startswith("looped::") or config.vocab_size in call.sizes:  # with the scaling of all its gradients
        return "readout and embedding"
    if config.d_ff in call.sizes:
        return "MLP's products" if call.flops else "MLP's gate and casts"
    if 3 * config.d_model in call.sizes or call.flops:
        return "attention's projections"
    return "other: casts, sums, dropout"


def step_row(fused: bool, target: str) -> Row:
    """A step of the preset, predicted: its time in all and by part, and the share of the peak that its FLOPs are."""
    step: StepRecord = step_record(PRESET, target, batch=BATCH, fused=fused)
    compiled, device = compiled_kernels(step.record, target), DEVICES[target]
    parts: dict[str, float] = defaultdict(float)
    for call in step.record.calls:
        parts[part_of(call)] += 1e3 * predict(call, target, compiled).seconds
    seconds = sum(parts.values()) / 1e3
    return {
        "step": f"{PRESET}, {BATCH} x {PRESETS[PRESET].max_seq_len} tokens, {'fused' if fused else 'plain'}",
        "fused": fused,
        "gpu": TARGETS[target].name,
        "launches": step.record.launches(),
        "host_waits": len(step.record.host_copies),
        "peak_MiB": step.record.peak_bytes / 2**20,
        "predicted_ms": 1e3 * seconds,
        "predicted_tokens_per_s": step.tokens / seconds,
        "model_teraflops": step.expected_flops / 1e12,
        "predicted_mfu": step.expected_flops / seconds / device.peak_flops,
        "predicted_ms_by_part": dict(sorted(parts.items(), key=lambda part: -part[1])),
    }


def steps(targets: list[str]) -> list[Row]:
    return [step_row(fused, target) for target in targets for fused in (True, False)]


# Kernels --------------------------------------------------------------------------------------------------------------


def _run_kernels(shape: ReadoutShape) -> None:
    """Every kernel of this project at a shape, as training, evaluation and diagnosis launch it."""
    inputs = Inputs.random(shape)
    IMPLEMENTATIONS[1].loss(inputs).backward()
    with torch.no_grad():
        readout_statistics(inputs.states, inputs.head, inputs.targets, norm_weight=inputs.norm_weight)
    h = torch.cat(inputs.states).detach().requires_grad_()
    radial_gradient(h, h.detach().clone()).fraction.sum().backward()
    delta, stream = inputs.states[0], inputs.states[1].detach().float().requires_grad_()
    result = rms_norm_penalty(delta, inputs.norm_weight, residual=stream)
    assert result.residual is not None
    (result.y.float().sum() + result.residual.sum()).backward()


def kernel_rows(shape: ReadoutShape, target: str) -> Iterator[Row]:
    """One row a kernel and configuration, for its first launch at the shape."""
    with fake_gpu(TARGETS[target]) as record:
        _run_kernels(shape)
    compiled, seen = compiled_kernels(record, target), set()
    for call in record.calls:
        if call.key is None or (call.key, call.grid) in seen:
            continue
        seen.add((call.key, call.grid))
        kernel, _, occupancy = compiled[call.key]
        predicted = predict(call, target, compiled)
        yield {
            "kernel": call.name,
            "op": call.op,
            "shape": str(shape),
            "gpu": TARGETS[target].name,
            "programs": list(call.grid),
            "registers": kernel.registers,
            "spills": kernel.stack_bytes + kernel.spilled_registers,
            "shared_KiB": kernel.shared_bytes / 1024,
            "occupancy": occupancy,
            "accesses": kernel.accesses,
            "matrix_instructions": kernel.matrix,
            "predicted_megabytes": predicted.bytes / 1e6,
            "gigaflops": call.flops / 1e9,
            "predicted_us": 1e6 * predicted.seconds,
            "predicted_bound": predicted.bound,
        }


def kernels(targets: list[str]) -> list[Row]:
    return [row for target in targets for shape in READOUTS for row in kernel_rows(shape, target)]


# The report -----------------------------------------------------------------------------------------------------------


def predictions(targets: list[str]) -> dict[str, Any]:
    """Everything that the page shows."""
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    rates = {
        TARGETS[name].name: {
            "peak_teraflops": DEVICES[name].peak_flops / 1e12,
            "peak_terabytes_per_s": DEVICES[name].peak_bytes / 1e12,
            "multiprocessors": TARGETS[name].multiprocessors,
        }
        for name in targets
    }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": environment()["commit"],
        "versions": {package: package_version(package) for package in packages},
        "measured_on": None,
        "measured_gpu": None,
        "flops_share": FLOPS_SHARE,
        "bytes_share": BYTES_SHARE,
        "gpus": rates,
        "left_out": [implementation.missing for implementation in IMPLEMENTATIONS if implementation.missing],
        "readouts": readouts(targets),
        "norms": norms(targets),
        "steps": steps(targets),
        "kernels": kernels(targets),
    }


def write(report: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_static.md").write_text(page(report))
    (out / "gpu_static.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    given = parser.parse_args()
    report = predictions(given.targets)
    write(report, given.out)
    present = target_present()
    if present in given.targets:
        measure(report, present)
        write(report, given.out)
    elif torch.cuda.is_available():
        print(f"Not measured: {torch.cuda.get_device_name()} is none of the targets {given.targets}.", file=sys.stderr)
    print(page(report))


if __name__ == "__main__":
    main()
