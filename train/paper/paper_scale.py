"""The sweep at the paper's scale: the commands, and what a run needs on one H200, by the planner (looped/plan.py)."""

from dataclasses import dataclass

from looped import plan
from looped.step_memory import memory, parameters
from looped.supervision import Supervision
from train.config import complete, preset_config
from train.paper.tables import table

PAPER_PRESETS = ("paper-44m", "paper-129m")
# The 103,227,021 words of WikiText-103's training split and, since whitespace is a token too, as many gaps.
CORPUS_TOKENS = 2 * 103_227_021
RUNS: dict[Supervision, int] = {"per-loop": 18, "terminal": 9}  # six conditions and three, three seeds


@dataclass(frozen=True)
class Estimate:
    """What one run needs. tokens: trained on, with repetitions. flops: of the matrix multiplications."""

    parameters: int
    tokens: int
    flops: float
    bytes: float
    hours: float


def estimate(preset: str, supervision: Supervision = "per-loop") -> Estimate:
    """What a run of a preset needs. Raises ValueError for an unknown preset or one whose length is not in epochs."""
    training = complete(preset_config(preset))
    if training.epochs is None or training.stride is None:
        raise ValueError(f"preset must have its length in epochs. Got preset={preset!r}.")
    tokens = round(training.epochs * CORPUS_TOKENS * training.seq_len / training.stride)
    options = plan.parse([
        "--preset", preset, "--gpu", "h200", "--supervision", supervision, "--batch-size", str(training.batch_size),
        "--seq-len", str(training.seq_len), "--grad-accumulation", str(training.grad_accumulation),
    ])  # fmt: skip
    return Estimate(
        parameters=parameters(options.model).total,
        tokens=tokens,
        flops=tokens * sum(plan.flops_per_token(options)),
        bytes=memory(options.model, options.step).total,
        hours=tokens / plan.tokens_per_second(options) / 3600,
    )


def paper_scale() -> str:
    """The section of a page, in Markdown."""
    rows = []
    for preset in PAPER_PRESETS:
        days = 0.0
        for supervision, n_runs in RUNS.items():
            run = estimate(preset, supervision)
            rows.append([
                preset, supervision, f"{run.parameters:,}", f"{run.tokens / 1e9:.2f}e9", f"{run.flops / 1e18:.2f}e18",
                f"{run.bytes / 2**30:.0f} GiB", f"{run.hours:.1f} h",
            ])  # fmt: skip
            days += n_runs * run.hours / 24
        rows.append([preset, f"all {sum(RUNS.values())} runs", "", "", "", "", f"{days:.1f} days"])
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

*Estimated*, by `python -m looped.plan`: no run of this length has been made. The time is that of a run at
{plan.MEASURED_MFU:.1%} of the GPU's peak, which one fused step of paper-129m reached on an NVIDIA H200 as one CUDA
graph; the smaller products of paper-44m will be below it. With terminal supervision one loop is read out. The corpus
is taken as {CORPUS_TOKENS / 1e6:.0f} million tokens (its 103 million words, and as many gaps, which are tokens), each
in two windows, since windows of 256 begin every 128 tokens, in each of 4 epochs.
"""
