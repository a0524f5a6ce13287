"""What a training run will need: memory on each GPU, speed and time; and what to do if it is too much.

    python -m looped.plan --preset ouro-1.4b --gpus 8 --gpu h100

The options of model, batch and execution are those of train/run.py, with the preset's shape. Nothing is run:
memory is that of looped/step_memory.py, and speed the model's FLOPs at the share of a GPU's peak that one step reached.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from looped.command_line import command_line
from looped.config import PRESETS, LoopedConfig, LoopedShape, at_least
from looped.model import LoopedLM
from looped.peak_flops import peak_tflops
from looped.step_memory import Shard, Step, memory, parameters, trained_loops
from looped.supervision import Supervision

PROGRAM = "python -m looped.plan"


class Gpu(NamedTuple):
    """memory: GiB."""

    name: str
    memory: float

    @property
    def peak(self) -> float:
        """TFLOP/s of dense bf16 products."""
        peak = peak_tflops(self.name)
        assert peak is not None
        return peak


GPUS = {
    "h100": Gpu("H100 80GB", 79), "h200": Gpu("H200", 139), "b200": Gpu("B200", 178), "a100": Gpu("A100 80GB", 79),
    "l40s": Gpu("L40S", 44), "rtx4090": Gpu("RTX 4090", 23.5), "mi300x": Gpu("MI300X", 191),
}  # fmt: skip
USABLE = 0.92  # of a GPU's memory; the rest is left to libraries and to gaps between tensors

# One step of paper-129m, 32 x 256 tokens, K = 4, on one H200 as one CUDA graph (2026-11-27, torch 2.11.0+cu130, commit
# 7fae451): fused, its share of 989 TFLOP/s; and the peaks of memory beside weights, gradients and moments.
MEASURED_MFU = 0.405
MEASURED_GIB = {"fused": 12.7, "plain": 19.3}
NETWORK = 50e9  # bytes/s a GPU sends and receives between machines: 400 Gb/s, an assumption


@dataclass(frozen=True, kw_only=True)
class PlanOptions(LoopedShape):
    """Plan a training run: memory on each GPU with every way to divide it, speed and time."""

    preset: str = "demo"
    """Whose shape to take."""
    gpus: int = 1
    """How many GPUs, all of one kind."""
    gpu: Literal["h100", "h200", "b200", "a100", "l40s", "rtx4090", "mi300x"] = "h100"
    """Which GPU."""
    tokens: float | None = None
    """Tokens to train on, for the time it takes."""
    growth: bool = False
    """Print how cost grows with loops, width, vocabulary, batch and GPUs instead, as Markdown."""

    vocab_size: int
    """Tokens of the vocabulary."""
    seq_len: int
    """Tokens of a sequence."""
    batch_size: int = 16
    """Sequences of one optimisation step, on all GPUs together."""
    grad_accumulation: int = 1
    """Micro-batches that a step's sequences are divided into."""
    supervision: Supervision = "per-loop"
    """Which loops are read out."""
    backprop_loops: int | None = None
    """Loops that have a gradient, the last ones. None: all."""
    fused: bool = True
    """Fused, or plain PyTorch."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of products, by autocast."""
    checkpoint_loops: bool = False
    """Recompute each loop in the backward pass instead of keeping its activations."""
    shard: Shard = "none"
    """fsdp2: weights, gradients and moments are shared out over the GPUs."""
    shard_head: bool = False
    """The table of the vocabulary is shared out over the GPUs."""

    @property
    def model(self) -> LoopedConfig:
        """Raises ValueError if fields contradict each other."""
        shape = {field.name: getattr(self, field.name) for field in dataclasses.fields(LoopedShape)}
        shape["exit_gate"] = self.exit_gate or self.supervision == "gated"
        return dataclasses.replace(PRESETS[self.preset], vocab_size=self.vocab_size, max_seq_len=self.seq_len, **shape)

    @property
    def step(self) -> Step:
        return Step(
            sequences=self.batch_size // (self.gpus * self.grad_accumulation), seq_len=self.seq_len, fused=self.fused,
            half=self.dtype == "bf16", supervision=self.supervision, backprop_loops=self.backprop_loops,
            checkpoint_loops=self.checkpoint_loops, accumulated=self.grad_accumulation > 1, gpus=self.gpus,
            shard=self.shard, shard_head=self.shard_head,
        )  # fmt: skip


