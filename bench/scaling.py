"""Time and memory of the readout against K, N and V, and of the training step against K and N: fused and plain.

    python -m bench.scaling [--out bench/results] [--rounds 3]

Writes `<date>-<device>-scaling.jsonl`, a line a curve, and `.png`.  The two implementations take turns at every point;
a point is the median of the rounds after one that warms up.  The record has a least-squares line for every curve of
times, and `worst_deviation`, the largest distance of a point from it, as a share of the point: how far from linear a
curve is.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory count uses PyTorch's profiler, which would chat
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from bench.competitors.decoders import stepping
from bench.competitors.readouts import IMPLEMENTATIONS, inputs_of, make_round
from bench.measure.memory import peak_memory
from bench.measure.place import RESULTS, environment, path_in
from bench.measure.records import write_lines
from bench.measure.study import save, style
from bench.measure.timing import Prepare, seconds_of
from bench.shapes import SCALING_READOUT, SCALING_STEP, Case, DecoderShape, ReadoutShape
from looped.command_line import Parser, count
from looped.config import PRESETS
from looped.run_directory import check_writable

VARIANTS = ("fused", "plain")
LOOPS = tuple(range(1, 9))
SMOKE_LOOPS = (1, 2, 3)


@dataclass(frozen=True)
class Sweep:
    """What varies (`x`, over `values`), and the call of a variant at a value."""

    title: str
    x: str
    values: tuple[int, ...]
    prepare: Callable[[str, int], Prepare]


@dataclass
class Curve:
    """Median seconds and peak temporary bytes of one variant at every value, and the line through the times."""

    sweep: str
    x: str
    variant: str
    values: list[int]
    seconds: list[float]
    peak_bytes: list[int]
    slope: float = 0.0
    intercept: float = 0.0
    worst_deviation: float = 0.0

    def fit(self) -> None:
        self.slope, self.intercept = (float(c) for c in np.polyfit(self.values, self.seconds, 1))
        line = self.slope * np.array(self.values) + self.intercept
        self.worst_deviation = float(np.max(np.abs(line / np.array(self.seconds) - 1)))


def readout_sweeps(base: Case[ReadoutShape], loops: tuple[int, ...]) -> list[Sweep]:
    """Over K; over N and V at quarters, halves and multiples of the base."""
    shape, letters = base.shape, {"n_loops": "K", "n_tokens": "N", "vocabulary": "V"}

    def over(size: str) -> Sweep:
        def prepare(variant: str, value: int) -> Prepare:
            inputs = inputs_of(shape._replace(**{size: value}), base.dtype)
            return make_round(IMPLEMENTATIONS[variant].fresh(), inputs)

        fixed = ", ".join(f"{letter} = {getattr(shape, name)}" for name, letter in letters.items() if name != size)
        values = loops if size == "n_loops" else tuple(int(getattr(shape, size) * x) for x in (0.25, 0.5, 1, 1.5, 2))
        return Sweep(f"readout, d = {shape.d}\n{fixed}", letters[size], values, prepare)

    return [over(size) for size in letters]


def step_sweeps(base: Case[DecoderShape], loops: tuple[int, ...]) -> list[Sweep]:
    """Over K, and over N = batch x sequence length."""
    shape = base.shape

    def of_loops(variant: str, value: int) -> Prepare:
        return stepping(base._replace(shape=shape._replace(n_loops=value)), variant, "per-loop")

    def of_tokens(variant: str, value: int) -> Prepare:
        return stepping(base._replace(shape=shape._replace(batch=value // shape.seq_len)), variant, "per-loop")

    title = f"step of {shape.preset}, d = {PRESETS[shape.preset].d_model}"
    tokens = tuple(shape.seq_len * batch for batch in (1, 2, 3, 4))
    return [
        Sweep(f"{title}\nN = {shape.n_tokens}", "K", loops, of_loops),
        Sweep(f"{title}\nK = {shape.n_loops}", "N", tokens, of_tokens),
    ]


def measure(sweep: Sweep, rounds: int) -> list[Curve]:
    """A curve of every variant; at each value they take turns."""
    curves = [Curve(sweep.title, sweep.x, variant, list(sweep.values), [], []) for variant in VARIANTS]
    for value in tqdm(sweep.values, desc=f"{' '.join(sweep.title.split())}, {sweep.x}", disable=None):
        prepared = [sweep.prepare(variant, value) for variant in VARIANTS]
        for curve, prepare in zip(curves, prepared, strict=True):
            curve.peak_bytes.append(peak_memory(prepare())[0])  # and this call warms up
        times = [[seconds_of(prepare()) for prepare in prepared] for _ in range(rounds)]
        for curve, own in zip(curves, zip(*times, strict=True), strict=True):
            curve.seconds.append(median(own))
        del prepared
        stepping.cache_clear()
        gc.collect()
    for curve in curves:
        curve.fit()
    return curves


MEMORY_NOTE = (
    "Memory: highest point of a call beyond inputs, weights and optimiser state (there before) and outputs and "
    "gradients (there after); what a library allocates by itself is not seen."
)


def draw(path: Path, curves: list[Curve], title: str) -> None:
    """A column for each sweep: times above, memory below."""
    sweeps = list(dict.fromkeys((curve.sweep, curve.x) for curve in curves))
    colours = dict(zip(VARIANTS, ("#1f5fa8", "#b0452c"), strict=True))
    with plt.rc_context({"font.size": 14, "axes.titlesize": 14, "axes.labelsize": 15}):
        figure, axes = plt.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 8), layout="constrained", squeeze=False)
        for column, sweep in enumerate(sweeps):
            times, memory = axes[:, column]
            for curve in (curve for curve in curves if (curve.sweep, curve.x) == sweep):
                look = dict(color=colours[curve.variant], marker="o", markersize=6, linewidth=1.6)
                times.plot(curve.values, curve.seconds, label=curve.variant, **look)
                memory.plot(curve.values, np.array(curve.peak_bytes) / 2**20, **look)
            times.set(title=sweep[0], ylabel="seconds" if column == 0 else "")
            memory.set(xlabel=sweep[1], ylabel="peak temporary memory, MiB" if column == 0 else "")
            for panel in (times, memory):
                panel.set_xlim(left=0)
                panel.set_ylim(bottom=0)
                panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))
                style(panel)
        axes[0, 0].legend(frameon=False)
        figure.supxlabel(MEMORY_NOTE, fontsize=12)
        save(figure, path, title, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=count, default=3, help="timed rounds at every point")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it works; needs --out")
    options = parser.parse_args(arguments)
    if options.smoke and options.out == RESULTS:
        parser.error("--smoke needs --out: tiny shapes are no record.")
    try:
        check_writable(options.out)
    except ValueError as error:
        parser.error(str(error))
    torch.set_flush_denormal(True)
    readout, step = (cases[options.smoke] for cases in (SCALING_READOUT, SCALING_STEP))
    loops = SMOKE_LOOPS if options.smoke else LOOPS
    sweeps = readout_sweeps(readout, loops) + step_sweeps(step, loops)
    curves = [curve for sweep in sweeps for curve in measure(sweep, options.rounds)]
    options.out.mkdir(parents=True, exist_ok=True)
    where, dtype = environment(), readout.dtype_name
    path = path_in(options.out, where, "-scaling.jsonl")
    place = {"kind": "place", "place": 0, **where, "dtype": dtype, "rounds": options.rounds}
    write_lines(path, [place, *({"kind": "curve", "place": 0, **asdict(curve)} for curve in curves)])
    title = f"{where['device']}, {where['instructions']}, {where['threads']} threads, {dtype}"
    draw(path.with_suffix(".png"), curves, title)
    for curve in curves:
        title = " ".join(curve.sweep.split())
        print(f"{title}, {curve.variant}: within {curve.worst_deviation:.0%} of a line in {curve.x}")
    print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
