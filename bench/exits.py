"""What stopping early gives: perplexity and speed of every policy beside K = 1..n_loops, and generated tokens/s.

    python -m bench.exits RUN [--tokens 8192] [--rounds 5] [--new-tokens 64] [--out bench/results]

RUN is a directory that training wrote. Every policy is calibrated on half of the validation windows, once for each
allowed rise of the perplexity (`TOLERANCES`), and measured on the other half with later loops really left out: a curve
for each policy, beside one of K loops for every token. Then each generates after prompts from those windows, one at a
time and greedily, with the threshold of the tolerance 1.01. The policies of one tolerance take turns with K = n_loops,
and so do the numbers of loops, and the ways to generate. A speed is the median of the quotients with the same round's
K = n_loops; tokens/s of different turns do not compare. Writes `<date>-<device>-exits.json`, `.png` and `.md`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from bench.measure.place import RESULTS, environment, place_of, slug
from looped.command_line import Parser
from looped.diagnose import from_decoder
from looped.diagnose.diagnosis import validation_batches
from looped.diagnose.halting import TOLERANCE, measure_halting
from looped.diagnose.model import Batch
from looped.diagnose.skipping import NO_POLICY, measure_skipping, with_all_loops
from looped.generate import Exit, Generated
from looped.halting import policy_named
from looped.model import LoopedLM
from looped.run_directory import check_writable, load_run
from train.paper.record import write_record

TOLERANCES = (1.0, 1.002, 1.005, TOLERANCE, 1.02, 1.05)
PROMPTS, PROMPT_LENGTH = 4, 16

Record = dict[str, Any]


def curves(decoder: LoopedLM, batches: Sequence[Batch], rounds: int) -> tuple[Record, Record]:
    """Points of `Skipped` for K = 1..n_loops and for every policy; and every policy's threshold at `TOLERANCE`."""
    model, n_loops = from_decoder(decoder), decoder.config.n_loops
    fixed = {f"K = {k}": with_all_loops(decoder, k) for k in range(n_loops, 0, -1)}
    later = sum(len(tokens) for tokens, _ in batches) // 2
    report = [(tokens[later:], targets[later:]) for tokens, targets in [_joined(batches)]]
    points: Record = {"fixed": [asdict(each) for each in measure_skipping(fixed, report, rounds, n_loops).values()]}
    thresholds: Record = {}
    for tolerance in TOLERANCES:
        halting = measure_halting(model, [_joined(batches)], tolerance, rounds=rounds)
        for name, skipped in halting.skipped.items():
            if name != NO_POLICY:
                points.setdefault(name, []).append({"tolerance": tolerance} | asdict(skipped))
        if tolerance == TOLERANCE:
            thresholds = {name: halt.threshold for name, halt in halting.policies.items()}
    return points, thresholds


def _joined(batches: Sequence[Batch]) -> Batch:
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return tokens, targets


