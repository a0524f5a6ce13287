"""The sweep at the paper's scale: the commands, and what a run is predicted to need on one GPU.

Nothing here was measured. Memory is 16 bytes a parameter (fp32 weight, gradient and AdamW's two moments) and, for every
token and application of a block, `21 d + 8 d_ff` bytes that the backward pass keeps: two fp32 residual sums (8 d), two
bf16 norm outputs (4 d), q, k, v and the attention's output in bf16 (8 d), a dropout mask (d), and gate, up, SiLU and
product in bf16 (8 d_ff). Time is the model's FLOPs over an assumed share of the GPU's dense bf16 rate.
"""

from dataclasses import dataclass

import torch

from looped.config import PRESETS
from looped.decoder import LoopedDecoder
from train.config import complete, preset_config

PAPER_PRESETS = ("paper-44m", "paper-129m")
# The 103,227,021 words of WikiText-103's training split and, since whitespace is a token too, as many gaps.
CORPUS_TOKENS = 2 * 103_227_021
MFU = 0.35  # assumed: model FLOPs over time and peak rate
GPUS = {"A100": 312e12, "H100": 989e12}  # dense bf16 FLOP/s, from the data sheets
RUNS = 27  # nine conditions, three seeds


@dataclass(frozen=True)
class Prediction:
    """Of one run. tokens: trained on, repetitions included. flops: of the matrix multiplications. hours: by GPU."""

    preset: str
    parameters: int
    tokens: int
    flops: float
    bytes: int
    hours: dict[str, float]


def predict(preset: str) -> Prediction:
    """What a run of a preset with per-loop supervision and the fused readout needs. Raises ValueError for an unknown
    preset or one whose length is not given in epochs."""
    training, shape = complete(preset_config(preset)), PRESETS[preset]
    if training.epochs is None or training.stride is None:
        raise ValueError(f"preset must have its length in epochs. Got preset={preset!r}.")
    with torch.device("meta"):
        model = LoopedDecoder(shape)
    tokens = round(training.epochs * CORPUS_TOKENS * training.seq_len / training.stride)
    flops = tokens * model.flops_per_token(seq_len=training.seq_len)
    kept = (21 * shape.d_model + 8 * shape.d_ff) * shape.n_layers * shape.n_loops
    step_tokens = training.batch_size * training.seq_len // training.grad_accumulation
    return Prediction(
        preset,
        model.parameter_count(),
        tokens,
        flops,
        16 * model.parameter_count() + kept * step_tokens,
        {gpu: flops / (MFU * rate) / 3600 for gpu, rate in GPUS.items()},
    )


def paper_scale() -> str:
    """The section of a page, in Markdown."""
    rows = [
        f"| {one.preset} | {one.parameters:,} | {one.tokens / 1e9:.2f}e9 | {one.flops / 1e18:.2f}e18 "
        f"| {one.bytes / 2**30:.0f} GiB | {' | '.join(f'{hours:.1f} h' for hours in one.hours.values())} "
        f"| {' | '.join(f'{RUNS * hours / 24:.1f} days' for hours in one.hours.values())} |"
        for one in map(predict, PAPER_PRESETS)
    ]
    header = ["preset", "parameters", "tokens a run", "FLOPs a run", "*predicted* memory",
              *(f"*predicted* time a run, {gpu}" for gpu in GPUS),
              *(f"*predicted* time, {RUNS} runs, {gpu}" for gpu in GPUS)]  # fmt: skip
    return "\n".join([SECTION, f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}", *rows])


SECTION = f"""\
## At the paper's scale

The same commands with another preset; one GPU, or several with `--jobs` set to their number. A run that was stopped is
continued when the command is given again.

```
python train/sweep.py --preset paper-44m --out runs/sweep-44m
python -m train.claims --runs runs/sweep-44m --out runs/sweep-44m/claims

python train/sweep.py --preset paper-129m --out runs/sweep-129m
python -m train.claims --runs runs/sweep-129m --out runs/sweep-129m/claims
```

Both take WikiText-103 from the Hugging Face hub; `--data` names other text. `--conditions` and `--seeds` choose fewer
runs, and what follows ` -- ` goes to every `train/run.py`, such as `-- --grad-accumulation 4` for less memory.

*Predicted*, not measured: memory as 16 bytes a parameter and, for every token of a micro-batch and application of a
block, `21 d_model + 8 d_ff` bytes of activations, to which the readout's workspace comes; time as the FLOPs of
`LoopedDecoder.flops_per_token` at an assumed {MFU:.0%} of the dense bf16 rate
({", ".join(f"{gpu} {rate / 1e12:.0f} TFLOP/s" for gpu, rate in GPUS.items())}). The corpus is taken as
{CORPUS_TOKENS / 1e6:.0f} million tokens (its 103 million words, and as many gaps, which are tokens), each in two
windows, since windows of 256 begin every 128 tokens, in each of 4 epochs.
"""
