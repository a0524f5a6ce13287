"""Text and a model small enough to train in a test."""

import json
import random
import shlex
from pathlib import Path

from looped.checkpoint import RECORD, Progress, seal

MODEL = shlex.split("--d-model 32 --n-heads 2 --n-layers 2 --d-ff 64 --n-loops 3 --dropout 0.1")
TRAINING = shlex.split("--vocab-size 300 --seq-len 16 --batch-size 4 --steps 8 --log-every 1 --eval-tokens 256")


def text(words: int = 6000, seed: int = 0) -> str:
    """Lines of words drawn from 150, with a few letters beyond ASCII."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzé", k=draw.randint(1, 8))) for _ in range(150)]
    return "".join(draw.choice(vocabulary) + draw.choice("     \n") for _ in range(words))


def arguments(directory: Path, *options: str) -> list[str]:
    """A command line that trains on ``text`` under ``directory``, all of whose files stay there."""
    data = directory / "text.txt"
    if not data.exists():
        data.write_text(text(), encoding="utf-8")
    paths = ["--data", str(data), "--cache", str(directory / "cache"), "--device", "cpu", "--dtype", "fp32"]
    return [*paths, *MODEL, *TRAINING, *options]


def reseal(checkpoint: Path) -> None:
    """Have a checkpoint whose files were changed be a whole one."""
    record = json.loads((checkpoint / RECORD).read_text())
    seal(checkpoint, Progress(record["step"], record["data"]))
