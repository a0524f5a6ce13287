"""A run, ready to train: its source loaded, model built, checkpoint restored, and only then its directory written."""

import dataclasses
import importlib
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looped.checkpoint import Progress
from looped.config import LoopedConfig
from looped.flash_attention import attention_implementation
from looped.graph import CudaGraphs, Launch, eagerly
from looped.model import LoopedLM
from looped.run_directory import hold, remove_beginnings, write_config
from looped.sharding import replicate, share_out
from looped.vocabulary import share_vocabulary, whole_vocabulary
from train import checkpoint, processes
from train.config import RETUNABLE, TrainConfig, check_out_directory, device_of, model_config, read_config
from train.depth import Depth, parse_depth
from train.out_of_memory import SMALLER
from train.source import Source, Text
from train.tasks.task import TASKS, TaskSource, make_task
from train.text.batches import Windows
from train.text.data import cache_directory, load_data


@dataclass(eq=False)
class Run:
    """A run that is ready to train: everything is checked, loaded and built, and its directory is there.

    model: with its weights, or this process's share of them. trained: what a training step calls: the model, or what
    averages its gradients over several processes. step: optimisation steps done. steps: those to do, all told.
    schedule_steps: the length of the learning rate's schedule. attention: what serves it in training, in words.
    penalty: the configuration's, on the device if it is to be captured. capture_refusal: why a training step cannot be
    captured, though the device could. changes: what is trained otherwise than before, in words.
    """

    config: TrainConfig
    out: Path
    source: Source
    model: LoopedLM
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    attention: str
    launch: Launch
    penalty: float | Tensor
    depth: Depth
    capture_refusal: str | None
    steps: int
    schedule_steps: int
    step: int = 0
    changes: Sequence[str] = ()
    lock: int | None = None  # a descriptor of the directory, which no other process may train in

    def close(self) -> None:
        """Let go of the directory."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @property
    def graphs_used(self) -> bool:
        return isinstance(self.launch, CudaGraphs) and self.launch.refusal is None

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.seq_len


def prepare(config: TrainConfig) -> Run:
    """Load the source, build the model, restore a checkpoint; then, and only then, write the run's directory.

    ``config``: resolved and validated. Raises ValueError, OSError or ImportError, leaving nothing behind.
    """
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    device = device_of(config)
    processes.work(device, config.collective_timeout)
    source = processes.first_then_others(lambda: load_source(config))
    torch.manual_seed(config.seed)
    shape = model_config(config, config.vocab_size or source.vocab_size)
    processes.first_then_others(lambda: check_memory(shape, device))
    processes.from_first(check_picture)
    model = LoopedLM(shape, fused=config.fused, checkpoint_loops=config.checkpoint_loops).to(device)
    depth = parse_depth(config.depth, config.n_loops)
    if config.compile:
        _compile(model, len(depth.values))
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    trained = _trained(model, config, depth, dtype)
    launch = launcher(config, device)
    graphs = launch is not eagerly
    before = config if config.resume is None else read_config(config.resume)
    schedule_steps = config.schedule_steps or before.schedule_steps or _length(before, source)
    assert config.out is not None  # complete
    run = Run(
        config=config,
        out=config.out,
        source=source,
        model=model,
        trained=trained,
        optimizer=_optimizer(model, config, device, capturable=graphs),
        device=device,
        dtype=dtype,
        attention=attention_implementation(device, dtype, shape.head_dim, shape.dropout, compiled=config.compile),
        launch=launch,
        depth=depth,
        penalty=torch.full((), config.penalty, device=device) if graphs and config.penalty > 0 else config.penalty,
        capture_refusal=_capture_refusal(config) if graphs else None,
        steps=_length(config, source),
        schedule_steps=schedule_steps,
    )
    try:
        if config.resume is None:
            processes.meet()  # the memory of one may be too small
            processes.from_first(lambda: _write_directory(run))
        else:
            _restore(run, before)
    except BaseException:
        run.close()
        raise
    return run


def check_memory(shape: LoopedConfig, device: torch.device) -> None:
    """Raise ValueError if this machine has no memory for the model, which is made in it before it goes to a device.

    On a CPU gradients and AdamW's two moments stand beside the weights.
    """
    if not hasattr(os, "sysconf"):
        return  # Windows
    with torch.device("meta"):
        n_parameters = LoopedLM(shape).parameter_count()
    needed = n_parameters * (16 if device.type == "cpu" else 4)
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ValueError(
            f"the model must fit in memory, of which there are {present / 2**30:.1f} GiB. Got {n_parameters:,} "
            f"parameters, which take {needed / 2**30:,.1f} GiB. {SMALLER}"
        )


def check_picture() -> None:
    """Raise ImportError or ValueError if matplotlib cannot be used, which a run would find out at its end."""
    importlib.import_module("train.picture")


def load_source(config: TrainConfig) -> Source:
    """The task or the text that ``config.data`` names. Raises ValueError or OSError."""
    if config.data in TASKS:
        return TaskSource(make_task(config.data, config.seq_len))
    assert config.tokenizer is not None  # complete
    data = load_data(
        config.data,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        cache=cache_directory(config.cache),
    )
    windows = Windows(data.train.tokens, config.seq_len, config.stride or config.seq_len)
    return Text(Path(config.data).name, data, windows)


def _compile(model: LoopedLM, n_depths: int) -> None:
    """Compile in place, so that parameters keep their names, and let PyTorch compile as often as it takes.

    The loops are unrolled, so that every depth of training has graphs of its own: for steps that are measured or not,
    and for two sizes of micro-batches. Evaluation has its own graphs too, and so has its speed at every K.
    """
    if processes.world_size() > 1:  # gradients of shared weights are ready at the end alone: nothing to overlap
        torch._dynamo.config.optimize_ddp = False
    needed = 4 * n_depths + 2 * model.config.n_loops + 2
    torch._dynamo.config.recompile_limit = max(needed, torch._dynamo.config.recompile_limit)
    model.compile()


def launcher(config: TrainConfig, device: torch.device) -> Launch:
    """How functions of the device's tensors are launched: as CUDA graphs, on a GPU and unless that is not wanted.

    What several processes exchange is not captured.
    """
    graphs = device.type == "cuda" and config.cuda_graph and processes.world_size() == 1
    return CudaGraphs(device) if graphs else eagerly


def _trained(model: LoopedLM, config: TrainConfig, depth: Depth, dtype: torch.dtype) -> nn.Module:
    """What a training step calls."""
    if processes.world_size() == 1:
        return model
    if config.shard == "fsdp2":
        share_out(model, processes.group(), dtype)
        return model
    if config.shard_head:
        share_vocabulary(model, processes.group())
    idle_norm = config.inter_loop_norm and 1 in depth.values  # it stands between loops
    idle_gate = config.exit_gate and config.supervision != "gated"
    truncated = config.backprop_loops is not None and config.injection == "none"  # a step may not reach the embedding
    return replicate(model, processes.group(), find_unused=idle_norm or idle_gate or truncated)


def _capture_refusal(config: TrainConfig) -> str | None:
    if config.checkpoint_loops and config.dropout > 0:
        return "recomputing a loop with its dropout sets the random generator back, which no capture allows"
    return None


def _length(config: TrainConfig, source: Source) -> int:
    return config.steps or math.ceil((config.epochs or 0) * (source.n_sequences or 0) / config.batch_size)


def _optimizer(
    model: LoopedLM, config: TrainConfig, device: torch.device, *, capturable: bool
) -> torch.optim.Optimizer:
    """AdamW; if it is to be captured, with a learning rate on the device, which a graph reads anew each time."""
    rate, decay = config.learning_rate, config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True, capturable=capturable)
    for group in optimizer.param_groups if capturable else []:
        group["lr"] = torch.full((), rate, device=device)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _write_directory(run: Run) -> None:
    created = not run.out.exists()
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        _take(run)
        check_out_directory(run.out)  # another process may have been first while the text was loaded
        try:
            processes.note_launch(run.out)
            run.source.write(run.out)
            _write_config(run)
        except BaseException:
            remove_beginnings(run.out)
            processes.forget_launch(run.out)
            if created:
                shutil.rmtree(run.out, ignore_errors=True)
            raise
    except OSError as error:
        raise ValueError(f"out directory {run.out} is not writable ({error}).") from error


def _write_config(run: Run) -> None:
    """The resolved configuration, with what belongs to this directory and this process left out."""
    config = dataclasses.asdict(run.config) | {"out": None, "resume": None}
    for name, names in (("data", ("sotu", "wikitext-103", *TASKS)), ("tokenizer", ("bpe", "paper", None))):
        if config[name] not in names:
            config[name] = os.path.abspath(config[name])  # a run may be continued from another directory
    config["cache"] = None if run.config.cache is None else str(run.config.cache.absolute())
    if run.schedule_steps != run.steps:
        config["schedule_steps"] = run.schedule_steps
    write_config(run.out, config, run.model.config)


def _restore(run: Run, before: TrainConfig) -> None:
    """Continue from the checkpoint. ``before``: the configuration that the run had."""
    processes.from_first(lambda: _take(run))
    with whole_vocabulary(run.model, run.optimizer):
        progress = checkpoint.load(run.out, run.model, run.optimizer)
    processes.from_first(lambda: _check_progress(run, progress))
    run.step = progress.step
    run.changes = _changes(run, before)
    processes.meet()
    processes.from_first(lambda: _begin_again(run))


def _check_progress(run: Run, progress: Progress) -> None:
    if progress.fingerprint != run.source.fingerprint:
        raise ValueError(f"the text, its tokenizer or the task is not the one that {run.out} was begun with.")
    if run.steps < progress.step:
        raise ValueError(
            f"steps must be at least those that {run.out} has done. Got steps={run.steps}, done {progress.step}."
        )
    if run.steps == progress.step and (run.out / "summary.json").exists():
        raise ValueError(f"{run.out} is complete at step {run.steps}. Continue it with --steps above that.")


def _take(run: Run) -> None:
    run.lock = hold(run.out)


def _begin_again(run: Run) -> None:
    processes.note_launch(run.out)
    _write_config(run)
    for name in ("summary.json", "report.png", "diverged.json"):
        (run.out / name).unlink(missing_ok=True)  # of the steps done so far


def _changes(run: Run, before: TrainConfig) -> list[str]:
    """What is trained otherwise from here on."""
    old: dict[str, Any] = {name: getattr(before, name) for name in RETUNABLE}
    new: dict[str, Any] = {name: getattr(run.config, name) for name in RETUNABLE}
    old["schedule_steps"] = before.schedule_steps or _length(before, run.source)
    new["schedule_steps"] = run.schedule_steps
    return [f"{name} from {old[name]} to {new[name]}" for name in RETUNABLE if old[name] != new[name]]
