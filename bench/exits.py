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
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from bench.measure.markdown import table
from bench.measure.place import RESULTS, Record, environment, place_of
from bench.measure.study import save, style, write_study
from looped.command_line import Parser, count
from looped.diagnose import from_decoder
from looped.diagnose.diagnosis import validation_batches
from looped.diagnose.halting import TOLERANCE, measure_halting
from looped.diagnose.skipping import NO_POLICY, measure_skipping, with_all_loops
from looped.generate import Exit, Generated
from looped.halting import policy_named
from looped.model import LoopedLM
from looped.run_directory import check_writable, load_run
from train.step import seconds_in_turn

TOLERANCES = (1.0, 1.002, 1.005, TOLERANCE, 1.02, 1.05)
PROMPTS, PROMPT_LENGTH = 4, 16


def curves(decoder: LoopedLM, tokens: Tensor, targets: Tensor, rounds: int) -> tuple[Record, Record]:
    """Points of `Skipped` for K = 1..n_loops and for every policy; and every policy's threshold at `TOLERANCE`."""
    model, n_loops, half = from_decoder(decoder), decoder.config.n_loops, len(tokens) // 2
    fixed = {f"K = {k}": with_all_loops(decoder, k) for k in range(n_loops, 0, -1)}
    skipped = measure_skipping(fixed, [(tokens[half:], targets[half:])], rounds, n_loops)
    points: Record = {"fixed": [asdict(each) for each in skipped.values()]}
    thresholds: Record = {}
    for tolerance in TOLERANCES:
        halting = measure_halting(model, [(tokens, targets)], tolerance, rounds=rounds)
        for name, skipped in halting.skipped.items():
            if name != NO_POLICY:
                points.setdefault(name, []).append({"tolerance": tolerance} | asdict(skipped))
        if tolerance == TOLERANCE:
            thresholds = {name: halt.threshold for name, halt in halting.policies.items()}
    return points, thresholds


def generation(
    decoder: LoopedLM, prompts: Sequence[list[int]], thresholds: Record, new_tokens: int, rounds: int
) -> list[Record]:
    """Generated tokens/s, mean loops, and the share of tokens that are those of K loops, of every way to generate."""
    n_loops = decoder.config.n_loops
    gate = decoder.exit_logit if decoder.exit_gate is not None else None
    ways: dict[str, Record] = {f"K = {k}": {"n_loops": k} for k in range(n_loops, 0, -1)}
    ways |= {name: {"exit": Exit(policy_named(name, gate), tau)} for name, tau in thresholds.items()}
    if n_loops > 1:
        ways["K = 1 drafts"] = {"draft_loops": 1}

    def generated(way: str) -> list[Generated]:
        options = {"max_new_tokens": new_tokens, "temperature": 0.0, **ways[way]}
        return [decoder.generate([prompt], **options) for prompt in prompts]

    texts = {way: generated(way) for way in ways}  # warms up, too
    calls = [partial(generated, way) for way in ways]
    seconds = np.array(seconds_in_turn(calls, torch.device("cpu"), rounds=rounds, warm_up=0))  # [ways, rounds]
    tokens = {way: np.concatenate([part.tokens[0] for part in text]) for way, text in texts.items()}
    loops = {way: np.concatenate([part.loops[0] for part in text]) for way, text in texts.items()}
    return [
        {
            "way": way,
            "tokens_per_second": float(np.median(len(loops[way]) / seconds[place])),
            "speed": float(np.median(seconds[0] / seconds[place])),
            "loops": float(np.mean(loops[way])),
            "same_as_k": float(np.mean(tokens[way] == tokens[f"K = {n_loops}"])),
        }
        for place, way in enumerate(ways)
    ]


def draw(path: Path, record: Record) -> None:
    """Perplexity against speed, both divided by those at K; a curve for each policy. Beside it the part close to 1."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for axes in panels:
        for name, points in record["curves"].items():
            speeds, ratios = [each["speed"] for each in points], [each["ratio"] for each in points]
            marks = "o-" if name == "fixed" else ".--"
            label = f"K = {len(points)}..1 for every token" if name == "fixed" else name
            axes.plot(speeds, ratios, marks, color="0.2" if name == "fixed" else None, label=label)
        axes.set(xlabel="speed / that at K, to the logits of every token", ylabel="perplexity / that at K")
        style(axes)
    panels[0].legend(frameon=False)
    panels[1].set(ylim=(0.99, 1.15), title="the same, close to 1")
    save(figure, path, record["title"], dpi=100)


def page(record: Record, figure: Path) -> str:
    points, ways = [], []
    for name, of_policy in record["curves"].items():
        for each in of_policy:
            exits = " / ".join(f"{share:.0%}" for share in each["exits"])
            allowed = f"{each['tolerance']:g}" if "tolerance" in each else "-"
            numbers = f"{each['loops']:.2f} | {exits} | {each['ratio']:.4f} | {each['speed']:.2f}"
            points.append(f"| {name} | {allowed} | {numbers} |")
    for each in record["generation"]:
        speeds = f"{each['tokens_per_second']:.0f} | {each['speed']:.2f}"
        ways.append(f"| {each['way']} | {speeds} | {each['loops']:.2f} | {each['same_as_k']:.0%} |")
    paragraphs = [
        f"# Stopping early: {record['title']}",
        f"`{record['command']}`, {place_of(record)}.",
        f"![perplexity against speed]({figure.name})",
        "Whole texts, later loops left out:",
        "\n".join(table("| policy | allowed | mean loops | exits after 1..K | perplexity / that at K | x K |", points)),
        f"Generated greedily, {record['new_tokens']} tokens after each of {PROMPTS} prompts, one at a time:",
        "\n".join(table("| | tokens/s | x K | mean loops | tokens that are those of K |", ways)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="python -m bench.exits", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory that training wrote")
    parser.add_argument("--tokens", type=count, default=8192, help="validation tokens")
    parser.add_argument("--rounds", type=count, default=5, help="timed rounds")
    parser.add_argument("--new-tokens", type=count, default=64, help="generated after each prompt")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the record")
    options = parser.parse_args(words)
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
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    points, thresholds = curves(decoder, tokens, targets, options.rounds)
    length = min(PROMPT_LENGTH, decoder.config.max_seq_len - options.new_tokens)
    prompts = [row[:length].tolist() for row in tokens[-PROMPTS:]]
    gap = points["fixed"][-1]["ratio"]
    record = {
        **environment(torch.device("cpu")),
        "command": f"python -m bench.exits {' '.join(words)}",
        "title": f"{run.name}, perplexity at K = 1 is {gap:.3f} times that at K = {decoder.config.n_loops}",
        "run": run.config["train"],
        "new_tokens": options.new_tokens,
        "curves": points,
        "generation": generation(decoder, prompts, thresholds, options.new_tokens, options.rounds),
    }
    write_study(options.out, "exits", record, partial(draw, record=record), partial(page, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
