"""``python -m train.gate RUN``: give a trained run an exit gate, or train the one that it has, and nothing else.

The second stage of Ouro (arXiv 2510.25741): the model is frozen, and its gate learns from what every loop gains for
every token (`looped.exit_gate.continuation_loss`). The result is a copy of the run, with the same weights to the bit
and the gate beside them; gate.json says how it was trained and what it does on the validation split.
"""

import argparse
import dataclasses
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from looped.checkpoint import KINDS, WEIGHTS, check_whole, files_of, found, seal
from looped.command_line import Parser
from looped.config import at_least
from looped.exit_gate import continuation_loss, exit_entropy, log_exit_probabilities, mean_exit_loop
from looped.model import LoopedLM
from looped.run_directory import TOKENIZER, VALIDATION, SavedRun, load_run, write_config
from looped.supervision import IGNORE_INDEX
from train.config import TrainConfig, check_out_directory, device_of, read_config
from train.interrupt import Interrupted, Interruptions
from train.metrics import write_json
from train.output import lasting_output
from train.prepare import load_source
from train.source import Source
from train.step import autocast, to_device
from train.tasks.task import TASKS
from train.trainer import NotFiniteError


@dataclass(frozen=True)
class GateResult:
    """What a gate does on the validation split.

    loss: of `continuation_loss`. exit_probability, ce: [K] means over the tokens, ce in nats if all stop at that loop.
    exit_loop: 1 to K, and entropy, in nats: means. exit_ce: nats where every token stops with its probabilities.
    """

    loss: float
    exit_probability: list[float]
    ce: list[float]
    exit_loop: float
    entropy: float
    exit_ce: float


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if the gate diverged; 2 if the input is bad; 128 + n if signal n stopped it. One line
    on stderr says why, and nothing is left behind."""
    options = _parser().parse_args(argv)
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    with lasting_output(), Interruptions().installed():
        try:
            return _run(options)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except NotFiniteError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except Interrupted as interrupted:
            print(f"{interrupted}: stopped, and nothing was written.", file=sys.stderr)
            return 128 + interrupted.signum


def _run(options: argparse.Namespace) -> int:
    out = options.out or Path(os.path.abspath(options.run) + "-gate")
    _check(options, out)
    saved = load_run(options.run)
    config = dataclasses.replace(read_config(options.run), device=options.device)
    config = dataclasses.replace(config, data=options.data or config.data)
    if (config.data in TASKS) != (config.tokenizer is None):
        raise ValueError(f"data must be of the kind that {options.run} was trained on. Got data={config.data!r}.")
    model = gated_copy(saved.model, fused=config.fused).to(device_of(config))
    source = load_source(config)
    if source.fingerprint != check_whole(found(options.run), KINDS).fingerprint:
        raise ValueError(f"the text or the tokenizer is not the one that {options.run} was trained on.")
    batch_size = options.batch_size or config.batch_size
    before = measure(model, source, config)
    print(f"gate      of {options.run}, {model.config.d_model + 1:,} of {model.parameter_count():,} parameters")
    print(f"before    {_line(before)}")
    train_gate(model, source, config, options, batch_size, first=saved.step)
    after = measure(model, source, config)
    print(f"after     {_line(after)}\n{_table(after)}")
    record = {
        "run": saved.name,
        "weights": saved.weights_hash,
        "steps": options.steps,
        "batch_size": batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
    }
    _write(out, saved, model, record)
    print(f"files     {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def gated_copy(model: LoopedLM, *, fused: bool) -> LoopedLM:
    """The model with a gate, its own or a new one, in evaluation mode; the gate alone has gradients.

    Raises ValueError for a model of one loop, at which there is nothing to decide.
    """
    if model.config.n_loops < 2:
        raise ValueError(f"a gate needs a model with n_loops of at least 2. Got n_loops={model.config.n_loops}.")
    copy = LoopedLM(dataclasses.replace(model.config, exit_gate=True), fused=fused)
    copy.load_state_dict(copy.state_dict() | model.state_dict())
    copy.eval().requires_grad_(False)
    assert copy.exit_gate is not None  # the configuration has one
    copy.exit_gate.requires_grad_(True)
    return copy


def train_gate(
    model: LoopedLM, source: Source, config: TrainConfig, options: argparse.Namespace, batch_size: int, *, first: int
) -> None:
    """Take the steps, on the batches from step ``first`` on, where a task's curriculum goes on.

    Raises NotFiniteError if the gate is no number after them.
    """
    assert model.exit_gate is not None
    optimizer = torch.optim.AdamW(model.exit_gate.parameters(), lr=options.learning_rate, weight_decay=0.0)
    for step in tqdm(range(first, first + options.steps), desc="training", unit="step", disable=None, leave=False):
        loss, _, _ = _forward(model, *source.batch(step, seed=options.seed, batch_size=batch_size), config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if not all(bool(weight.isfinite().all()) for weight in model.exit_gate.parameters()):
        raise NotFiniteError(f"the gate is not finite after {options.steps} steps. Lower --learning-rate.")


def _forward(model: LoopedLM, inputs: Tensor, targets: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The gate's loss, differentiable in the gate alone; log p and the losses of the tokens that count, [K, n]."""
    device = device_of(config)
    inputs, targets = to_device(inputs, device), to_device(targets, device)
    with torch.no_grad(), autocast(device, torch.bfloat16 if config.dtype == "bf16" else torch.float32):
        states = model(inputs).states
        losses = model.evaluation_losses(states, targets)
    logits, counted = model.exit_logits(states), targets != IGNORE_INDEX
    log_p = log_exit_probabilities(logits.detach())
    return continuation_loss(logits, losses, counted), log_p[:, counted], losses[:, counted]


