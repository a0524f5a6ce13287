"""Times and shares on GPUs that are not there, all *predicted* by a roofline.

    python -m bench.gpu_static [--out bench/results] [--targets sm_90 ...]

runs on fake CUDA tensors (bench/fake_gpu.py), for every target: each kernel, whose compiled form gives registers,
shared memory and instructions; the readout of this project and of other libraries (bench/gpu_peers.py); norm and
penalty; and a training step of paper-129m, fused and plain.  Every recorded launch gets a predicted time
(bench/gpu_roofline.py).  Writes gpu_static.md and gpu_static.json.

Where a GPU is present, the readouts and the steps are also measured on it, with CUDA events and the caches flushed
before every round, and stand beside the predictions.  That part has not been run: it was written on a machine without
a GPU.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.fake_gpu import TARGETS, fake_gpu
from bench.gpu_path import StepRecord, step_record
from bench.gpu_peers import IMPLEMENTATIONS, Implementation, Inputs, readout_record
from bench.gpu_record import Call
from bench.gpu_roofline import BYTES_SHARE, DEVICES, FLOPS_SHARE, compiled_kernels, predict, total
from bench.gpu_tables import page
from bench.records import environment
from bench.shapes import ReadoutShape
from kernels import radial_gradient, readout_statistics, rms_norm_penalty
from looped.config import PRESETS
from looped.decoder import LoopedDecoder
from train.step import training_step

Row = dict[str, Any]
READOUTS = (ReadoutShape(4, 8192, 768, 20_000), ReadoutShape(4, 8192, 2048, 128_256))
NORM_ROWS = 4 * 8192
PRESET, BATCH = "paper-129m", 32
PENALTY = 0.01


# Readouts -------------------------------------------------------------------------------------------------------------


def readout_row(implementation: Implementation, shape: ReadoutShape, target: str) -> Row:
    """An implementation's readout, forward and backward, predicted."""
    record, temporary = readout_record(implementation, shape, target)
    predicted = total(record, target)
    floor = shape.flops / DEVICES[target].flops
    return {
        "implementation": implementation.name,
        "ours": implementation.ours,
        "weighted": implementation.weighted,
        "shape": str(shape),
        "gpu": TARGETS[target].name,
        "launches": predicted.launches,
        "host_waits": len(record.host_copies),
        "flops_over_6KNdV": predicted.flops / shape.flops,
        "gigabytes": predicted.bytes / 1e9,
        "temporary_MiB": temporary / 2**20,
        "predicted_ms": 1e3 * predicted.seconds,
        "floor_ms": 1e3 * floor,
        "predicted_over_floor": predicted.seconds / floor,
    }


def readouts(targets: list[str]) -> list[Row]:
    installed = [implementation for implementation in IMPLEMENTATIONS if implementation.missing is None]
    return [readout_row(i, shape, target) for target in targets for shape in READOUTS for i in installed]


# Norm and penalty -----------------------------------------------------------------------------------------------------


