"""The configuration of a run: one frozen dataclass, which is also the command line.

The model's options are the fields of `looped.config.LoopedShape`. ``preset_config`` has the defaults of a preset.
``complete`` fills in what depends on other options and ``validate`` checks everything, both before anything is read or
written.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from looped import run_directory
from looped.config import LARGEST, PRESETS, LoopedConfig, LoopedShape
from looped.field_types import check_field_types
from looped.kernels.device import multiplies_faster
from looped.run_directory import CONFIG, check_writable, nearest_existing
from looped.supervision import Gated, Supervision
from train import processes
from train.depth import parse_depth
from train.presets import LENGTH, TRAINING
from train.tasks.task import TASKS, make_task
from train.text.tokenizer import check_vocab_size

Schedule = Literal["constant", "warmup-cosine"]
Dtype = Literal["fp32", "bf16"]
OnSaveError = Literal["stop", "continue"]
Shard = Literal["none", "fsdp2"]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The options that come before those of the model: the preset, and the text or task."""

    preset: str = "demo"
    """Whose defaults to take: demo, paper-44m, paper-129m, ouro-1.4b, huginn-small or parcae-140m (see them with
    --preset NAME --help)."""
    fused: bool = True
    """Train through the fused per-loop readout, or through plain PyTorch. Both read the same checkpoints."""

    data: str = "sotu"
    """Text: sotu, wikitext-103, or a path or (quoted) glob of .txt, .jsonl or .parquet files. Or a task that is made on
    the fly: p-hop, addition."""
    tokenizer: str | None = None
    """bpe, paper, or the path of a tokenizer.json. None: bpe; tasks have none."""
    vocab_size: int | None = None
    """Tokens of the vocabulary. None: the preset's; with a tokenizer.json or a task, its own."""
    seq_len: int
    """Tokens of a window, in training and evaluation. Of a task it is the size: 8 (1 + hops), 3 digits + 1."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopedShape, _Source):
    """Train a looped language model, evaluate it at K = 1..n_loops, and leave everything measured in one directory."""

    supervision: Supervision = "per-loop"
    """Cross-entropy at every loop; at the last one only; or at every loop with the weights that an exit gate gives it
    for each token."""
    gate_beta: float = 0.1
    """Gated supervision: this times the distance of the exit probabilities from their prior is added to the loss."""
    gate_prior: str = "uniform"
    """Gated supervision: uniform (Ouro; the distance is the negative entropy) or geometric:P, 0 < P < 1 (PonderNet)."""
    penalty: float = 0.01
    """Norm penalty: this times the mean of H_k^2 is added to the loss. 0 leaves the scale of the state free."""
    depth: str = "fixed"
    """Loops of a training step: fixed (n_loops), or drawn anew for every step, uniform:1-8 or poisson:4 (log-normal
    Poisson plus 1, as Huginn), of which at most 8 different depths occur. n_loops is what the model then is used at."""
    backprop_loops: int | None = None
    """Loops of a training step that have a gradient and are supervised, the last ones; those before run without. None:
    all. What the first loop starts from has a gradient only in steps of no more loops than that."""

    steps: int | None = None
    """Optimisation steps. None: the preset's, or as many as epochs makes."""
    epochs: float | None = None
    """Passes over the training windows, instead of steps."""
    batch_size: int = 16
    """Sequences of one optimisation step, of all processes together."""
    grad_accumulation: int = 1
    """Micro-batches that a step's sequences are divided into: less memory, the same mean gradient."""
    learning_rate: float = 3e-3
    """AdamW's learning rate, after warm-up."""
    schedule: Schedule = "constant"
    """What the learning rate does after warm-up; warmup-cosine falls to a tenth at schedule_steps."""
    schedule_steps: int | None = None
    """Steps over which the schedule runs. None: steps; when a run is continued, what they were."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises linearly, with either schedule."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on every parameter."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite, after which the run stops. They are not taken."""
    seed: int = 42
    """Seed of the weights, the dropout and the order of the windows."""
    stride: int | None = None
    """Tokens between the starts of two training windows. None: seq_len. Validation windows never overlap."""

    dtype: Dtype | None = None
    """Arithmetic of the forward and backward pass, by autocast; weights stay fp32. None: bf16 where the device has
    instructions for it, else fp32."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N. Of several processes each has the GPU of its number."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool = True
    """On a GPU: capture a step once and launch it as one CUDA graph. A continued run decides anew."""
    shard: Shard = "none"
    """With several processes: every one has all weights (none, DDP), or a share of weights, gradients and moments
    (fsdp2), gathered where they are used."""
    shard_head: bool = False
    """With several processes: each has its rows of the head alone (and of the embedding that is the head), of their
    gradient and moments, and its columns of the logits. Whole only where a checkpoint is written and to evaluate."""
    collective_timeout: float = 600.0
    """Seconds that a process waits for another that is silent before it gives up. One that has ended is noticed at
    once."""
    checkpoint_loops: bool = False
    """Recompute each loop in the backward pass instead of keeping its activations."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl; the device is waited for only then."""
    eval_tokens: int | None = 131_072
    """Validation tokens to evaluate on, in windows spread evenly over the split. None: all of it."""
    eval_loops: int | None = None
    """Deepest K of the evaluation, which has K = 1..n_loops, its multiples up to here, and this; of a task every K.
    None: n_loops if the depth is fixed, else four times that; of a task twice n_loops."""
    save_every: int = 1000
    """Steps between two checkpoints, and at most 50 before the first; 0 for one at the end only."""
    async_save: bool = False
    """Only copy what a checkpoint is of, and train on while it is written; one at a time. A kill then loses not only
    the steps since the last checkpoint, but also those taken while the next was being written."""
    on_save_error: OnSaveError = "stop"
    """What a checkpoint or a line of metrics.jsonl does that cannot be written: stop the run, or have it continue, say
    so, and try again when the next is due. What cannot be written at the end is an error in any case."""
    out: Path | None = None
    """Directory the run is left in. None: runs/<preset>-<time>. torchrun --max-restarts needs it: the processes that
    are started again go on from the checkpoint there."""
    resume: Path | None = None
    """Directory of a run to continue with its own configuration. Of the options only those of length, execution and
    tuning may change, and where the same text is."""
    cache: Path | None = None
    """Directory for tokenizers and encoded text. None: looped-lm in $XDG_CACHE_HOME or ~/.cache."""


MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(LoopedShape))

# What may change when a run is continued: how it is carried out and how long, not what is trained.
RESUMABLE = (
    "steps", "epochs", "fused", "device", "compile", "checkpoint_loops", "grad_accumulation",
    "log_every", "eval_tokens", "eval_loops", "save_every", "resume", "cache", "max_bad_steps", "cuda_graph",
    "shard", "shard_head", "collective_timeout", "async_save", "on_save_error",
)  # fmt: skip

# What else may change then, because training may ask for it; the run says so.
RETUNABLE = ("learning_rate", "grad_clip", "weight_decay", "schedule_steps")

# Where text and tokenizer are may change; that they are the same is told by their fingerprint.
MOVABLE = ("data", "tokenizer")


def preset_config(preset: str) -> TrainConfig:
    """The defaults of a preset. Raises ValueError for an unknown one."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}. Got preset={preset!r}.")
    model = PRESETS[preset]
    shape = {name: getattr(model, name) for name in MODEL_FIELDS}
    return TrainConfig(preset=preset, seq_len=model.max_seq_len, **shape, **TRAINING[preset])


def complete(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on other options: ``steps`` or ``epochs`` and the ``vocab_size`` of a tokenizer that is to
    be trained, from the preset; ``tokenizer`` and ``stride`` of text; ``vocab_size`` of a task; ``eval_loops``;
    ``dtype``; ``cuda_graph``, off without a GPU; ``exit_gate``, on with gated supervision; and ``out``, named after the
    preset and the time.

    Raises ValueError if steps and epochs are both given, options of text are given with a task, or ``device`` is not
    there.
    """
    if config.steps is not None and config.epochs is not None:
        raise ValueError(f"give steps or epochs, not both. Got steps={config.steps}, epochs={config.epochs}.")
    filled: dict[str, Any] = {}
    if config.steps is None and config.epochs is None:
        filled |= LENGTH[config.preset]
    is_task = config.data in TASKS
    filled |= _of_task(config) if is_task else _of_text(config)
    if config.eval_loops is None:
        beyond = 2 if is_task else 1 if config.depth == "fixed" else 4
        filled["eval_loops"] = beyond * config.n_loops
    if config.dtype is None:
        filled["dtype"] = "bf16" if _has_bf16(device_of(config)) else "fp32"
    if device_of(config).type != "cuda":
        filled["cuda_graph"] = False
    if config.supervision == "gated":
        filled["exit_gate"] = True
    if config.out is None:
        if processes.may_restart() and config.resume is None:
            raise ValueError("out must be given with torchrun --max-restarts, to find the run again. Got out=None.")
        filled["out"] = config.resume or Path("runs") / f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"
    return dataclasses.replace(config, **filled)


