"""One training step on a GPU that is not there: every line of the CUDA path runs, and what it would launch is counted.

    python -m bench.gpu_path [--preset paper-129m] [--batch 32] [--target sm_90] > report.json

The model, its loss, the backward pass, gradient clipping and AdamW run on fake CUDA tensors (bench/fake_gpu.py); each
Triton launch is compiled and not run.  The second step is reported: the first one creates the optimiser's state.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.fake_gpu import TARGETS, Record, fake_gpu
from looped.config import PRESETS
from looped.decoder import LoopedDecoder
from looped.supervision import Supervision, evaluation_losses
from train.step import state_norms, training_step

TRITON_KERNELS = ("norm_", "radial_", "cross_entropy_", "stream_", "combine_")


@dataclass(frozen=True)
class StepReport:
    """One training step.  launches: kernels on the device; host_waits: why the host would wait for it, and where."""

    case: str
    target: str
    tokens: int
    launches: int
    triton_launches: dict[str, int]
    flops: int
    expected_flops: int
    read_write_bytes: int
    peak_bytes: int
    state_bytes: int
    host_waits: list[str]
    gradients: int
    parameters: int


def _triton(record: Record) -> dict[str, int]:
    return dict(Counter(call.name for call in record.calls if call.name.startswith(TRITON_KERNELS)))


def step_report(
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
) -> StepReport:
    """The second training step of a preset on the target; `changes` are fields of its LoopedConfig."""
    config = replace(PRESETS[preset], **changes)
    options = {"fused": fused, "supervision": supervision, "measure": measure, "checkpoint_loops": checkpoint_loops}
    with fake_gpu(TARGETS[target_name]) as record:
        with torch.device("cuda"):
            model = LoopedDecoder(config, fused=fused, checkpoint_loops=checkpoint_loops)
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
        readouts = None if supervision == "per-loop" else 1
        flops = inputs.numel() * model.flops_per_token(n_readouts=readouts, seq_len=config.max_seq_len)
        return StepReport(
            case=json.dumps({"preset": preset, "dtype": str(dtype), **options, **changes}),
            target=target_name,
            tokens=inputs.numel(),
            launches=record.launches(),
            triton_launches=_triton(record),
            flops=sum(call.flops for call in record.calls),
            expected_flops=flops,
            read_write_bytes=sum(call.read_write_bytes for call in record.calls),
            peak_bytes=record.peak_bytes,
            state_bytes=state_bytes,
            host_waits=record.host_copies,
            gradients=gradients,
            parameters=len(list(model.parameters())),
        )


def evaluation_report(preset: str, target_name: str, *, batch: int) -> dict[str, Any]:
    """One batch of an evaluation, up to the tensors whose values the end of the evaluation reads."""
    config = PRESETS[preset]
    with fake_gpu(TARGETS[target_name]) as record, torch.no_grad():
        with torch.device("cuda"):
            model = LoopedDecoder(config).eval()
        tokens = torch.zeros(batch, config.max_seq_len, dtype=torch.int64, device="cuda")
        record.clear()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            states = model(tokens)
            losses = evaluation_losses(model, states, tokens)
        norms = state_norms(states)
        return {
            "case": f"evaluation of {preset}",
            "losses": list(losses.shape),
            "norms": list(norms.shape),
            "launches": record.launches(),
            "triton_launches": _triton(record),
            "host_waits": record.host_copies,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="paper-129m")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    given = parser.parse_args()
    steps: dict[str, dict[str, Any]] = {
        "fused": {},
        "plain": {"fused": False},
        "terminal": {"supervision": "terminal"},
        "measured": {"measure": True},
        "measured terminal": {"measure": True, "supervision": "terminal"},
        "float32": {"dtype": torch.float32},
        "checkpointed": {"checkpoint_loops": True},
        "raw": {"readout": "raw"},
        "final-only": {"readout": "final-only"},
        "layernorm": {"readout": "layernorm"},
        "rotary": {"positions": "rotary", "inter_loop_norm": True, "tied": False},
    }
    report = {
        name: asdict(step_report(given.preset, given.target, batch=given.batch, **options))
        for name, options in steps.items()
    }
    report["evaluation"] = evaluation_report(given.preset, given.target, batch=given.batch)
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