def parse(argv: Sequence[str]) -> PlanOptions:
    """The options that ``argv`` asks for over the preset's shape. Raises ValueError in one line."""
    known = [word for word in argv if word not in ("-h", "--help")]
    preset = command_line(known, _defaults("demo"), PROGRAM).preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}. Got preset={preset!r}.")
    options = command_line(list(argv), _defaults(preset), PROGRAM)
    sizes = ("gpus", "batch_size", "grad_accumulation", "seq_len", "vocab_size", "backprop_loops")
    at_least(1, **{name: getattr(options, name) for name in sizes})
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        raise ValueError(f"tokens must be finite and above 0. Got tokens={options.tokens}.")
    if options.batch_size % (options.gpus * options.grad_accumulation):
        raise ValueError(
            "batch_size must be divisible by gpus * grad_accumulation. Got "
            f"batch_size={options.batch_size}, gpus={options.gpus}, grad_accumulation={options.grad_accumulation}."
        )
    if options.gpus == 1 and (options.shard != "none" or options.shard_head):
        raise ValueError("shard and shard_head need several GPUs. Got gpus=1.")
    if options.shard == "fsdp2" and options.shard_head:
        raise ValueError("shard_head must be left out with shard=fsdp2, which shares the head out, too.")
    if options.shard_head and not options.fused:
        raise ValueError("shard_head needs the fused readout. Got fused=False.")
    _ = options.model  # raises
    return options


def _defaults(preset: str) -> PlanOptions:
    model = PRESETS[preset]
    shape = {field.name: getattr(model, field.name) for field in dataclasses.fields(LoopedShape)}
    return PlanOptions(preset=preset, vocab_size=model.vocab_size, seq_len=model.max_seq_len, **shape)


# Memory ---------------------------------------------------------------------------------------------------------------


def ways(options: PlanOptions) -> Iterator[PlanOptions]:
    """The options with every way to divide or recompute what a step keeps."""
    shared: list[dict[str, Any]] = [{"shard": "none", "shard_head": False}]
    if options.gpus > 1:
        shared += [{"shard": "none", "shard_head": True}] if options.fused else []
        shared += [{"shard": "fsdp2", "shard_head": False}]
    for changes in shared:
        for checkpoint_loops in (False, True):
            yield dataclasses.replace(options, checkpoint_loops=checkpoint_loops, **changes)


def named(options: PlanOptions) -> str:
    sharing = "--shard fsdp2" if options.shard == "fsdp2" else "--shard-head" if options.shard_head else "--shard none"
    return sharing + (" --checkpoint-loops" if options.checkpoint_loops else "")


def smaller(options: PlanOptions) -> PlanOptions | None:
    """The same with as many micro-batches as it takes to fit, or None if one sequence at a time does not."""
    per_gpu = options.batch_size // options.gpus
    for parts in range(options.grad_accumulation, per_gpu + 1):
        changed = dataclasses.replace(options, grad_accumulation=parts)
        if per_gpu % parts == 0 and fits(changed):
            return changed
    return None


def fits(options: PlanOptions) -> bool:
    return memory(options.model, options.step).total <= USABLE * GPUS[options.gpu].memory * 2**30


def verdict(options: PlanOptions) -> str:
    if fits(options):
        return "fits"
    changed = smaller(options)
    if changed is None:
        return "too large, even one sequence at a time"
    return f"too large; fits with --grad-accumulation {changed.grad_accumulation}"


def advice(options: PlanOptions) -> str:
    """What is to be done, in one line: of what fits, what costs the least time."""
    if fits(options):
        return f"{named(options)} fits"
    candidates = [options, *sorted(ways(options), key=lambda way: (way.checkpoint_loops, way.shard == "fsdp2"))]
    for way in candidates:
        changed = smaller(way)
        if changed is not None:
            parts = changed.grad_accumulation
            more = f" --grad-accumulation {parts}" if parts > options.grad_accumulation else ""
            return f"{named(options)} is too large: take {named(way)}{more}"
    return (
        f"{named(options)} is too large, and so is every other way with one sequence at a time: take a shorter "
        "--seq-len, more --gpus or a GPU with more memory"
    )


KINDS = ("weights", "moments", "gradients", "gathered", "states", "activations", "readout", "logits")