def _of_text(config: TrainConfig) -> dict[str, Any]:
    tokenizer = config.tokenizer or "bpe"
    filled: dict[str, Any] = {"tokenizer": tokenizer, "stride": config.stride or config.seq_len}
    if config.vocab_size is None and tokenizer in ("bpe", "paper"):
        filled["vocab_size"] = PRESETS[config.preset].vocab_size
    return filled


def _of_task(config: TrainConfig) -> dict[str, Any]:
    for name in ("tokenizer", "stride", "epochs"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} must not be given with a task, which is made without end. "
                f"Got {name}={getattr(config, name)} with data={config.data}."
            )
    if config.steps is None and "epochs" in LENGTH[config.preset]:
        raise ValueError(f"steps must be given: data={config.data} has no epochs, as preset={config.preset} asks for.")
    vocab_size = make_task(config.data, config.seq_len).vocab_size
    if config.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"vocab_size must be {vocab_size} with data={config.data}. Got vocab_size={config.vocab_size}."
        )
    return {"vocab_size": vocab_size}


def read_config(run: Path) -> TrainConfig:
    """The configuration in a run's config.json. Raises ValueError if there is none, or none of this version."""
    path = run / CONFIG
    try:
        stored = run_directory.read_config(run)["train"]
    except ValueError as error:
        raise ValueError(f"resume must be the directory of a run. {error}") from error
    try:
        cache = None if stored["cache"] is None else Path(stored["cache"])
        config = TrainConfig(**(stored | {"cache": cache}))
        check_field_types(config)
        model_config(config, config.vocab_size or 1)
        return config
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"resume must be the directory of a run. {path} cannot be used ({error!r:.120}).") from error


def model_config(config: TrainConfig, vocab_size: int) -> LoopedConfig:
    """The model of a run. Raises LoopedConfig's ValueError if its fields contradict each other."""
    return dataclasses.replace(
        PRESETS[config.preset],
        vocab_size=vocab_size,
        max_seq_len=config.seq_len,
        **{name: getattr(config, name) for name in MODEL_FIELDS},
    )


def supervision_of(config: TrainConfig) -> Supervision | Gated:
    """The supervision of a run, with its options. Raises ValueError if one of those is out of its range."""
    return Gated(config.gate_beta, config.gate_prior) if config.supervision == "gated" else config.supervision


def device_of(config: TrainConfig) -> torch.device:
    """The device that ``config.device`` names; of several processes, this one's. Raises ValueError if there is no such
    device."""
    name, count = config.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N. Got device={name!r}.")
    if processes.world_size() > 1 and (name == "cuda" or (name == "auto" and count)):
        name = f"cuda:{processes.local_rank()}"
    elif processes.world_size() > 1 and ":" in name:
        raise ValueError(f"device must be auto, cpu or cuda with several processes. Got device={name!r}.")
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name} was asked for, and PyTorch sees {count} CUDA devices. Use --device cpu.")
    return device


