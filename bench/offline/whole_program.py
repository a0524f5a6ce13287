"""Training on a GPU that is not there: every line of the CUDA path runs, and what it would launch is counted.

The model, its loss, the backward pass, gradient clipping and AdamW run on fake CUDA tensors (fake_gpu.py); each Triton
launch is compiled and not run.  The second step is reported: the first one creates the optimiser's state.
Then train/run.py itself, a short run of a small demo: checkpoint, evaluation, report, continuation; and its diagnosis.
"""

import contextlib
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import safetensors.torch
import torch
from torch import Tensor

from bench.offline.fake_gpu import TARGETS, fake_gpu
from bench.offline.record import Record
from looped.config import PRESETS
from looped.diagnose.__main__ import main as diagnose
from looped.kernels import looped_cross_entropy
from looped.model import LoopedLM
from looped.supervision import Supervision
from train import run
from train.metrics import read_metrics
from train.step import training_step


class StepRecord(NamedTuple):
    """The second training step of a fresh model, and the numbers to hold it against."""

    record: Record
    expected_flops: int
    state_bytes: int
    gradients: int
    parameters: int


def step_record(
    preset: str,
    target_name: str,
    *,
    batch: int,
    fused: bool = True,
    supervision: Supervision = "per-loop",
    penalty: float = 0.01,
    measure: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    checkpoint_loops: bool = False,
    **changes: Any,
) -> StepRecord:
    """Take two training steps of a preset on the target; `changes` are fields of its LoopedConfig."""
    config = replace(PRESETS[preset], **changes)
    with fake_gpu(TARGETS[target_name]) as record:
        with torch.device("cuda"):
            model = LoopedLM(config, fused=fused, checkpoint_loops=checkpoint_loops)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
        inputs = torch.zeros(batch, config.max_seq_len, dtype=torch.int64, device="cuda")
        targets = torch.zeros_like(inputs)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            record.clear()
            state_bytes = record.live_bytes
            training_step(
                model, optimizer, inputs, targets, supervision=supervision, penalty=penalty, dtype=dtype,
                measure=measure,
            )  # fmt: skip
        gradients = sum(parameter.grad is not None for parameter in model.parameters())
        readouts = 1 if supervision == "terminal" else None
        flops = inputs.numel() * model.flops_per_token(n_readouts=readouts, seq_len=config.max_seq_len)
        return StepRecord(record, flops, state_bytes, gradients, len(list(model.parameters())))


def _triton(record: Record) -> dict[str, int]:
    """Launches of every Triton kernel, by its name; other calls have no grid."""
    return dict(Counter(call.name for call in record.calls if call.grid))


def _counts(record: Record) -> dict[str, Any]:
    """launches: kernels on the device; host_waits: why the host would wait for it, and where."""
    return {
        "launches": len(record.calls),
        "triton_launches": _triton(record),
        "flops": sum(call.flops for call in record.calls),
        "host_waits": record.host_copies,
    }


def step_report(preset: str, **options: Any) -> dict[str, Any]:
    """The counts of `step_record`; residual_norms: launches of norm_forward_kernel that add the residual stream too."""
    step = step_record(preset, "sm_90", **options)
    numbers = step._asdict()
    record = numbers.pop("record")
    residual_norms = sum(call.arguments.get("residual_ptr") is not None for call in record.calls)
    return _counts(record) | numbers | {"residual_norms": residual_norms, "peak_bytes": record.peak_bytes}


def readout_report(d: int, n_columns: int) -> dict[str, Any]:
    """The counts of looped_cross_entropy alone, forward and backward, bfloat16, per-loop with the penalty."""
    tokens, n_loops = 8192, 4
    with fake_gpu(TARGETS["sm_90"]) as record:
        half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
        states = [torch.empty(tokens, d, **half) for _ in range(n_loops)]
        head, weight = torch.empty(n_columns, d, **half), torch.empty(d, device="cuda", requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        record.clear()
        looped_cross_entropy(states, head, targets, norm_weight=weight, penalty=0.01).loss.backward()
    products = sum(call.flops > 0 for call in record.calls)
    return _counts(record) | {"matrix_products": products, "expected_flops": 6 * n_loops * tokens * d * n_columns}


# What the host does with tensors of a GPU that is not there: it writes zeros and reads ones.


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    values = {
        name: torch.zeros(x.shape, dtype=x.dtype, device="cpu") if x.is_cuda else x for name, x in tensors.items()
    }
    path.write_bytes(safetensors.torch.save(values, metadata))


def _cpu(x: Tensor) -> Tensor:
    return torch.ones(x.shape, dtype=x.dtype, device="cpu") if x.is_cuda else x


RUN = "--device cuda --vocab-size 300 --n-layers 1 --n-loops 2 --steps 5 --log-every 5 --eval-tokens 2048"


def run_report() -> dict[str, Any]:
    """train/run.py: a run of a small demo from text to report, and its continuation; then its diagnosis."""
    answers = {torch.ops.aten._local_scalar_dense.default: lambda _: 1.0}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        record = stack.enter_context(fake_gpu(TARGETS["sm_90"], answers))
        stack.enter_context(patch("safetensors.torch.save_file", _save_file))
        stack.enter_context(patch("torch.Tensor.cpu", _cpu))
        text, out = Path(folder, "text.txt"), Path(folder, "run")
        text.write_text(" ".join(f"word {number * number}" for number in range(4000)))
        begin = ["--data", str(text), "--cache", f"{folder}/cache", "--out", str(out), *RUN.split()]
        codes = [run.main(begin), run.main(["--resume", str(out), "--steps", "6"])]
        report = {
            "steps": [row["step"] for row in read_metrics(out / "metrics.jsonl")],
            "triton_launches": _triton(record),
            "host_waits": sorted(set(record.host_copies)),
        }
        codes.append(diagnose([str(out), "--device", "cuda", "--tokens", "1024", "--loops", "3"]))
        files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        return report | {"exit_codes": codes, "files": files}


STEPS: dict[str, dict[str, Any]] = {
    "fused": {},
    "plain": {"fused": False},
    "terminal": {"supervision": "terminal"},
    "measured": {"measure": True},
    "measured terminal": {"measure": True, "supervision": "terminal"},
    "gated": {"measure": True, "supervision": "gated", "exit_gate": True},
    "float32": {"dtype": torch.float32},
    "checkpointed": {"checkpoint_loops": True},
    "raw": {"readout": "raw"},
    "final-only": {"readout": "final-only"},
    "layernorm": {"readout": "layernorm"},
    "rotary": {"positions": "rotary", "inter_loop_norm": True, "tied": False},
}


def whole_report(n_layers: int) -> dict[str, dict[str, Any]]:
    """Steps of the paper's 129M model with so many layers, the run, and two readouts."""
    steps = {name: step_report("paper-129m", batch=32, n_layers=n_layers, **STEPS[name]) for name in STEPS}
    readouts = {"readout 129m": readout_report(768, 20_000), "readout large": readout_report(2048, 128_256)}
    return steps | readouts | {"run": run_report()}
