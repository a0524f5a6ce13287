"""How much memory and time a text takes until it is tokens on the disk: the first thing that a run does.

    python -m bench.encoding --megabytes 200  # with RAYON_NUM_THREADS=1: by one thread

The text is one .txt file of made words, as often as Zipf's law has them.  Memory is the process's peak, its imports
included, which are said too.
"""

import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from looped.command_line import Parser, count
from train.text.data import load_data

WORDS, LINE = 50_000, 100_000


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_text(path: Path, size: int) -> None:
    """A text of at least `size` bytes, in lines of 10 words."""
    random = np.random.default_rng(0)
    letters = list("etaoinshrdlucmfw")
    words = np.array(["".join(random.choice(letters, random.integers(1, 11))) for _ in range(WORDS)])
    frequency = 1 / np.arange(1, WORDS + 1)
    with open(path, "w", encoding="ascii") as file:
        while file.tell() < size:
            drawn = words[random.choice(WORDS, LINE, p=frequency / frequency.sum())]
            file.write("".join(" ".join(line) + ".\n" for line in drawn.reshape(-1, 10)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--megabytes", type=count, default=200)
    size = parser.parse_args(argv).megabytes * 10**6
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory, "made.txt")
        write_text(text, size)
        before, start = peak_mib(), time.perf_counter()
        data = load_data(str(text), tokenizer="bpe", vocab_size=20_000, seq_len=256, cache=Path(directory, "cache"))
        seconds = time.perf_counter() - start
    print(f"{text.name}: {size / 1e6:.0f} MB, {len(data.train.tokens):,} tokens to train on, {seconds:.1f} s")
    print(f"peak of the process: {peak_mib():.0f} MiB, {before:.0f} before")


if __name__ == "__main__":
    main()