def generation(
    decoder: LoopedLM, prompts: Sequence[list[int]], thresholds: Record, new_tokens: int, rounds: int
) -> list[Record]:
    """Generated tokens/s, mean loops, and the share of tokens that are those of K loops, of every way to generate."""
    n_loops = decoder.config.n_loops
    gate = decoder.exit_logit if decoder.exit_gate is not None else None
    ways: dict[str, Record] = {f"K = {k}": {"n_loops": k} for k in range(n_loops, 0, -1)}
    for name, tau in thresholds.items():
        ways[name] = {"exit": Exit(policy_named(name, gate), tau)}
    if n_loops > 1:
        ways["K = 1 drafts"] = {"draft_loops": 1}

    def run(options: Record) -> Callable[[], list[Generated]]:
        return lambda: [
            decoder.generate([prompt], max_new_tokens=new_tokens, temperature=0.0, **options) for prompt in prompts
        ]

    runs = {name: run(options) for name, options in ways.items()}
    texts = {name: call() for name, call in runs.items()}  # warms up, too
    seconds = np.array([[_seconds(call) for call in runs.values()] for _ in range(rounds)])
    whole = [text.tokens[0] for text in texts[f"K = {n_loops}"]]
    records = []
    for place, (name, text) in enumerate(texts.items()):
        loops = [count for part in text for count in part.loops[0]]
        same = [
            a == b for part, of_k in zip(text, whole, strict=True) for a, b in zip(part.tokens[0], of_k, strict=True)
        ]
        records.append(
            {
                "way": name,
                "tokens_per_second": float(np.median(len(loops) / seconds[:, place])),
                "speed": float(np.median(seconds[:, 0] / seconds[:, place])),
                "loops": float(np.mean(loops)),
                "same_as_k": float(np.mean(same)),
            }
        )
    return records


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def draw(path: Path, record: Record) -> None:
    """Perplexity against speed, both divided by those at K; a curve for each policy. Beside it the part close to 1."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for axes in panels:
        for name, points in record["curves"].items():
            speeds, ratios = [each["speed"] for each in points], [each["ratio"] for each in points]
            style = "o-" if name == "fixed" else ".--"
            label = f"K = {len(points)}..1 for every token" if name == "fixed" else name
            axes.plot(speeds, ratios, style, color="0.2" if name == "fixed" else None, label=label)
        axes.set(xlabel="speed / that at K, to the logits of every token", ylabel="perplexity / that at K")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    panels[1].set(ylim=(0.99, 1.15), title="the same, close to 1")
    figure.suptitle(record["title"])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def page(record: Record, figure: str) -> str:
    lines = [f"# Stopping early: {record['title']}", "", f"`{record['command']}`, {place_of(record)}.", ""]
    lines += [f"![perplexity against speed]({figure})", "", "Whole texts, later loops left out:", ""]
    lines += [
        "| policy | allowed | mean loops | exits after 1..K | perplexity / that at K | x K |",
        "|---|---|---|---|---|---|",
    ]
    for name, points in record["curves"].items():
        for each in points:
            exits = " / ".join(f"{share:.0%}" for share in each["exits"])
            allowed = f"{each['tolerance']:g}" if "tolerance" in each else "-"
            numbers = f"{each['loops']:.2f} | {exits} | {each['ratio']:.4f} | {each['speed']:.2f}"
            lines.append(f"| {name} | {allowed} | {numbers} |")
    lines += [
        "",
        f"Generated greedily, {record['new_tokens']} tokens after each of {PROMPTS} prompts, one at a time:",
        "",
    ]
    lines += ["| | tokens/s | x K | mean loops | tokens that are those of K |", "|---|---|---|---|---|"]
    for each in record["generation"]:
        numbers = (
            f"{each['tokens_per_second']:.0f} | {each['speed']:.2f} | {each['loops']:.2f} | {each['same_as_k']:.0%}"
        )
        lines.append(f"| {each['way']} | {numbers} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="python -m bench.exits", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory that training wrote")
    parser.add_argument("--tokens", type=int, default=8192, help="validation tokens")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated after each prompt")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the record")
    options = parser.parse_args(words)
    for name in ("rounds", "new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"{name} must be at least 1. Got {name}={getattr(options, name)}.")
    try:
        check_writable(options.out)
        run = load_run(options.run)
        batches = validation_batches(run.validation, seq_len=run.model.config.max_seq_len, n_tokens=options.tokens)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.new_tokens >= run.model.config.max_seq_len:
        parser.error(f"new_tokens must be below max_seq_len={run.model.config.max_seq_len}. Got {options.new_tokens}.")
    torch.set_flush_denormal(True)
    decoder = run.model.eval()
    points, thresholds = curves(decoder, batches, options.rounds)
    length = min(PROMPT_LENGTH, decoder.config.max_seq_len - options.new_tokens)
    prompts = [row[:length].tolist() for row in _joined(batches)[0][-PROMPTS:]]
    gap = points["fixed"][-1]["ratio"]
    record = {
        **environment(),
        "command": f"python -m bench.exits {' '.join(words)}",
        "title": f"{run.name}, perplexity at K = 1 is {gap:.3f} times that at K = {decoder.config.n_loops}",
        "run": run.config["train"],
        "new_tokens": options.new_tokens,
        "curves": points,
        "generation": generation(decoder, prompts, thresholds, options.new_tokens, options.rounds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{record['date']}-{slug(record)}-exits.json"
    write_record(path, record)
    draw(path.with_suffix(".png"), record)
    path.with_suffix(".md").write_text(page(record, path.with_suffix(".png").name), encoding="utf-8")
    print(page(record, path.with_suffix(".png").name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
