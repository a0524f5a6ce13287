"""``unshare -rm python tests/disk_trouble.py DIRECTORY``: runs whose disk is full, read-only or gone for a while.

DIRECTORY becomes a small file system of its own, which only this process sees. Prints, as JSON, what each run said and
left.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from tiny_run import arguments  # noqa: E402

from train import picture, trainer  # noqa: E402
from train.checkpoint import step_of  # noqa: E402
from train.metrics import read_metrics  # noqa: E402
from train.run import main  # noqa: E402

NEVER = 99


class Full:
    def __init__(self, disk: Path) -> None:
        self.filler = disk / "filler"

    def begin(self, run: Path) -> None:
        with contextlib.suppress(OSError), open(self.filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def end(self, run: Path) -> None:
        self.filler.unlink()


class ReadOnly:
    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def begin(self, run: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)

    def end(self, run: Path) -> None:
        subprocess.run(["mount", "-o", "remount,rw", self.disk], check=True)


class Gone:
    def __init__(self, disk: Path) -> None:
        self.elsewhere = disk / "elsewhere"

    def begin(self, run: Path) -> None:
        os.rename(run, self.elsewhere)

    def end(self, run: Path) -> None:
        os.rename(self.elsewhere, run)


def run_in_trouble(disk: Path, kind: str, first: int, last: int, options: list[str], at: str = "_step") -> dict:
    """Trouble while ``first`` <= steps done < ``last``, from ``trainer.<at>`` on, at most till the run ends."""
    trouble = {"full": Full, "read-only": ReadOnly, "gone": Gone}[kind](disk)
    run, before, now = disk / f"{kind}-{first}-{last}-{at}-{'-'.join(options)}", getattr(trainer, at), False

    def change(there: bool) -> None:
        nonlocal now
        if there != now:
            (trouble.begin if there else trouble.end)(run)
            now = there

    def wrapped(*arguments: object) -> object:
        change(first <= arguments[0].step < last)
        return before(*arguments)

    setattr(trainer, at, wrapped)
    said = io.StringIO()
    argv = arguments(disk, "--out", str(run), "--save-every", "2", *options)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(argv)
    finally:
        setattr(trainer, at, before)
        change(False)
    rows = [[row["step"], row["loss"]] for row in read_metrics(run / "metrics.jsonl")]
    names = sorted(path.name for path in run.iterdir())
    return {"code": code, "said": said.getvalue(), "rows": rows, "step": step_of(run), "names": names, "run": str(run)}


def trouble_with_cache(disk: Path) -> dict:
    """A disk that is full before the text is in the cache."""
    trouble, said = Full(disk), io.StringIO()
    argv = [*arguments(disk), "--cache", str(disk / "other"), "--out", str(disk / "no")]
    trouble.begin(disk)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    trouble.end(disk)
    left = [str(path.relative_to(disk)) for path in (disk / "other").rglob("*")] if (disk / "other").exists() else []
    return {"code": code, "said": said.getvalue(), "left": left, "out": (disk / "no").exists()}


def program(disk: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    go_on: list[str] = ["--on-save-error", "continue"]
    run: Callable[..., dict] = run_in_trouble
    draw, picture.draw = picture.draw, lambda path, *_: path.touch()  # a picture takes as long as all else
    found = {"untroubled": run(disk, "gone", NEVER, NEVER, [])}
    for kind in ("full", "read-only", "gone"):
        found[f"{kind}, stop"] = run(disk, kind, 4, NEVER, [])
        found[f"{kind}, continue"] = run(disk, kind, 4, 7, go_on)
    found["full, in the background"] = run(disk, "full", 4, 7, [*go_on, "--async-save", "--log-every", "8"])
    found["full at the end"] = run(disk, "full", 4, NEVER, go_on)
    picture.draw = draw
    found["read-only for the report"] = run(disk, "read-only", 8, NEVER, go_on, "_report")
    found["cache"] = trouble_with_cache(disk)
    print(json.dumps(found))


if __name__ == "__main__":
    program(Path(sys.argv[1]))
