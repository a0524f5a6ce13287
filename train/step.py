"""One optimisation step, and evaluation at several K. Only the end of an evaluation waits for the device."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from looped.exit_gate import exit_entropy, mean_exit_loop
from looped.graph import WARM_UP, Launch, eagerly
from looped.kernels.arguments import gathered
from looped.model import LoopedLM, LoopedOutput
from looped.sharding import reshard
from looped.supervision import IGNORE_INDEX, Gated, Supervision
from looped.vocabulary import clip_grad_norm_
from train import processes
from train.config import Schedule
from train.source import Sequences

FINAL_SHARE = 0.1  # of the learning rate, where warmup-cosine ends


class StepResult(NamedTuple):
    """Tensors on the device, detached. loss: scalar, penalty included. per_loop: [K] cross-entropy in nats, nan for
    loops that were not read. grad_norm: scalar, before clipping. bad: scalar, whether loss or gradient norm is not
    finite, so that the step was not taken. Only when measured: state_norm [K], mean over tokens of ||H_k||_2;
    radial_fraction [K], mean over tokens of the immediate gradient's radial share, nan where unread; and, with gated
    supervision, exits [2], means over the targets of the exit loop (1 to K) and of the exit probabilities' entropy.
    """

    loss: Tensor
    per_loop: Tensor
    grad_norm: Tensor
    bad: Tensor
    state_norm: Tensor | None = None
    radial_fraction: Tensor | None = None
    exits: Tensor | None = None


class LoopResult(NamedTuple):
    """What stopping after ``n_loops`` loops gives on the validation split.

    ce: mean cross-entropy in nats; ppl: its exponential; bits_per_byte: None for tokenizers that lose text;
    state_norm: mean ||H_K||_2; tokens_per_second: forward pass of K loops and the readout of the last state, None
    beyond the model's n_loops; accuracy: of a task's answers, shares by name (`train.tasks.task.Task.accuracy`).
    """

    n_loops: int
    ce: float
    ppl: float
    bits_per_byte: float | None
    state_norm: float
    tokens_per_second: float | None
    accuracy: dict[str, float] | None = None


def learning_rate(step: int, *, peak: float, schedule: Schedule, warmup_steps: int, steps: int) -> float:
    """Rate of step ``step`` (from 1): rises linearly to ``peak`` at ``warmup_steps``; then constant, or a half cosine
    that reaches a tenth of it at ``steps``."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """bf16 where autocast allows it, or with ``dtype`` torch.float32 nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    supervision: Supervision | Gated,
    penalty: float | Tensor,
    dtype: torch.dtype,
    n_loops: int | None = None,
    backprop_loops: int | None = None,
    grad_accumulation: int = 1,
    grad_clip: float = 1.0,
    measure: bool = False,
) -> StepResult:
    """One step of the optimiser on inputs and targets [B, T], taken in ``grad_accumulation`` micro-batches.

    model: a `LoopedLM`, or one as looped/sharding.py has it on several devices. inputs and targets are then this
    process's rows, of which every process has as many, and everything returned is of all of them together.
    n_loops, backprop_loops: those of `LoopedLM.forward`; all micro-batches have the same.

    The micro-batches may differ in rows and in ignored targets. Each loss is a sum over the whole batch's targets, and
    each penalty has the share of its rows, so that the sums are the batch's loss and gradient.

    A step whose loss or gradient norm is not finite leaves weights, moments and step counts as they were, without the
    host knowing. For that the optimiser must be a fused one; raises ValueError for another.
    """
    if not optimizer.defaults.get("fused"):
        raise ValueError(f"optimizer must be fused, so that it can leave out a step. Got {type(optimizer).__name__}.")
    optimizer.zero_grad(set_to_none=True)
    n_targets = _n_targets(targets, grad_accumulation)
    parts: list[list[Tensor]] = []
    micro_batches = list(zip(inputs.chunk(grad_accumulation), targets.chunk(grad_accumulation), strict=True))
    for number, (part_inputs, part_targets) in enumerate(micro_batches, start=1):
        share = len(part_inputs) / len(inputs)
        with _unaveraged(model) if number < len(micro_batches) else nullcontext():
            with autocast(inputs.device, dtype):
                output = model(
                    part_inputs,
                    part_targets,
                    supervision=supervision,
                    penalty=share * penalty,
                    n_loops=n_loops,
                    backprop_loops=backprop_loops,
                    statistics=measure,
                    n_targets=n_targets,
                )
            output.loss.backward()
        measured = _measured(output, share, part_targets, n_targets) if measure else []
        parts.append([output.loss.detach(), output.per_loop, *measured])
    reshard(model)
    sums = [torch.stack(values).sum(0) for values in zip(*parts, strict=True)]
    loss, per_loop, *measured = _mean_over_processes(sums)
    decoder: Any = model.module if isinstance(model, DistributedDataParallel) else model
    grad_norm = gathered(clip_grad_norm_(decoder, grad_clip))
    bad = ~(loss.isfinite() & grad_norm.isfinite())
    _step_unless(bad, optimizer)
    return StepResult(loss, per_loop, grad_norm, bad, *measured)