def norm_fused(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, mean_square, _ = rms_norm_penalty(h, weight)
    return y, PENALTY * mean_square.mean()


def norm_plain(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.rms_norm(h, h.shape[-1:], weight, 1e-6), PENALTY * h.float().square().mean()


def norm_liger(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(h, weight, 1e-6), PENALTY * h.float().square().mean()


NORMS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rms_norm_penalty": norm_fused,
    "Liger's RMSNorm, penalty in PyTorch": norm_liger,
    "plain PyTorch": norm_plain,
}


def norm_row(name: str, d: int, target: str) -> Row:
    """RMSNorm and penalty of K N rows in bfloat16: predicted times of forward and backward over their byte roofs."""
    matrix = NORM_ROWS * d * 2  # one read or write of the rows
    on_gpu: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    with fake_gpu(TARGETS[target]) as record:
        h, weight = (torch.empty(*size, d, **on_gpu, requires_grad=True) for size in ((NORM_ROWS,), ()))
        dy, dpenalty = torch.empty(NORM_ROWS, d, **on_gpu), torch.ones((), device="cuda")
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
            f"{part}_roof_us": 1e6 * roof,
            f"{part}_predicted_over_roof": predicted.seconds / roof,
        }
    return row


def norms(targets: list[str]) -> list[Row]:
    names = [name for name in NORMS if "Liger" not in name or _version("liger-kernel")]
    return [norm_row(name, shape.d, target) for target in targets for shape in READOUTS for name in names]


# A training step ------------------------------------------------------------------------------------------------------


def part_of(call: Call) -> str:
    """Where in a step a launch belongs, by its name, its op and the sizes of what it reads."""
    config = PRESETS[PRESET]
    if "adam" in call.name or "_foreach" in call.name:
        return "optimiser and clipping"
    if "attention" in call.name:
        return "attention"
    if call.op.startswith("looped::cross_entropy") or config.vocab_size in call.sizes:
        return "readout and embedding"
    if call.op.startswith("looped::rms_norm") or "rms_norm" in call.name:
        return "norms"
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
            "megabytes": predicted.bytes / 1e6,
            "gigaflops": call.flops / 1e9,
            "predicted_us": 1e6 * predicted.seconds,
            "predicted_bound": predicted.bound,
        }


def kernels(targets: list[str]) -> list[Row]:
    return [row for target in targets for shape in READOUTS for row in kernel_rows(shape, target)]


# With a GPU -----------------------------------------------------------------------------------------------------------


def measured_seconds(function: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call on the GPU present, by CUDA events, caches flushed before each; three calls warm up."""
    flush = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    times = []
    for round_ in range(rounds + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if round_ >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _measure_readout(implementation: Implementation, shape: ReadoutShape) -> float:
    inputs = Inputs.random(shape)
    differentiated = [*inputs.states, inputs.head, inputs.norm_weight, inputs.weights]

    def run() -> None:
        for tensor in differentiated:
            tensor.grad = None
        implementation.loss(inputs).backward()

    return measured_seconds(run)


def _measure_step(fused: bool) -> float:
    config = PRESETS[PRESET]
    with torch.device("cuda"):
        model = LoopedDecoder(config, fused=fused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    tokens = torch.randint(config.vocab_size, (2, BATCH, config.max_seq_len), device="cuda")
    return measured_seconds(
        lambda: training_step(
            model, optimizer, tokens[0], tokens[1], supervision="per-loop", penalty=PENALTY, dtype=torch.bfloat16
        )
    )


def measure(report: dict[str, Any]) -> None:
    """Write `measured_ms` on the GPU that is present into the rows of every target; not run yet, see above."""
    named = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    cases = {(row["implementation"], row["shape"]) for row in report["readouts"]}
    shapes = {str(shape): shape for shape in READOUTS}
    readout_ms = {case: 1e3 * _measure_readout(named[case[0]], shapes[case[1]]) for case in sorted(cases)}
    step_ms = {fused: 1e3 * _measure_step(fused) for fused in (True, False)}
    for row in report["readouts"]:
        row["measured_ms"] = readout_ms[row["implementation"], row["shape"]]
    for row in report["steps"]:
        row["measured_ms"] = step_ms[row["fused"]]


# The report -----------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
        "versions": {package: _version(package) for package in packages},
        "measured_on": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "flops_share": FLOPS_SHARE,
        "bytes_share": BYTES_SHARE,
        "gpus": rates,
        "left_out": [implementation.missing for implementation in IMPLEMENTATIONS if implementation.missing],
        "readouts": readouts(targets),
        "norms": norms(targets),
        "steps": steps(targets),
        "kernels": kernels(targets),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    given = parser.parse_args()
    report = predictions(given.targets)
    if report["measured_on"]:
        measure(report)
    given.out.mkdir(parents=True, exist_ok=True)
    text = page(report)
    (given.out / "gpu_static.md").write_text(text)
    (given.out / "gpu_static.json").write_text(json.dumps(report, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