@torch.no_grad()
def measure(model: LoopedLM, source: Source, config: TrainConfig) -> GateResult:
    sequences, indices = source.validation(config.eval_tokens)
    n_tokens, sums = 0, torch.zeros(2 * model.config.n_loops + 4, dtype=torch.float64)
    for start in range(0, len(indices), config.batch_size):
        loss, log_p, losses = _forward(model, *sequences.gather(indices[start : start + config.batch_size]), config)
        p = log_p.exp()
        of_token = [mean_exit_loop(log_p), exit_entropy(log_p), (p * losses).sum(0), loss.expand(p.shape[1])]
        sums += torch.cat([p, losses, torch.stack(of_token)]).double().sum(1).cpu()
        n_tokens += p.shape[1]
    means = (sums / n_tokens).tolist()
    n_loops = model.config.n_loops
    exit_loop, entropy, exit_ce, loss_ = means[2 * n_loops :]
    return GateResult(loss_, means[:n_loops], means[n_loops : 2 * n_loops], exit_loop, entropy, exit_ce)


def _line(result: GateResult) -> str:
    return (
        f"loss {result.loss:.4f}, exits after {result.exit_loop:.2f} of {len(result.ce)} loops on average "
        f"(entropy {result.entropy:.3f} nats), CE there {result.exit_ce:.4f}"
    )


def _table(result: GateResult) -> str:
    lines = [f"{'loop':>6} {'exits':>8} {'CE':>9}"]
    for loop, (p, ce) in enumerate(zip(result.exit_probability, result.ce, strict=True), start=1):
        lines.append(f"{loop:>6} {p:>8.1%} {ce:>9.4f}")
    return "\n".join(lines)


def _write(out: Path, saved: SavedRun, model: LoopedLM, record: dict[str, Any]) -> None:
    """The copy of the run, whole or not at all. Training can be continued in it as in the run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        whole = Path(scratch) / "run"
        whole.mkdir()
        for name in (TOKENIZER, VALIDATION, "metrics.jsonl"):
            if (saved.directory / name).exists():
                shutil.copyfile(saved.directory / name, whole / name)
        shutil.copytree(found(saved.directory), whole / "checkpoint")
        progress = check_whole(whole / "checkpoint", KINDS)
        weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        for name in files_of(whole / "checkpoint", "model"):
            (whole / "checkpoint" / name).unlink()
        (whole / "checkpoint" / WEIGHTS).write_bytes(safetensors.torch.save(weights))
        seal(whole / "checkpoint", progress)
        write_config(whole, saved.config["train"] | {"exit_gate": True}, model.config)
        write_json(whole / "gate.json", record)
        os.rename(whole, out)


def _check(options: argparse.Namespace, out: Path) -> None:
    at_least(1, steps=options.steps, batch_size=options.batch_size)
    if not 0 < options.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be finite and above 0. Got learning_rate={options.learning_rate}.")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63). Got seed={options.seed}.")
    check_out_directory(out)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m train.gate", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run that training wrote")
    parser.add_argument("--out", type=Path, help="directory of the copy with the gate (default: RUN-gate)")
    parser.add_argument("--data", help="where the run's text is, if it has moved")
    parser.add_argument("--steps", type=int, default=200, help="optimisation steps (default: 200)")
    parser.add_argument("--batch-size", type=int, help="sequences of a step (default: the run's)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="AdamW's (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the windows (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