def _measured(output: LoopedOutput, share: float, targets: Tensor, n_targets: Tensor | None) -> list[Tensor]:
    """A micro-batch's part in state_norm, radial_fraction and, with gated supervision, exits of `StepResult`."""
    assert output.statistics is not None  # they were asked for
    assert output.statistics.radial_fraction is not None
    radial_fraction = output.statistics.radial_fraction.flatten(1).mean(1)
    n_untrained = len(output.states) - len(radial_fraction)  # loops without gradient
    radial_fraction = F.pad(radial_fraction, (n_untrained, 0), value=math.nan)
    measured = [share * state_norms(output.states), share * radial_fraction]
    return measured if output.log_exits is None else [*measured, exit_means(output.log_exits, targets, n_targets)]


def _n_targets(targets: Tensor, grad_accumulation: int) -> Tensor | None:
    """What a micro-batch's sum over its targets is divided by; None where the loss itself counts its targets.

    With several processes it is the number of targets of all of them, divided by the number of processes. Gradients
    (looped/sharding.py) and losses (`_mean_over_processes`) are averaged over the processes afterwards. That average
    is then the sum over all targets, divided by their number.
    """
    n_processes = processes.world_size()
    if grad_accumulation == n_processes == 1:
        return None
    n = processes.total((targets != IGNORE_INDEX).sum()).clamp(min=1)
    return n if n_processes == 1 else n / n_processes


def _unaveraged(model: nn.Module) -> AbstractContextManager[None]:
    """For all micro-batches but the last: replicas add up their gradients, and average them with the last one alone.

    Where the weights are shared out, gradients are averaged in every backward pass.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _mean_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """The means over the processes, in one exchange."""
    if processes.world_size() == 1:
        return tensors
    sums = processes.total(torch.cat([tensor.float().flatten() for tensor in tensors]))
    parts = (sums / processes.world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimiser's step where ``bad``, a tensor on the device, is false: as torch.amp.GradScaler does it."""
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


@torch.no_grad()
def state_norms(states: tuple[Tensor, ...]) -> Tensor:
    """[K] fp32: mean over tokens of ||H_k||_2."""
    return torch.stack([torch.linalg.vector_norm(state.float(), dim=-1).mean() for state in states])


def exit_means(log_p: Tensor, targets: Tensor, n_targets: Tensor | None) -> Tensor:
    """[2] of log p [K, B, T]: the mean exit loop and the exit entropy in nats, summed over the targets that count and
    divided by n_targets, or by their number."""
    counted = targets != IGNORE_INDEX
    n = counted.sum().clamp(min=1) if n_targets is None else n_targets
    return torch.where(counted, torch.stack([mean_exit_loop(log_p), exit_entropy(log_p)]), 0.0).sum((1, 2)) / n


