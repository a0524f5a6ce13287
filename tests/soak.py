"""``python tests/soak.py --minutes 60``: the demo, trained for an hour, and whether its memory stays flat.

The trainer is started as a program of its own, with a checkpoint every hundred steps, and stopped by SIGTERM. From its
first step on, its resident memory is read once every few seconds. The first tenth of the time is left out: what is
allocated once is allocated then. Flat means that the median of the last tenth is within 2 % of the median of the tenth
that follows the first one. Needs /proc, so Linux.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "train" / "run.py"
TOLERANCE = 0.02
STEPS_WITHOUT_END = 10_000_000


@dataclass(frozen=True)
class Sample:
    """Resident memory of the process, ``seconds`` after its start: all of it, and what no file stands behind."""

    seconds: float
    resident: int
    anonymous: int


def resident(pid: int) -> tuple[int, int]:
    """VmRSS and RssAnon of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines)
             if name in ("VmRSS", "RssAnon")}  # fmt: skip
    return sizes["VmRSS"], sizes["RssAnon"]


def watched(process: subprocess.Popen[bytes], seconds: float, interval: float) -> Iterator[Sample]:
    """Samples until the time is over. Raises RuntimeError if the process ends before."""
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        time.sleep(min(interval, seconds - elapsed))
        if process.poll() is not None:
            raise RuntimeError(f"the program must go on for {seconds:.0f} s. It ended with {process.returncode}.")
        yield Sample(time.monotonic() - began, *resident(process.pid))


def drift(samples: Sequence[Sample], name: str = "resident") -> float:
    """Median of the last tenth of the time, over that of the second tenth, minus 1."""
    end = samples[-1].seconds
    early = [getattr(each, name) for each in samples if 0.1 * end < each.seconds <= 0.2 * end]
    late = [getattr(each, name) for each in samples if each.seconds > 0.9 * end]
    return statistics.median(late) / statistics.median(early) - 1


def soak(command: Sequence[str], seconds: float, interval: float, begun: Path | None = None) -> list[Sample]:
    """Run ``command`` for so long, from when ``begun`` is there, then stop it with SIGTERM."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while begun is not None and not begun.exists() and process.poll() is None:
                time.sleep(interval)
            return list(watched(process, seconds, interval))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(600)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if memory was flat, else 1. Prints one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--interval", type=float, default=5, help="seconds between two samples (default: 5)")
    parser.add_argument("options", nargs="*", help="of the trainer, after --")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(PROGRAM), "--steps", str(STEPS_WITHOUT_END), "--save-every", "100",
                   "--out", str(out), *asked.options]  # fmt: skip
        samples = soak(command, asked.minutes * 60, asked.interval, out / "metrics.jsonl")
        steps = json.loads((out / "checkpoint" / "checkpoint.json").read_text())["step"]
    highest = max(each.resident for each in samples)
    changes = {name: drift(samples, name) for name in ("resident", "anonymous")}
    print(
        f"{steps} steps in {samples[-1].seconds / 60:.1f} minutes, {len(samples)} samples: resident memory "
        f"{samples[-1].resident / 2**20:.0f} MiB at the end, highest {highest / 2**20:.0f}; "
        f"drift {changes['resident']:+.2%}, without files {changes['anonymous']:+.2%}, allowed {TOLERANCE:.0%}",
        flush=True,
    )
    return 0 if max(changes.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
