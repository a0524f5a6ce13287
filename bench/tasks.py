"""Loops that pay: the accuracy of a task's answers at K = 1..8, trained at K = 4, at K drawn from 4..8, and at K = 1.

    OMP_NUM_THREADS=1 python -m bench.tasks p-hop [--seeds 0 1 2] [--out bench/results] [--runs runs/tasks]

Trains the preset of the task in every condition with every seed, one run after the other, and keeps the summary of
each in ``out``/<task>; what is there is not trained again. Then draws accuracy.png and writes accuracy.md there.
"""

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from bench.measure.markdown import line, table
from bench.measure.place import RESULTS, Record
from bench.measure.study import save, style
from looped.command_line import Parser
from looped.run_directory import check_writable
from train.metrics import write_record
from train.run import main as train
from train.tasks.task import TASKS

CONDITIONS: dict[str, list[str]] = {
    "fixed": [],
    "uniform-4-8": ["--depth", "uniform:4-8"],
    "one-loop": ["--n-loops", "1"],
}
NAMES = {"fixed": "trained at K = 4", "uniform-4-8": "trained at K drawn from 4..8", "one-loop": "trained at K = 1"}
COLOURS = {"fixed": "#b0452c", "uniform-4-8": "#1f5fa8", "one-loop": "0.55"}


def trained(task: str, condition: str, seed: int, runs: Path, out: Path) -> Record:
    """The record of a run, which is trained if there is none. Raises ValueError if training does not succeed."""
    path = out / f"{condition}-seed-{seed}.json"
    options = ["--preset", task, "--seed", str(seed), "--eval-loops", "8", *CONDITIONS[condition]]
    if not path.exists():
        run = runs / task / path.stem
        before = time.process_time()
        if train([*options, "--device", "cpu", "--out", str(run)]) != 0:
            raise ValueError(f"{run} was not trained to its end. Remove it.")
        used = {"options": options, "seed": seed, "cpu_seconds": time.process_time() - before}
        write_record(path, used | json.loads((run / "summary.json").read_text(encoding="utf-8")))
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("options") != options:
        raise ValueError(f"{path} must be the record of {options}. Got {record.get('options')}. Name another --out.")
    return record


def accuracy(record: Record, name: str = "answers") -> tuple[list[int], list[float]]:
    """Every K, and the share of right answers there."""
    results = record["evaluation"] + record["evaluation_beyond"]
    return [result["n_loops"] for result in results], [result["accuracy"][name] for result in results]


def draw(path: Path, records: dict[str, list[Record]], title: str) -> None:
    """All answers in every condition, and parts of them as trained at K = 4; a line for each seed."""
    figure, (whole, parts) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=True)
    for condition, of_seeds in records.items():
        for number, record in enumerate(of_seeds):
            label = None if number else NAMES[condition]
            whole.plot(*accuracy(record), "o-", markersize=4, color=COLOURS[condition], label=label)
    whole.set(title="all answers", xlabel="loops at evaluation", ylabel="share that is right")
    names = [name for name in records["fixed"][0]["evaluation"][0]["accuracy"] if name != "answers"]
    for name, colour in zip(names, plt.colormaps["viridis"](np.linspace(0, 0.85, len(names))), strict=True):
        for number, record in enumerate(records["fixed"]):
            parts.plot(*accuracy(record, name), "o-", markersize=4, color=colour, label=None if number else name)
    parts.set(title=NAMES["fixed"], xlabel="loops at evaluation")
    for axes in (whole, parts):
        axes.axvline(4, color="0.7", linestyle=":")
        axes.set_ylim(0, 1.03)
        style(axes)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=9)
    save(figure, path, title, dpi=100)


def accuracies(records: dict[str, list[Record]]) -> list[str]:
    """A line for each run, a column for each K, in Markdown."""
    loops, _ = accuracy(records["fixed"][0])
    lines = []
    for condition, of_seeds in records.items():
        for record in of_seeds:
            shares = [f"{share:.3f}" for share in accuracy(record)[1]]
            lines.append(line(NAMES[condition], str(record["seed"]), *shares, f"{record['cpu_seconds']:.0f}"))
    return table(f"| | seed | {' | '.join(f'K = {k}' for k in loops)} | CPU seconds |", lines)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"))
    options = parser.parse_args(arguments)
    out = options.out / options.task
    try:
        check_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        records = {
            condition: [trained(options.task, condition, seed, options.runs, out) for seed in options.seeds]
            for condition in CONDITIONS
        }
    except (ValueError, OSError) as error:
        parser.error(str(error))
    first = records["fixed"][0]
    title = f"{options.task}, {first['steps']} steps, {len(options.seeds)} seeds"
    draw(out / "accuracy.png", records, title)
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "torch", "numpy"))
    place = f"{first['device']}; {versions}; commit {first['commit']}; {first['steps']} steps."
    page = "\n".join([place, "", *accuracies(records), ""])
    (out / "accuracy.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
