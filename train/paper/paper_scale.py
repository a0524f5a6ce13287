"""The sweep at the paper's scale: the commands, and what a run needs on one GPU, estimated from one measured step.

A parameter takes 16 bytes: fp32 weight, gradient and AdamW's two moments. For every token and application of a block
the backward pass keeps `21 d + 8 d_ff` bytes: two fp32 residual sums (8 d), two bf16 norm outputs (4 d), q, k, v and
the attention's output in bf16 (8 d), a dropout mask (d), and gate, up, SiLU and product in bf16 (8 d_ff).
"""

from dataclasses import dataclass

import torch

from looped.config import PRESETS
from looped.model import LoopedLM
from looped.supervision import Supervision
from train.config import complete, preset_config
from train.paper.tables import table

PAPER_PRESETS = ("paper-44m", "paper-129m")
# The 103,227,021 words of WikiText-103's training split and, since whitespace is a token too, as many gaps.
CORPUS_TOKENS = 2 * 103_227_021
RUNS: dict[Supervision, int] = {"per-loop": 18, "terminal": 9}  # six conditions and three, three seeds
# A fused step of paper-129m, measured on one NVIDIA H200 (2026-11-26, torch 2.11.0+cu130, commit cf27876): as one CUDA
# graph, and the slowest of those whose kernels were launched one by one.
STEP_SECONDS = (0.0692, 0.170)
STEP_GIB = 17.0  # as one CUDA graph


@dataclass(frozen=True)
class Estimate:
    """What one run needs. tokens: trained on, with repetitions. flops: of the matrix multiplications."""

    parameters: int
    tokens: int
    flops: float
    bytes: int

    @property
    def hours(self) -> tuple[float, float]:
        """The least and the most, at the FLOP/s of the measured step."""
        least, most = (self.flops / step_flops() * seconds / 3600 for seconds in STEP_SECONDS)
        return least, most


def estimate(preset: str, supervision: Supervision = "per-loop") -> Estimate:
    """What a run of a preset needs; terminal supervision reads out one loop of K. Raises ValueError for an unknown
    preset or one whose length is not given in epochs."""
    training, shape = complete(preset_config(preset)), PRESETS[preset]
    if training.epochs is None or training.stride is None:
        raise ValueError(f"preset must have its length in epochs. Got preset={preset!r}.")
    with torch.device("meta"):
        model = LoopedLM(shape)
    tokens = round(training.epochs * CORPUS_TOKENS * training.seq_len / training.stride)
    n_readouts = 1 if supervision == "terminal" else shape.n_loops
    flops = tokens * model.flops_per_token(seq_len=training.seq_len, n_readouts=n_readouts)
    kept = (21 * shape.d_model + 8 * shape.d_ff) * shape.n_layers * shape.n_loops
    step_tokens = training.batch_size * training.seq_len // training.grad_accumulation
    parameters = model.parameter_count()
    return Estimate(parameters, tokens, flops, 16 * parameters + kept * step_tokens)


def step_flops() -> float:
    """FLOPs of the step that was measured."""
    training, run = preset_config("paper-129m"), estimate("paper-129m")
    return run.flops * training.batch_size * training.seq_len / run.tokens


def paper_scale() -> str:
    """The section of a page, in Markdown."""
    rows = []
    for preset in PAPER_PRESETS:
        least = most = 0.0
        for supervision, n_runs in RUNS.items():
            run = estimate(preset, supervision)
            hours = run.hours
            rows.append([
                preset, supervision, f"{run.parameters:,}", f"{run.tokens / 1e9:.2f}e9", f"{run.flops / 1e18:.2f}e18",
                f"{run.bytes / 2**30:.0f} GiB", f"{hours[0]:.1f} to {hours[1]:.1f} h",
            ])  # fmt: skip
            least, most = least + n_runs * hours[0] / 24, most + n_runs * hours[1] / 24
        rows.append([preset, f"all {sum(RUNS.values())} runs", "", "", "", "", f"{least:.1f} to {most:.1f} days"])
    header = [
        "preset", "supervision", "parameters", "tokens a run", "FLOPs a run", "*estimated* memory",
        "*estimated* time, H200",
    ]  # fmt: skip
    return SECTION + "\n" + table(header, rows, ["---", "---", *["---:"] * (len(header) - 2)])


SECTION = f"""\
## At the paper's scale

One command trains, measures and judges; one GPU, or several with `--jobs` set to their number. A run that was stopped
is continued when the command is given again.

```
python -m train.paper sweep --preset paper-44m --out runs/sweep-44m --claims runs/sweep-44m/claims
python -m train.paper sweep --preset paper-129m --out runs/sweep-129m --claims runs/sweep-129m/claims
```

Both take WikiText-103 from the Hugging Face hub; `--data` names other text. `--conditions` and `--seeds` choose fewer
runs, and what follows ` -- ` goes to every `train/run.py`, such as `-- --grad-accumulation 4` for less memory.

*Estimated*: no run of this length has been made. One fused step of paper-129m was measured on an NVIDIA H200
(2026-11-26, torch 2.11.0+cu130): {STEP_SECONDS[0] * 1e3:.1f} ms in {STEP_GIB:.1f} GiB as one CUDA graph, up to
{STEP_SECONDS[1] * 1e3:.0f} ms with its kernels launched one by one. The two times are those of a run at the FLOP/s of
these two steps; the smaller products of paper-44m will be below them. FLOPs are those of
`LoopedLM.flops_per_token`, with one readout under terminal supervision. Memory is 16 bytes a parameter and, for
every token of a micro-batch and application of a block, `21 d_model + 8 d_ff` bytes of activations. The corpus is taken
as {CORPUS_TOKENS / 1e6:.0f} million tokens (its 103 million words, and as many gaps, which are tokens), each in two
windows, since windows of 256 begin every 128 tokens, in each of 4 epochs.
"""