def _has_bf16(device: torch.device) -> bool:
    """Whether matrix multiplications in bf16 are faster than in fp32; on many CPUs they are slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies_faster(torch.bfloat16)


def validate(config: TrainConfig) -> None:
    """Check a complete configuration, the device and the out directory.

    Raises ValueError naming the option, the rule and the value.
    """
    check_field_types(config)
    for name in ("steps", "batch_size", "grad_accumulation", "stride", "log_every", "eval_tokens", "schedule_steps",
                 "max_bad_steps", "seq_len", "backprop_loops"):  # fmt: skip
        _check(config, name, lambda value: value >= 1, "at least 1")
    for name in ("batch_size", "seq_len", "eval_loops"):
        _check(config, name, lambda value: value <= LARGEST, f"at most {LARGEST:,}")
    for name in ("epochs", "learning_rate", "grad_clip"):
        _check(config, name, lambda value: 0 < value < math.inf, "finite and above 0")
    for name in ("penalty", "weight_decay"):
        _check(config, name, lambda value: 0 <= value < math.inf, "finite and at least 0")
    for name in ("warmup_steps", "save_every"):
        _check(config, name, lambda value: value >= 0, "at least 0")
    _check(config, "seed", lambda value: 0 <= value < 2**63, "in [0, 2^63)")
    parse_depth(config.depth, config.n_loops)
    _check(config, "eval_loops", lambda value: value >= config.n_loops, f"at least n_loops={config.n_loops}")
    _check(config, "collective_timeout", lambda value: 0 < value <= 1e9, "above 0 and at most 1e9")
    n_processes = processes.world_size()
    if config.batch_size % (n_processes * config.grad_accumulation):
        times, given = ("processes x ", f"{n_processes} processes, ") if n_processes > 1 else ("", "")
        raise ValueError(
            f"batch_size must be divisible by {times}grad_accumulation. "
            f"Got {given}batch_size={config.batch_size}, grad_accumulation={config.grad_accumulation}."
        )
    if config.shard != "none" and config.compile:
        raise ValueError(f"compile must be left out when weights are shared out. Got compile and shard={config.shard}.")
    if config.shard != "none" and n_processes == 1:
        raise ValueError(f"shard must be none with one process; torchrun starts several. Got shard={config.shard}.")
    if config.shard_head:
        _check_shard_head(config, n_processes)
    _check_gate(config)
    if config.tokenizer is not None:
        if config.tokenizer not in ("bpe", "paper") and not Path(config.tokenizer).is_file():
            raise ValueError(
                f"tokenizer must be bpe, paper or the path of a tokenizer.json. Got tokenizer={config.tokenizer!r}."
            )
        if config.vocab_size is not None:
            check_vocab_size(config.tokenizer, config.vocab_size)
    model_config(config, config.vocab_size or 1)
    device_of(config)
    if config.resume is None and config.out is not None:
        check_out_directory(config.out)
    if config.cache is not None and not (nearest := nearest_existing(config.cache)).is_dir():
        raise ValueError(f"cache must be a directory, and {nearest} is a file. Got cache={config.cache}.")


def _check(config: TrainConfig, name: str, holds: Callable[[Any], bool], rule: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ValueError(f"{name} must be {rule}. Got {name}={value}.")


def _check_shard_head(config: TrainConfig, n_processes: int) -> None:
    rules = {
        "several processes, which torchrun starts": (n_processes > 1, "one process"),
        "fused, as the plain readout forms all logits": (config.fused, "fused=False"),
        "shard=none, as fsdp2 gathers all weights": (config.shard == "none", f"shard={config.shard}"),
        "compile to be left out": (not config.compile, "compile=True"),
    }
    for rule, (holds, got) in rules.items():
        if not holds:
            raise ValueError(f"shard_head needs {rule}. Got shard_head=True and {got}.")


def _check_gate(config: TrainConfig) -> None:
    """The gate's options are those of gated supervision; a continued run may have a gate from train/gate.py."""
    if config.supervision == "gated":
        supervision_of(config)
        if config.backprop_loops is not None:
            raise ValueError(
                "backprop_loops must be left out with gated supervision: the gate would learn the last loops alone. "
                f"Got backprop_loops={config.backprop_loops}."
            )
        return
    absent = {"gate_beta": Gated.beta, "gate_prior": Gated.prior} | ({} if config.resume else {"exit_gate": False})
    for name, value in absent.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} must be left out unless supervision is gated. "
                f"Got {name}={getattr(config, name)}, supervision={config.supervision}."
            )


def comparable(config: TrainConfig, name: str) -> Any:
    """An option's value as runs are compared by it: paths absolute, as config.json has them."""
    value = getattr(config, name)
    return os.path.abspath(value) if name in ("data", "tokenizer") and value is not None else value


def check_out_directory(out: Path) -> None:
    """Raises ValueError unless ``out`` is empty or not there yet, and can be written."""
    if (out / "config.json").exists():
        raise ValueError(f"out directory {out} already holds a run. Continue it with --resume {out}, or name another.")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out directory {out} must be empty or not exist yet, and is neither.")
    check_writable(out)
