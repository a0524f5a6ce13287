"""Train a looped language model: ``python train/run.py --fused``. The command line only; the run is in trainer.py."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

# OpenMP's threads wait for each other by spinning, by default for milliseconds. Where another program wants a core too,
# a spinning thread holds the core that the awaited one needs, and a step takes several times as long; with no spinning
# at all, waking the threads takes longer than most operations of a small model. A few tens of microseconds serve both.
# GNU's OpenMP reads this once, when torch loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

if not __package__:  # run by its path: with the packages of its own checkout, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from train import checkpoint
from train.config import RESUMABLE, TrainConfig, comparable, complete, preset_config, read_config, validate
from train.interrupt import Interrupted, Interruptions
from train.trainer import NotFiniteError, prepare, resume_command, train

Options = TypeVar("Options")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's).

    Returns the exit code: 0; 1 if training diverged; 2 after one line on stderr if the input is bad, with nothing
    left behind; 128 + n if signal n stopped it.
    """
    run = None
    with Interruptions().installed() as interruptions:
        try:
            config = parse(sys.argv[1:] if argv is None else list(argv))
            validate(config)
            run = prepare(config)
        except (ValueError, OSError, ImportError) as error:
            return _fail(error, 2)
        except Interrupted as interrupted:
            return _fail(interrupted, 128 + interrupted.signum)
        try:
            return train(run, interruptions)
        except NotFiniteError as error:
            return _fail(error, 1)
        except Interrupted as interrupted:
            if checkpoint.find(run.out) is not None:
                print(f"\nstopped at once. To continue from the checkpoint:\n  {resume_command(run.out)}")
            else:
                print(f"\nstopped at once, before the first checkpoint: {run.out} cannot be continued.")
            return 128 + interrupted.signum
        finally:
            run.close()


def parse(argv: list[str]) -> TrainConfig:
    """The complete configuration that ``argv`` asks for: the preset's, or the resumed run's, with its options.

    Raises ValueError if an option is unknown, has no value of its type, or may not change on resuming.
    """
    asked = command_line([word for word in argv if word not in ("-h", "--help")], TrainConfig())
    if asked.resume is None:
        return complete(command_line(argv, preset_config(asked.preset)))
    stored = read_config(asked.resume)
    length = {"steps": None, "epochs": None}
    config = command_line(argv, dataclasses.replace(stored, **length))  # type: ignore[arg-type]
    for field in dataclasses.fields(TrainConfig):
        before, now = comparable(stored, field.name), comparable(config, field.name)
        if field.name == "out" and now is not None and os.path.abspath(now) == os.path.abspath(asked.resume):
            continue
        if now != before and field.name not in RESUMABLE:
            raise ValueError(
                f"{field.name} cannot change when a run is continued. Got {field.name}={now}; it began with {before}."
            )
    if config.steps is None and config.epochs is None:
        config = dataclasses.replace(config, steps=stored.steps, epochs=stored.epochs)
    return complete(config)


def command_line(argv: list[str], defaults: Options, prog: str = "train/run.py") -> Options:
    """Parse ``argv`` over ``defaults``, a dataclass; tyro's box of several lines becomes a ValueError of one."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(type(defaults), args=argv, default=defaults, prog=prog)
    except SystemExit as exit_:
        if not exit_.code:
            raise  # --help
        lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()]
        message = " ".join(line for line in lines if line)
        raise ValueError(message.partition("For full helptext")[0]) from None


def _fail(error: BaseException, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
