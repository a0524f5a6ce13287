"""A diagnosis: everything that is measured of a model, and the verdict. Of any LoopedModel, or of a saved run."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looped.config import at_least
from looped.diagnose.depth import measure_depth
from looped.diagnose.dynamics import measure_dynamics
from looped.diagnose.halting import check_windows, measure_halting
from looped.diagnose.interventions import clamp_radially, scale_response, sweep_alpha
from looped.diagnose.model import Batch, LoopedModel, from_decoder, in_float64
from looped.diagnose.origin import origin
from looped.diagnose.radial import measure_radial
from looped.diagnose.verdict import Measurements, Verdict, judge
from looped.model import LoopedLM
from looped.recurrence import first_with_gradient
from looped.run_directory import SavedRun, Validation
from looped.supervision import Supervision, supervision_weights

DEPTH_FACTOR = 4  # depth is measured up to this times the trained loops
LEAST_DEPTH = 16  # and at least up to this
BATCH_TOKENS = 1024  # tokens of a batch of `validation_batches`; it bounds the logits, the largest tensor


@dataclass(frozen=True)
class Diagnosis:
    """name: what figures and tables call the model. n_tokens: the targets that were measured on.

    origin: where the numbers come from, as facts by name.
    """

    name: str
    n_tokens: int
    measured: Measurements
    verdict: Verdict
    origin: dict[str, str]


class DivergedError(ValueError):
    """The model has no finite loss."""


def _diverged(name: str, n_loops: int, ce: float) -> DivergedError:
    """ce: its cross-entropy after n_loops loops."""
    return DivergedError(f"{name} has diverged: its cross-entropy at K = {n_loops} is {ce}.")


def diagnose(
    model: LoopedModel,
    batches: Sequence[Batch],
    *,
    name: str = "model",
    horizon: int = 30,
    bytes_per_token: Tensor | None = None,
    run: SavedRun | None = None,
    rounds: int = 0,
) -> Diagnosis:
    """Measure a model and judge it.

    batches: inputs and targets, int64 [B, T] each, on the model's device. Every target counts.
    name: what figures and tables call the model.
    horizon: the loops over which norms and updates are followed.
    bytes_per_token: [V] int64, for bits per byte.
    run: the saved run that the model is from, for the record.
    rounds: how often the speed of halting is timed; 0 leaves it out, as where other work shares the machine.

    Raises ValueError before anything is computed: without batches, for a single window, for inputs and targets of
    different shapes, for negative targets, for a horizon that does not go beyond the trained loops, and for rounds
    below 0. Raises DivergedError, which is a ValueError, for a model without a finite loss.
    """
    _check(model, batches, horizon)
    at_least(0, rounds=rounds)
    depth = measure_depth(model, batches, max(DEPTH_FACTOR * model.n_loops, LEAST_DEPTH), bytes_per_token)
    for n_loops, ce in reversed([*enumerate(depth.as_trained, 1), *enumerate(depth.ce[: model.n_loops], 1)]):
        if not math.isfinite(ce):
            raise _diverged(name, n_loops, ce)
    norms, updates = measure_dynamics(model, batches, horizon)
    measured = Measurements(
        n_loops=model.n_loops,
        weights=model.loss_weights,
        penalty=model.penalty,
        norms=norms,
        updates=updates,
        radial=measure_radial(model, batches, in_float64(model)),
        clamp=clamp_radially(model, batches),
        alpha=sweep_alpha(model, batches),
        response=scale_response(model, batches),
        depth=depth,
        halting=measure_halting(model, batches, rounds=rounds),
    )
    n_tokens = sum(targets.numel() for _, targets in batches)
    return Diagnosis(name, n_tokens, measured, judge(measured), origin(batches[0][0].device, run))


def _check(model: LoopedModel, batches: Sequence[Batch], horizon: int) -> None:
    if not batches or any(tokens.numel() == 0 for tokens, _ in batches):
        raise ValueError("batches must hold at least one batch, and no empty one.")
    for tokens, targets in batches:
        if tokens.shape != targets.shape or tokens.dim() != 2:
            raise ValueError(
                "inputs and targets of a batch must have one shape [B, T]. "
                f"Got inputs {list(tokens.shape)}, targets {list(targets.shape)}."
            )
        if int(targets.min()) < 0:
            raise ValueError(f"targets must not be negative: no target is ignored. Got {int(targets.min())}.")
    check_windows(batches)
    if horizon <= model.n_loops:
        raise ValueError(f"horizon must be above the n_loops={model.n_loops} that were trained. Got horizon={horizon}.")


@torch.no_grad()
def check_run(run: SavedRun, *, name: str | None = None, n_tokens: int = 8192, horizon: int = 30) -> None:
    """Raise what `diagnose_run` would raise, at the cost of one window.

    Raises ValueError for a bad argument, and DivergedError for a run without a finite loss on that window.
    """
    model = from_decoder(run.model)
    batches = validation_batches(run.validation, seq_len=run.model.config.max_seq_len, n_tokens=n_tokens)
    _check(model, batches, horizon)
    tokens, targets = (rows[:1] for rows in batches[0])
    loss = model.cross_entropy(model.states(tokens, model.n_loops)[-1], targets, final=True)
    if not loss.isfinite().all():
        raise _diverged(run.name if name is None else name, model.n_loops, loss.mean().item())


def diagnose_run(
    run: SavedRun,
    *,
    name: str | None = None,
    n_tokens: int = 8192,
    horizon: int = 30,
    device: str = "cpu",
    rounds: int = 0,
) -> Diagnosis:
    """Diagnose a saved run on at most `n_tokens` tokens of its validation split. device: as PyTorch names it.

    rounds: as `diagnose` takes it. Raises ValueError as `diagnose` and `validation_batches` do.
    """
    decoder, training = copy.deepcopy(run.model).to(device), run.config["train"]
    windows = validation_batches(run.validation, seq_len=decoder.config.max_seq_len, n_tokens=n_tokens)
    batches = [(tokens.to(device), targets.to(device)) for tokens, targets in windows]
    model = as_trained(decoder, batches, training["supervision"], training["penalty"], training["backprop_loops"])
    return diagnose(
        model,
        batches,
        name=run.name if name is None else name,
        horizon=horizon,
        bytes_per_token=run.validation.bytes_per_token,
        run=run,
        rounds=rounds,
    )


@torch.no_grad()
def as_trained(
    decoder: LoopedLM, batches: Sequence[Batch], supervision: Supervision, penalty: float, backprop_loops: int | None
) -> LoopedModel:
    """A decoder with what is known of its training loss. The weights of gated supervision are means over the tokens.

    The loops before the last `backprop_loops` (None: all) had no gradient and are not read.
    """
    n_loops = decoder.config.n_loops
    first = first_with_gradient(n_loops, backprop_loops)
    if supervision == "gated":
        exits = [decoder.exit_probabilities(decoder(tokens).states[first:]).flatten(1) for tokens, _ in batches]
        weights = torch.cat(exits, 1).mean(1).tolist()
    else:
        weights = supervision_weights(supervision, n_loops - first)
    of_all = (*[0.0] * first, *weights)
    return from_decoder(decoder, weights=of_all, penalty=penalty, backprop_loops=backprop_loops)


def validation_batches(validation: Validation, *, seq_len: int, n_tokens: int) -> list[Batch]:
    """Windows of `seq_len` tokens, evenly spread over the validation split without overlap.

    There are `n_tokens // seq_len` of them, or as many as the split has. Raises ValueError if those are fewer than two
    (halting is calibrated on half of them and reported on the rest), and for the sequences of a task.
    """
    if validation.targets is not None:
        raise ValueError("a diagnosis needs text, where every token has a target. Got the sequences of a task.")
    available = (len(validation.tokens) - 1) // seq_len
    count = min(available, n_tokens // seq_len)
    if count < 2:
        raise ValueError(
            f"tokens must be at least two windows of seq_len={seq_len}, and the validation split one token more. "
            f"Got tokens={n_tokens}, validation {len(validation.tokens)}."
        )
    starts = torch.arange(count) * available // count * seq_len
    rows = validation.tokens[starts[:, None] + torch.arange(seq_len + 1)]
    return [(batch[:, :-1], batch[:, 1:]) for batch in rows.split(max(1, BATCH_TOKENS // seq_len))]
