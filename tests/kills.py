"""``python tests/kills.py --kills 100``: kill a run again and again, and see what is left of it.

A run that saves every few steps is killed with SIGKILL at a random moment, or with --within-saving at one of the calls
by which a checkpoint comes to the disk. What is left must be a whole checkpoint, or none before the first was written;
at most the steps of one interval are lost; and the run, continued, ends with the losses and the weights of one that was
never killed, to the bit. --processes N: a run of N processes, one of which is killed, and the others a moment later.

Every run is a fork of this process, which has PyTorch loaded.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from forked_runs import PATIENCE, ended, finish, kill, rows_of, start, weights_of  # noqa: E402
from tiny_run import arguments  # noqa: E402

from looped.checkpoint import find  # noqa: E402
from train.checkpoint import step_of  # noqa: E402
from train.metrics import read_metrics  # noqa: E402

STEPS, SAVE_EVERY = 20, 3


def dying_at(call: int) -> Callable[[int], None]:
    """Have the first process kill itself at the ``call``-th of the calls that bring a checkpoint to the disk."""

    def before(rank: int) -> None:
        calls, saving = iter(range(call + 1)), False  # before the first save Python removes files of its own

        def dying(function: Callable) -> Callable:
            def wrapped(*args, **kwargs):
                nonlocal saving
                saving = saving or "checkpoint" in f"{args}"
                if saving and next(calls, None) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        if rank == 0:
            for module, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree"), (safetensors.torch, "save_file")):
                setattr(module, name, dying(getattr(module, name)))

    return before


def wait_for(path: Path) -> None:
    limit = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < limit:
        time.sleep(0.002)
    assert path.exists(), f"{path} does not come"


class Campaign:
    def __init__(self, directory: Path, processes: int, options: list[str]) -> None:
        self.directory, self.processes = directory, processes
        self.bound = 2 * SAVE_EVERY if "--async-save" in options else SAVE_EVERY  # one may be on its way to the disk
        plain = arguments(directory, "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--eval-tokens", "64")
        self.argv = [*plain, *options]
        self.whole = directory / "whole"
        log = directory / "first.log"  # of a run that fills the cache
        finish(start([*plain, "--out", str(directory / "first"), "--steps", "1"], 1, log), log)
        log = directory / "whole.log"
        children = start([*self.argv, "--out", str(self.whole)], processes, log)
        finish(children, log)
        self.seconds = json.loads((self.whole / "summary.json").read_text())["train_seconds"]

    def killed(self, name: str, draw: random.Random, within_saving: bool) -> dict[str, int]:
        """Kill a run once and look at it. Raises AssertionError if anything but steps is lost."""
        run, log = self.directory / name, self.directory / f"{name}.log"
        argv = [*self.argv, "--out", str(run)]
        if within_saving:
            # The first save makes twelve such calls and each of the six others fourteen, which are alike.
            children = start(argv, self.processes, log, dying_at(draw.randrange(60)))
            try:
                ended(children[:1], log.read_text)
            finally:
                kill(children[1:])
        else:
            children = start(argv, self.processes, log)
            wait_for(run / "metrics.jsonl")
            time.sleep(draw.uniform(0, self.seconds))
            victim = draw.choice(children)
            kill([victim])
            time.sleep(draw.choice([0, 0.05, 0.3]) if self.processes > 1 else 0)
            kill([child for child in children if child != victim])
        rows = read_metrics(run / "metrics.jsonl")
        done, step = rows[-1]["step"] if rows else 0, step_of(run)
        while_saving = (run / "checkpoint.new").exists() or (run / "checkpoint.old").exists()
        found = {
            "while saving": while_saving,
            "between two names": not (run / "checkpoint").exists() and step is not None,
        }
        if step is None:
            assert find(run) is None, f"{run}: the checkpoint is torn"
            assert done <= self.bound, f"{run}: no checkpoint after {done} steps"
            return found | {"before the first checkpoint": 1, "steps lost": done}
        assert done - step <= self.bound, f"{run}: the checkpoint is of step {step}, and {done} were done"
        if not (run / "summary.json").exists():
            finish(start(["--resume", str(run)], self.processes, log), log)
        assert rows_of(run) == rows_of(self.whole), f"{run}: other losses"
        weights, expected = weights_of(run), weights_of(self.whole)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights), f"{run}: other weights"
        shutil.rmtree(run)
        return found | {"continued": 1, "after the end": step == STEPS, "steps lost": done - step}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/kills.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--within-saving", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    started, draw = time.monotonic(), random.Random(options.seed)
    total: Counter[str] = Counter()
    most_lost = 0
    with tempfile.TemporaryDirectory() as directory:
        campaign = Campaign(Path(directory), options.processes, rest)
        for number in range(options.kills):
            found = campaign.killed(f"{number}", draw, options.within_saving)
            most_lost = max(most_lost, found.pop("steps lost"))
            total.update({name: int(value) for name, value in found.items()})
    figures = {
        "kills": options.kills,
        **total,
        "steps between two checkpoints": SAVE_EVERY,
        "most steps lost": most_lost,
    }
    print(json.dumps(figures | {"seconds": round(time.monotonic() - started)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
