"""The times behind bench/gpu_static.py's predictions, on the GPU that is present, where it is one of the targets.

CUDA events, caches flushed before every round, the median of the rounds.  An implementation that fails leaves its error
in its row, and the others are measured.  The decoder uses flash-attn here where it is installed; its prediction is of
PyTorch's flash kernel.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.fake_gpu import TARGETS
from bench.gpu_peers import IMPLEMENTATIONS, Implementation, Inputs
from bench.shapes import ReadoutShape
from looped.config import PRESETS
from looped.decoder import LoopedDecoder
from looped.kernels import rms_norm_penalty
from train.step import training_step

Row = dict[str, Any]
READOUTS = (ReadoutShape(4, 8192, 768, 20_000), ReadoutShape(4, 8192, 2048, 128_256))
NORM_ROWS = 4 * 8192
PRESET, BATCH = "paper-129m", 32
PENALTY = 0.01
WARM_UPS, ROUNDS = 3, 20


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


def norm_inputs(d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weight, and the gradients of the normed rows and of the penalty."""
    h = torch.randn(NORM_ROWS, d, device="cuda").bfloat16().requires_grad_()
    weight = torch.ones(d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return h, weight, torch.randn(NORM_ROWS, d, device="cuda").bfloat16(), torch.ones((), device="cuda")


def target_present() -> str | None:
    """The target that this machine's GPU is: by name and multiprocessors, which an H100's PCIe version has fewer of."""
    if not torch.cuda.is_available():
        return None
    name, found = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count
    return next((key for key, t in TARGETS.items() if t.name in name and t.multiprocessors == found), None)


def measured_seconds(function: Callable[..., object], prepare: Callable[[], tuple] = tuple) -> float:
    """Median time of `function(*prepare())` on the GPU present; `prepare` is not timed."""
    flush = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    times = []
    for round_ in range(WARM_UPS + ROUNDS):
        arguments = prepare()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(*arguments)
        end.record()
        torch.cuda.synchronize()
        if round_ >= WARM_UPS:
            times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def _readout(implementation: Implementation, shape: ReadoutShape) -> Row:
    inputs = Inputs.random(shape)
    differentiated = [*inputs.states, inputs.head, inputs.norm_weight, inputs.weights]

    def forget() -> tuple:
        for tensor in differentiated:
            tensor.grad = None
        return ()

    return {"measured_ms": 1e3 * measured_seconds(lambda: implementation.loss(inputs).backward(), forget)}


def _norm(name: str, d: int) -> Row:
    h, weight, dy, dpenalty = norm_inputs(d)
    forward = measured_seconds(lambda: NORMS[name](h, weight))

    def run() -> tuple:
        h.grad = weight.grad = None
        return NORMS[name](h, weight)

    backward = measured_seconds(lambda y, penalty: torch.autograd.backward([y, penalty], [dy, dpenalty]), run)
    return {"forward_measured_us": 1e6 * forward, "backward_measured_us": 1e6 * backward}


def _step(fused: bool) -> Row:
    config = PRESETS[PRESET]
    with torch.device("cuda"):
        model = LoopedDecoder(config, fused=fused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    tokens = torch.randint(config.vocab_size, (2, BATCH, config.max_seq_len), device="cuda")

    def step() -> None:
        training_step(
            model, optimizer, tokens[0], tokens[1], supervision="per-loop", penalty=PENALTY, dtype=torch.bfloat16
        )

    return {"measured_ms": 1e3 * measured_seconds(step)}


def _or_error(measurement: Callable[..., Row], *arguments: Any) -> Row:
    try:
        return measurement(*arguments)
    except Exception as error:  # whatever another library raises: it stands in the table
        return {"measured_error": f"{type(error).__name__}: {error}".splitlines()[0]}


def measure(report: dict[str, Any], target: str) -> None:
    """Write the measured times into the rows of the target's GPU, which is present."""
    named = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
    shapes = {str(shape): shape for shape in READOUTS}
    report |= {"measured_on": torch.cuda.get_device_name(), "measured_gpu": TARGETS[target].name}
    of_gpu = {
        kind: [row for row in report[kind] if row["gpu"] == TARGETS[target].name]
        for kind in ("readouts", "norms", "steps")
    }
    for row in of_gpu["readouts"]:
        row |= _or_error(_readout, named[row["implementation"]], shapes[row["shape"]])
    for row in of_gpu["norms"]:
        row |= _or_error(_norm, row["implementation"], row["d"])
    for row in of_gpu["steps"]:
        row |= _or_error(_step, row["fused"])
