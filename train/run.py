"""Train a looped language model: ``python train/run.py --fused``. The command line only; the run is in trainer.py."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# OpenMP's threads wait for each other by spinning, by default for milliseconds. Where another program wants a core too,
# a spinning thread holds the core that the awaited one needs, and a step takes several times as long; with no spinning
# at all, waking the threads takes longer than most operations of a small model. A few tens of microseconds serve both.
# GNU's OpenMP reads this once, when torch loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

if not __package__:  # run by its path: with the packages of its own checkout, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from looped.command_line import command_line
from looped.kernels.out_of_memory import is_out_of_memory
from train import processes
from train.checkpoint import CheckpointError, find
from train.config import (
    MOVABLE,
    RESUMABLE,
    RETUNABLE,
    TrainConfig,
    comparable,
    complete,
    device_of,
    preset_config,
    read_config,
    validate,
)
from train.interrupt import Interrupted, Interruptions
from train.out_of_memory import out_of_memory, out_of_memory_before_training
from train.output import lasting_output
from train.prepare import Run, prepare
from train.progress import how_to_continue
from train.tasks.task import TASKS
from train.trainer import NotFiniteError, train

PROGRAM = "train/run.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's).

    Returns the exit code: 0; 1 after one line on stderr if training diverged, memory ran out or a file could not be
    written; 2 after one line on stderr if the input is bad, with nothing left behind; 128 + n if signal n stopped it.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with lasting_output(errors_alone=processes.is_later()), Interruptions().installed() as interruptions:
        try:
            processes.join()
            config = processes.from_first(lambda: configured(arguments))
            run = prepare(config)
        except (ValueError, OSError, ImportError) as error:
            return _fail(error, partial(str, error), 2)
        except RuntimeError as error:
            return _fail(error, partial(_why_not_begun, error), 1)
        except Interrupted as interrupted:
            return _fail(interrupted, partial(str, interrupted), 128 + interrupted.signum)
        try:
            return train(run, interruptions)
        except (OSError, CheckpointError, RuntimeError) as error:
            with interruptions.deferred():  # torchrun stops all processes when one has ended
                return _fail(error, partial(_why_stopped, error, run), 1)
        except Interrupted as interrupted:
            print(f"\nstopped at once. {how_to_continue(run.out)}")
            return 128 + interrupted.signum
        finally:
            run.close()


def configured(argv: list[str]) -> TrainConfig:
    """The configuration that ``argv`` asks for, checked. Where torchrun has started the processes again, it is that of
    the run which they had begun, to be continued from its checkpoint, or begun anew if it has none.

    Raises ValueError as `parse` and `validate` do.
    """
    config = parse(argv)
    if config.resume is None and config.out is not None and processes.was_begun_here(config.out):
        if find(config.out) is None:
            processes.discard(config.out)
        else:
            config = parse([*argv, "--resume", str(config.out)])
    validate(config)
    return config


def parse(argv: list[str]) -> TrainConfig:
    """The complete configuration that ``argv`` asks for: the preset's, or the resumed run's, with its options.

    Raises ValueError if an option is unknown, has no value of its type, or may not change on resuming.
    """
    defaults = dataclasses.replace(preset_config("demo"), cuda_graph=False)
    asked = command_line([word for word in argv if word not in ("-h", "--help")], defaults, PROGRAM)
    if asked.resume is None:
        names_preset = any(word.partition("=")[0] == "--preset" for word in argv)
        preset = asked.data if asked.data in TASKS and not names_preset else asked.preset  # a task has one of its own
        return _checked_graph(asked, complete(command_line(argv, preset_config(preset), PROGRAM)))
    stored = read_config(asked.resume)
    anew: dict[str, Any] = {"steps": None, "epochs": None, "cuda_graph": True}
    config = command_line(argv, dataclasses.replace(stored, **anew), PROGRAM)
    for field in dataclasses.fields(TrainConfig):
        before, now = comparable(stored, field.name), comparable(config, field.name)
        if field.name == "out" and now is not None and os.path.abspath(now) == os.path.abspath(asked.resume):
            continue
        if now != before and field.name not in (*RESUMABLE, *RETUNABLE, *MOVABLE):
            raise ValueError(
                f"{field.name} cannot change when a run is continued. Got {field.name}={now}; it began with {before}."
            )
    if config.steps is None and config.epochs is None:
        config = dataclasses.replace(config, steps=stored.steps, epochs=stored.epochs)
    return _checked_graph(asked, complete(config))


def _checked_graph(asked: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Raises ValueError if CUDA graphs were asked for by name where there are none."""
    if asked.cuda_graph and not config.cuda_graph:
        raise ValueError(f"cuda_graph needs a CUDA device. Got --cuda-graph on device={device_of(config)}.")
    return config


def _why_not_begun(error: RuntimeError) -> str:
    """What kept the training from beginning. Raises an error that is none of those that `main` says."""
    return out_of_memory_before_training(error) if is_out_of_memory(error) else _lost(error)


def _why_stopped(error: Exception, run: Run) -> str:
    """What has stopped the training, and how to continue. Raises an error that is none of those that `main` says."""
    if isinstance(error, NotFiniteError):
        return f"{error} {how_to_continue(run.out, '--learning-rate', f'{run.config.learning_rate / 2:g}')}"
    options: list[str] = []
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        why, *options = out_of_memory(error, run.config)
    else:
        why = f"{_lost(error) if isinstance(error, RuntimeError) else error}."
    return f"step {run.step} of {run.steps}: {why} {how_to_continue(run.out, *options)}"


def _lost(error: RuntimeError) -> str:
    """In words that another process is gone. Raises the error if it says something else."""
    reason = processes.why_lost(error)
    if reason is None:
        raise error
    return reason


def _fail(error: BaseException, message: Callable[[], str], code: int) -> int:
    """``message``: called where it is said, for it may read the whole checkpoint."""
    if processes.is_to_be_said(error):
        print(f"error: {' '.join(message().split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    processes.end(main)