@torch.no_grad()
def evaluate(
    model: LoopedLM,
    windows: Sequences,
    indices: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    bytes_per_token: np.ndarray | None,
    depths: Sequence[int] | None = None,
    launch: Launch = eagerly,
) -> list[LoopResult]:
    """Evaluate the windows ``indices`` at every K of ``depths``, rising; one pass gives the losses of all K.

    Default: K = 1..n_loops. The speed is measured at these alone.

    What a window is filled up with counts nowhere.

    Of several processes each evaluates its share of the windows, and the speed is that of all of them together.

    ``bytes_per_token``: [V], or None if bits per byte are not defined. Bits per byte charge the end-of-document
    tokens, which stand for no bytes, to the text: all bits over all bytes.
    """
    model.eval()
    depths = tuple(range(1, model.config.n_loops + 1) if depths is None else depths)
    losses = torch.zeros(len(depths), dtype=torch.float64, device=device)
    norms = torch.zeros(len(depths), dtype=torch.float64, device=device)
    n_tokens = n_bytes = 0
    groups = processes.own_batches(indices, batch_size)
    for group in tqdm(groups, desc="evaluating", unit="batch", disable=None, leave=False):
        inputs, targets = windows.gather(group if len(group) else indices[:1])
        if len(group) == 0:  # every process calls the model as often as the others
            targets = torch.full_like(targets, IGNORE_INDEX)
        counted = targets[targets != IGNORE_INDEX]
        n_tokens += len(counted)
        n_bytes += 0 if bytes_per_token is None else int(bytes_per_token[counted.numpy()].sum())
        batch_losses, batch_norms = launch(
            _evaluate_batch, model, depths, dtype, to_device(inputs, device), to_device(targets, device)
        )
        losses += batch_losses
        norms += batch_norms
    first = groups[0] if len(groups[0]) else indices[:1]
    rates = throughput(model, to_device(windows.gather(first)[0], device), dtype=dtype, launch=launch)
    rate_at = dict(enumerate(processes.total(torch.tensor(rates, dtype=torch.float64)).tolist(), start=1))
    n_tokens, n_bytes = processes.total(torch.tensor([n_tokens, n_bytes])).tolist()
    losses, norms = processes.total(losses), processes.total(norms)
    results = []
    for n_loops, total, norm in zip(depths, losses.tolist(), norms.tolist(), strict=True):
        ce = total / n_tokens
        bits = total / math.log(2) / n_bytes if n_bytes else None
        results.append(LoopResult(n_loops, ce, _exp(ce), bits, norm / n_tokens, rate_at.get(n_loops)))
    return results


def _evaluate_batch(
    model: LoopedLM, depths: tuple[int, ...], dtype: torch.dtype, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """[depths] float64 each: sums over the tokens of their losses and of ||H_K||_2."""
    with autocast(inputs.device, dtype):
        states = model(inputs, n_loops=depths[-1]).states
        states = tuple(states[n_loops - 1] for n_loops in depths)
        losses = model.evaluation_losses(states, targets).flatten(1).double().sum(1)
    ignored = targets == IGNORE_INDEX
    norms = [torch.linalg.vector_norm(state.float(), dim=-1).double().masked_fill(ignored, 0).sum() for state in states]
    return losses, torch.stack(norms)


@torch.no_grad()
def throughput(model: LoopedLM, inputs: Tensor, *, dtype: torch.dtype, launch: Launch) -> list[float]:
    """Tokens per second of `prefill` at K = 1..n_loops: the median of five rounds, after one that warms up, or as many
    as it takes to replay a graph."""
    calls = [partial(launch, prefill, model, n_loops, dtype, inputs) for n_loops in range(1, model.config.n_loops + 1)]
    warm_up = 1 if launch is eagerly else WARM_UP + 1
    seconds = seconds_in_turn(calls, inputs.device, rounds=5, warm_up=warm_up)
    return [inputs.numel() / median(times) for times in seconds]


def prefill(model: LoopedLM, n_loops: int, dtype: torch.dtype, inputs: Tensor) -> None:
    """The forward pass of K = n_loops loops and the logits of the last state, [B, T, V]."""
    with autocast(inputs.device, dtype):
        model(inputs, n_loops=n_loops, logits=True)


def seconds_in_turn(
    calls: Sequence[Callable[[], object]], device: torch.device, *, rounds: int, warm_up: int = 1
) -> list[list[float]]:
    """The times of each call in ``rounds`` rounds, after ``warm_up`` that do not count.

    In a round the calls take turns, so that a machine that is busy for a while is so for all of them.
    """
    times = [[seconds_of(call, device) for call in calls] for _ in range(warm_up + rounds)]
    return [list(of_call) for of_call in zip(*times[warm_up:], strict=True)]


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, until the device has done its work."""
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting: a copy from memory that is not pinned would wait for everything queued on the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