def memory_table(options: PlanOptions) -> str:
    rows = [["GiB on one GPU", *KINDS, "total", ""]]
    for way in ways(options):
        needed = memory(way.model, way.step)
        kinds = (f"{getattr(needed, kind) / 2**30:.2f}" for kind in KINDS)
        rows.append([named(way), *kinds, f"{needed.total / 2**30:.1f}", f"{verdict(way)} (peak: {needed.moment})"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *values, last in rows:
        cells = (value.rjust(width) for value, width in zip(values, widths[1:-1], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {'  '.join(cells)}  {last}".rstrip())
    return "\n".join(lines)


# Speed ----------------------------------------------------------------------------------------------------------------


def flops_per_token(options: PlanOptions) -> tuple[int, int]:
    """Of the model; and what recomputing its loops adds: their forward pass once more."""
    with torch.device("meta"):
        model = LoopedLM(options.model)
    n_loops, n_read = trained_loops(options.model, options.step)
    seq_len = options.seq_len
    needed = model.flops_per_token(n_readouts=n_read, seq_len=seq_len, backprop_loops=options.backprop_loops)
    again = model.flops_per_token(n_loops, n_readouts=0, seq_len=seq_len, training=False)
    return needed, again if options.checkpoint_loops else 0


def tokens_per_second(options: PlanOptions) -> float:
    """At the measured share of the peak, in bf16; communication is not in it."""
    return options.gpus * GPUS[options.gpu].peak * 1e12 * MEASURED_MFU / sum(flops_per_token(options))


def duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def bytes_sent(options: PlanOptions) -> float:
    """What one GPU sends in a step, in rings.

    Copies of the model (DDP): the sum of the gradients, which takes two passes. FSDP2: the weights are gathered, and
    each GPU keeps its share of the summed gradients. With `shard_head` the table's gradient stays where it is. Instead
    rows of states and of their gradients are sent, and four numbers for each row of logits.
    """
    count, step = parameters(options.model), options.step
    passed = (options.gpus - 1) / options.gpus
    if options.shard == "fsdp2":
        gathered = step.product_bytes * count.blocks + 4 * (count.total - count.blocks)
        return passed * (gathered + 4 * count.total)
    if not options.shard_head:
        return passed * 8 * count.total
    _, n_read = trained_loops(options.model, step)
    rows = options.batch_size * options.seq_len * n_read
    of_rows = rows * (2 * step.product_bytes * options.d_model + 16)
    return passed * (8 * (count.total - count.head) + of_rows)


# What is said ---------------------------------------------------------------------------------------------------------


def report(options: PlanOptions) -> str:
    gpu, step, config = GPUS[options.gpu], options.step, options.model
    lines = [
        f"model     {options.preset}: {parameters(config).total:,} parameters, K = {config.n_loops} loops, "
        f"{options.supervision} supervision, {'fused' if options.fused else 'plain PyTorch'}, {options.dtype}",
        f"step      {options.batch_size} x {options.seq_len} tokens on {options.gpus} x {gpu.name} of {gpu.memory:g} "
        f"GiB; sequences on each at a time: {step.sequences}",
        f"predicted memory, to fit in {USABLE:.0%} of a GPU's:",
        memory_table(options),
        f"advice    {advice(options)}",
    ]
    if options.dtype == "bf16":
        fast, recomputing = (
            tokens_per_second(dataclasses.replace(options, checkpoint_loops=checkpoint)) for checkpoint in (False, True)
        )
        lines.append(
            f"predicted speed at {MEASURED_MFU:.1%} of {gpu.peak:g} TFLOP/s, without communication: {fast:,.0f} "
            f"tokens/s, with --checkpoint-loops {recomputing:,.0f}"
        )
        if options.tokens is not None:
            lines.append(
                f"predicted time for {options.tokens:,.0f} tokens: {duration(options.tokens / fast)}, with "
                f"--checkpoint-loops {duration(options.tokens / recomputing)}"
            )
    else:
        lines.append("no speed: it was measured in bf16 alone")
    lines.append(
        f"measured  on GPUs, of all this: paper-129m, 8,192 tokens, one H200: {MEASURED_MFU:.1%} of the peak; "
        f"{MEASURED_GIB['fused']} GiB fused, {MEASURED_GIB['plain']} plain, beside weights, gradients and moments"
    )
    return "\n".join(lines)


def growth(options: PlanOptions) -> str:
    """How cost grows: one thing doubled at a time, then more GPUs with the same batch on each; as Markdown."""
    base = dataclasses.replace(options, gpus=1, shard="none", shard_head=False)
    wide: dict[str, Any] = {"d_model": 2 * base.d_model, "n_heads": 2 * base.n_heads, "d_ff": 2 * base.d_ff}
    cases = {
        base.preset: base,
        "K doubled": dataclasses.replace(base, n_loops=2 * base.n_loops),
        "d doubled (heads, ff too)": dataclasses.replace(base, **wide),
        "V doubled": dataclasses.replace(base, vocab_size=2 * base.vocab_size),
        "N doubled": dataclasses.replace(base, batch_size=2 * base.batch_size),
    }
    for gpus in (8, 64, 1000):
        cases[f"{gpus:,} GPUs"] = dataclasses.replace(base, gpus=gpus, batch_size=gpus * base.batch_size)
    lines = [
        "| | parameters | GFLOPs a token | tokens/s | GiB whole | GiB fsdp2 | step, ms | exchange, ms: whole, fsdp2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        whole, shared = (dataclasses.replace(case, shard=shard) for shard in ("none", "fsdp2"))
        gib = [memory(way.model, way.step).total / 2**30 for way in (whole, shared)]
        sent = [1e3 * bytes_sent(way) / NETWORK for way in (whole, shared)]
        speed = tokens_per_second(case)
        of_step = 1e3 * case.batch_size * case.seq_len / speed
        shared_gib, exchange = ("", "") if case.gpus == 1 else (f"{gib[1]:.1f}", f"{sent[0]:.0f}, {sent[1]:.0f}")
        lines.append(
            f"| {name} | {parameters(case.model).total / 1e6:,.0f}e6 | {sum(flops_per_token(case)) / 1e9:.2f} | "
            f"{speed:,.0f} | {gib[0]:.1f} | {shared_gib} | {of_step:.0f} | {exchange} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan. Returns the exit code: 0, or 2 after one line on stderr if the input is bad."""
    try:
        options = parse(sys.argv[1:] if argv is None else list(argv))
    except (ValueError, TypeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(growth(options) if options.growth else report(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
