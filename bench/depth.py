"""What training at a drawn depth gives: the loss at K = 1..16 of models trained at K = 4 and at depths around it.

    python -m bench.depth [--out bench/results] [--runs runs/depth] [--steps 300] [--supervision terminal per-loop]

Trains the demo preset once for each depth and supervision, one run after the other, or takes the runs that are
complete. All are evaluated on the same validation tokens. One seed: differences of a few hundredths of a nat say
nothing. Writes `<date>-<device>-depth.json`, `.png` and `.md`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator

from bench.measure.markdown import line, table
from bench.measure.place import RESULTS, environment, place_of
from bench.measure.study import save, style, write_study
from bench.shapes import DTYPES
from looped.command_line import Parser, count
from looped.run_directory import check_writable, load_run
from train.config import read_config
from train.depth import parse_depth
from train.run import main as train
from train.step import evaluate
from train.text.batches import evaluation_windows

TRAINED_LOOPS = 4
DEPTHS = ("fixed", "uniform:1-8", "poisson:4")
LOOPS = tuple(range(1, 17))
CPU = torch.device("cpu")  # where it trains and evaluates, whatever else is there


@dataclass(frozen=True)
class Curve:
    """One run. mean_loops: of its steps. seconds: of training. ce: mean cross-entropy in nats at every K of `LOOPS`."""

    supervision: str
    depth: str
    mean_loops: float
    seconds: float
    ce: list[float]


def trained(directory: Path, supervision: str, depth: str, steps: int) -> Path:
    """The run of that supervision and depth, trained if it is not there. Raises ValueError if it is another, or if
    training does not succeed."""
    run = directory / f"{supervision}-{depth.replace(':', '-')}"
    if not (run / "summary.json").exists():
        options = ["--supervision", supervision, "--depth", depth, "--n-loops", str(TRAINED_LOOPS)]
        options += ["--steps", str(steps), "--eval-tokens", "4096", "--eval-loops", str(TRAINED_LOOPS)]
        if train([*options, "--preset", "demo", "--device", "cpu", "--out", str(run)]) != 0:
            raise ValueError(f"{run} was not trained to its end. Remove it.")
    config = read_config(run)
    found = (config.supervision, config.depth, config.steps, config.n_loops)
    if found != (supervision, depth, steps, TRAINED_LOOPS):
        raise ValueError(f"{run} must be a run of {supervision}, {depth}, {steps} steps. Got {found}. Remove it.")
    return run


def measure(directory: Path, tokens: int) -> Curve:
    """Evaluate a run on about so many validation tokens."""
    run, config = load_run(directory), read_config(directory)
    windows, indices = evaluation_windows(run.validation.tokens.numpy(), config.seq_len, tokens)
    results = evaluate(
        run.model,
        windows,
        indices,
        batch_size=config.batch_size,
        device=CPU,
        dtype=DTYPES[str(config.dtype)],
        bytes_per_token=None,
        depths=LOOPS,
    )
    depth = parse_depth(config.depth, config.n_loops)
    drawn = [depth.at(config.seed, step) for step in range(run.step)]
    seconds = json.loads((directory / "summary.json").read_text())["train_seconds"]
    ce = [result.ce for result in results]
    return Curve(config.supervision, config.depth, sum(drawn) / len(drawn), seconds, ce)


def losses(curves: list[Curve]) -> list[str]:
    """A line for each run, a column for some K, in Markdown."""
    shown = (1, 2, 3, 4, 5, 6, 8, 12, 16)
    header = line("supervision", "depth", "mean loops of a step", *(f"K = {k}" for k in shown))
    return table(
        header,
        [
            line(run.supervision, f"`{run.depth}`", f"{run.mean_loops:.2f}", *(f"{run.ce[k - 1]:.3f}" for k in shown))
            for run in curves
        ],
    )


def draw(path: Path, curves: list[Curve], title: str) -> None:
    """A panel for each supervision, a line for each depth."""
    supervisions = list(dict.fromkeys(curve.supervision for curve in curves))
    size = (6.5 * len(supervisions), 5)
    figure, panels = plt.subplots(1, len(supervisions), figsize=size, layout="constrained", squeeze=False, sharey=True)
    colours = dict(zip(DEPTHS, ("#b0452c", "#1f5fa8", "#3b8a4e"), strict=True))
    for axes, supervision in zip(panels[0], supervisions, strict=True):
        axes.axvline(TRAINED_LOOPS, color="0.7", linestyle=":", label=f"K = {TRAINED_LOOPS}, the depth of fixed")
        for curve in (curve for curve in curves if curve.supervision == supervision):
            axes.plot(LOOPS, curve.ce, marker="o", markersize=4, color=colours[curve.depth], label=curve.depth)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=f"{supervision} supervision", xlabel="loops at evaluation")
        style(axes)
        axes.legend(frameon=False)
    panels[0, 0].set_ylabel("validation cross-entropy, nats")
    save(figure, path, title, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/depth"))
    parser.add_argument("--steps", type=count, default=300)
    parser.add_argument("--tokens", type=count, default=65_536, help="validation tokens that are predicted")
    parser.add_argument("--supervision", nargs="+", choices=("terminal", "per-loop"), default=["terminal", "per-loop"])
    options = parser.parse_args(arguments)
    pairs = [(supervision, depth) for supervision in options.supervision for depth in DEPTHS]
    try:
        check_writable(options.out)
        runs = [trained(options.runs, *pair, options.steps) for pair in pairs]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    curves = [measure(run, options.tokens) for run in runs]
    where = environment(CPU)
    settings: dict[str, Any] = {"preset": "demo", "steps": options.steps, "tokens": options.tokens, "seed": 42}
    page = [place_of(where), "", f"Validation cross-entropy, nats; {settings}.", "", *losses(curves), ""]
    path = write_study(
        options.out,
        "depth",
        {**where, "settings": settings, "loops": LOOPS, "curves": [asdict(curve) for curve in curves]},
        lambda figure: draw(figure, curves, f"demo preset, {options.steps} steps, one seed"),
        lambda _: "\n".join(page),
    )
    print(f"written: {path}, .md and .png")


if __name__ == "__main__":
    main()
