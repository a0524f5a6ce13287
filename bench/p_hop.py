"""Loops that pay: the accuracy of p-hop's answers at K = 1..8, trained at K = 4, at drawn depths, and at K = 1.

    OMP_NUM_THREADS=1 python -m bench.p_hop [--out bench/results/p-hop] [--runs runs/p-hop]

Trains the p-hop preset in every condition with every seed, one run after the other, and keeps the summary of each in
``out``; what is there is not trained again. Then draws accuracy.png and writes accuracy.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.measure.place import RESULTS
from train.paper.record import write_record
from train.run import main as train

SEEDS = (0, 1, 2)
CONDITIONS: dict[str, list[str]] = {
    "fixed": [],
    "uniform-1-8": ["--depth", "uniform:1-8", "--steps", "2500"],
    "one-loop": ["--n-loops", "1", "--eval-loops", "8"],
}
NAMES = {"fixed": "trained at K = 4", "uniform-1-8": "trained at K drawn from 1..8", "one-loop": "trained at K = 1"}
COLOURS = {"fixed": "#b0452c", "uniform-1-8": "#1f5fa8", "one-loop": "0.55"}

Record = dict[str, Any]


def trained(condition: str, seed: int, runs: Path, out: Path) -> Record:
    """The record of a run, which is trained if there is none. Raises ValueError if training does not succeed."""
    path = out / f"{condition}-seed-{seed}.json"
    if not path.exists():
        run = runs / path.stem
        options = ["--preset", "p-hop", "--seed", str(seed), *CONDITIONS[condition]]
        before = time.process_time()
        if train([*options, "--device", "cpu", "--out", str(run)]) != 0:
            raise ValueError(f"{run} was not trained to its end. Remove it.")
        used = {"options": options, "cpu_seconds": time.process_time() - before}
        write_record(path, used | json.loads((run / "summary.json").read_text(encoding="utf-8")))
    return json.loads(path.read_text(encoding="utf-8"))


def accuracy(record: Record, name: str = "answers") -> dict[int, float]:
    """Share of right answers by K."""
    results = record["evaluation"] + record["evaluation_beyond"]
    return {result["n_loops"]: result["accuracy"][name] for result in results}


def draw(path: Path, records: dict[str, list[Record]]) -> None:
    """All answers, in every condition, a line for each seed; and those of each number of hops, trained at K = 4."""
    figure, (conditions, hops) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=True)
    for condition, of_seeds in records.items():
        for number, record in enumerate(of_seeds):
            share = accuracy(record)
            label = None if number else f"{NAMES[condition]}, {len(of_seeds)} seeds"
            conditions.plot(*zip(*share.items(), strict=True), "o-", ms=4, color=COLOURS[condition], label=label)
    conditions.set(title="All answers", xlabel="loops at evaluation", ylabel="right answers")
    names = [name for name in records["fixed"][0]["evaluation"][0]["accuracy"] if name != "answers"]
    for name, colour in zip(names, plt.colormaps["viridis"]([0.0, 0.3, 0.6, 0.85]), strict=True):
        for number, record in enumerate(records["fixed"]):
            share = accuracy(record, name)
            hops.plot(*zip(*share.items(), strict=True), "o-", ms=4, color=colour, label=None if number else name)
    hops.set(title=f"{NAMES['fixed']}, by the number of hops", xlabel="loops at evaluation")
    for axes in (conditions, hops):
        axes.axvline(4, color="0.7", linestyle=":")
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(records: dict[str, list[Record]]) -> str:
    """A line for each run, a column for each K, in Markdown."""
    loops = sorted(accuracy(records["fixed"][0]))
    lines = [
        f"| | seed | {' | '.join(f'K = {k}' for k in loops)} | CPU seconds |",
        "|---|---|" + "---|" * (len(loops) + 1),
    ]
    for condition, of_seeds in records.items():
        for seed, record in zip(SEEDS, of_seeds, strict=True):
            share = accuracy(record)
            shares = " | ".join(f"{share[k]:.3f}" for k in loops)
            lines.append(f"| {NAMES[condition]} | {seed} | {shares} | {record['cpu_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "p-hop")
    parser.add_argument("--runs", type=Path, default=Path("runs/p-hop"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    records = {
        condition: [trained(condition, seed, options.runs, options.out) for seed in SEEDS] for condition in CONDITIONS
    }
    draw(options.out / "accuracy.png", records)
    first = records["fixed"][0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "torch", "numpy"))
    page = f"{first['device']}; {versions}; commit {first['commit']}.\n\n{table(records)}"
    (options.out / "accuracy.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
