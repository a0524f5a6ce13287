"""The sweep at the paper's scale: the commands, and what a run is predicted to need on one GPU.

Nothing here was measured. Memory is 16 bytes a parameter (fp32 weight, gradient and AdamW's two moments) and, for every
token and application of a block, `21 d + 8 d_ff` bytes that the backward pass keeps: two fp32 residual sums (8 d), two
bf16 norm outputs (4 d), q, k, v and the attention's output in bf16 (8 d), a dropout mask (d), and gate, up, SiLU and
product in bf16 (8 d_ff). Time is the model's FLOPs over a share of the GPU's dense bf16 rate (MFU), for which there are
two predictions: of a step of paper-129m in plain PyTorch, and with the fused kernels (bench/results/gpu_static.md).
"""

from dataclasses import dataclass

import torch

from looped.config import PRESETS
from looped.decoder import LoopedDecoder
from looped.supervision import Supervision
from train.config import complete, preset_config

PAPER_PRESETS = ("paper-44m", "paper-129m")
# The 103,227,021 words of WikiText-103's training split and, since whitespace is a token too, as many gaps.
CORPUS_TOKENS = 2 * 103_227_021
GPUS = {"A100": 312e12, "H100": 989e12}  # dense bf16 FLOP/s, from the data sheets
# Model FLOPs over time and peak rate, predicted by bench/gpu_static.py: plain PyTorch, fused.
MFU = {"A100": (0.42, 0.50), "H100": (0.29, 0.36)}
RUNS: dict[Supervision, int] = {"per-loop": 18, "terminal": 9}  # six conditions and three, three seeds


@dataclass(frozen=True)
class Prediction:
    """Of one run. tokens: trained on, repetitions included. flops: of the matrix multiplications. hours: by GPU, from
    the larger and from the smaller MFU."""

    preset: str
    supervision: Supervision
    parameters: int
    tokens: int
    flops: float
    bytes: int
    hours: dict[str, tuple[float, float]]


def predict(preset: str, supervision: Supervision = "per-loop") -> Prediction:
    """What a run of a preset needs; terminal supervision reads out one loop of K. Raises ValueError for an unknown
    preset or one whose length is not given in epochs."""
    training, shape = complete(preset_config(preset)), PRESETS[preset]
    if training.epochs is None or training.stride is None:
        raise ValueError(f"preset must have its length in epochs. Got preset={preset!r}.")
    with torch.device("meta"):
        model = LoopedDecoder(shape)
    tokens = round(training.epochs * CORPUS_TOKENS * training.seq_len / training.stride)
    n_readouts = 1 if supervision == "terminal" else shape.n_loops
    flops = tokens * model.flops_per_token(seq_len=training.seq_len, n_readouts=n_readouts)
    kept = (21 * shape.d_model + 8 * shape.d_ff) * shape.n_layers * shape.n_loops
    step_tokens = training.batch_size * training.seq_len // training.grad_accumulation
    return Prediction(
        preset,
        supervision,
        model.parameter_count(),
        tokens,
        flops,
        16 * model.parameter_count() + kept * step_tokens,
        {gpu: (flops / MFU[gpu][1] / rate / 3600, flops / MFU[gpu][0] / rate / 3600) for gpu, rate in GPUS.items()},
    )


def paper_scale() -> str:
    """The section of a page, in Markdown."""
    rows = []
    for preset in PAPER_PRESETS:
        kinds = [predict(preset, supervision) for supervision in RUNS]
        rows += [
            [
                one.preset, one.supervision, f"{one.parameters:,}", f"{one.tokens / 1e9:.2f}e9",
                f"{one.flops / 1e18:.2f}e18", f"{one.bytes / 2**30:.0f} GiB",
                *(f"{least:.1f} to {most:.1f} h" for least, most in one.hours.values()),
            ]
            for one in kinds
        ]  # fmt: skip
        total = [
            [sum(RUNS[one.supervision] * one.hours[gpu][end] for one in kinds) / 24 for end in (0, 1)] for gpu in GPUS
        ]
        days = (f"{least:.1f} to {most:.1f} days" for least, most in total)
        rows.append([preset, f"all {sum(RUNS.values())} runs", "", "", "", "", *days])
    header = ["preset", "supervision", "parameters", "tokens a run", "FLOPs a run", "*predicted* memory",
              *(f"*predicted* time, {gpu}" for gpu in GPUS)]  # fmt: skip
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---", "---", *["---:"] * (len(header) - 2)], *rows)]
    return "\n".join([SECTION, *lines])


def _shares(gpu: str) -> str:
    low, high = MFU[gpu]
    return f"{gpu}: {GPUS[gpu] / 1e12:.0f} TFLOP/s, {high:.0%} and {low:.0%}"


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

*Predicted*, not measured: memory as 16 bytes a parameter and, for every token of a micro-batch and application of a
block, `21 d_model + 8 d_ff` bytes of activations, to which the readout's workspace comes; time as the FLOPs of
`LoopedDecoder.flops_per_token`, with one readout under terminal supervision, at a share of the dense bf16 rate that is
itself predicted, for a step of paper-129m: the shorter time at that of the fused kernels, the longer at that of plain
PyTorch ({"; ".join(_shares(gpu) for gpu in GPUS)}).
Those predictions take every product at 0.81 of the peak; no run has been timed on a GPU, and paper-44m, whose products
are smaller, will be below them. The corpus is taken as
{CORPUS_TOKENS / 1e6:.0f} million tokens (its 103 million words, and as many gaps, which are tokens), each in two
windows, since windows of 256 begin every 128 tokens, in each of 4 epochs.
"""
