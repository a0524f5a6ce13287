"""``python -m looped.generate RUN --prompt "..."``: go on from a text with the model of a saved run."""

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from looped.command_line import command_line, device_named
from looped.generate import Exit, Options, Step, stream
from looped.generate.text import TextStream, read_tokenizer
from looped.halting import policy_named
from looped.model import LoopedLM
from looped.run_directory import load_run


@dataclass(frozen=True, kw_only=True)
class Command:
    """Go on from a text with the model of a saved run. The text goes to standard output as it comes."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory that training wrote."""
    prompt: str
    """The text to go on from; - reads it from standard input."""
    max_new_tokens: int = 64
    """Tokens at most; the end of a document comes before, if the model says so."""
    n_loops: int | None = None
    """K, loops for every token. By default as many as the model was trained with."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw from the k most probable tokens."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of the probability."""
    seed: int = 0
    """The same seed gives the same text."""
    exit: str | None = None
    """POLICY:TAU, such as margin:2.5. A token leaves at the first loop at which the policy's score is at least TAU:
    margin, top-probability, entropy (negative, in nats), state-change (negative), or the model's gate."""
    speculate: int | None = None
    """Draft with this many of the model's own loops, and verify with all K. The text is distributed as without."""
    draft_tokens: int = 4
    """Tokens that are drafted at a time."""
    shared_cache: bool = False
    """Keep one set of keys and values for all loops: a K-th of the memory, and not quite the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, also if nobody reads the text any more; 130 after Ctrl-C; or 2 if the input is bad.
    Then nothing is written but one line on stderr, why."""
    # Saturated softmaxes make denormals, which x86 computes with several times slower.
    torch.set_flush_denormal(True)
    try:
        argv = sys.argv[1:] if argv is None else list(argv)
        defaults = Command(run=tyro.MISSING, prompt=tyro.MISSING)
        say(command_line(argv, defaults, "python -m looped.generate"))
    except BrokenPipeError:
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def say(command: Command) -> None:
    """Write prompt and new text to stdout, and a line on what it took to stderr."""
    prompt = read_prompt(command.prompt)
    options = Options(
        max_new_tokens=command.max_new_tokens,
        n_loops=command.n_loops,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
        draft_loops=command.speculate,
        draft_tokens=command.draft_tokens,
        shared_cache=command.shared_cache,
    )
    device = device_named(command.device)
    run = load_run(command.run)
    tokenizer = read_tokenizer(command.run)
    exit_ = None if command.exit is None else exit_of(run.model, command.exit)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    end = int(run.validation.tokens[run.validation.bounds[1] - 1])  # every document ends with this token
    options = dataclasses.replace(options, exit=exit_, stop_tokens=(end,))
    steps = stream(run.model.to(device), [ids], options)
    text = TextStream(tokenizer)
    write(text.add(ids))
    done: list[Step] = []
    began = 0.0
    for step in steps:
        began = began or time.perf_counter()  # the first token is there
        done.append(step)
        write(text.add([token for token in step.tokens[0] if token != end]))
    seconds = time.perf_counter() - began
    write(text.end() + "\n")
    print(summary(done, seconds, end), file=sys.stderr)


def write(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError:
        # What is still in the stream's buffer goes there too, when Python flushes it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def summary(steps: Sequence[Step], seconds: float, end: int) -> str:
    """seconds: since the first token, so that the prompt's time is left out."""
    tokens = [token for step in steps for token in step.tokens[0]]
    loops = Counter(count for step in steps for count in step.loops[0])
    parts = [f"{len(tokens)} tokens" + ", the last ends the document" * (tokens[-1] == end)]
    if len(tokens) > 1:
        parts.append(f"{(len(tokens) - 1) / seconds:,.1f} tokens/s")
    if len(loops) == 1:
        (loop,) = loops
        parts.append(f"{loop} loop{'s' * (loop > 1)} each")
    else:
        each = ", ".join(f"{loop}: {loops[loop]}" for loop in sorted(loops))
        parts.append(f"{sum(loops.elements()) / len(tokens):.2f} loops on average ({each})")
    drafted, kept = (sum(counts) for counts in zip(*((step.drafted, step.kept) for step in steps), strict=True))
    if drafted > 0:
        parts.append(f"{kept} of {drafted} drafted tokens kept")
    return "; ".join(parts)


def read_prompt(prompt: str) -> str:
    """The text itself, or standard input without its last line's end."""
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n") if prompt == "-" else prompt
        text.encode()  # what an argument has that is not UTF-8 is no text
    except UnicodeError as error:
        raise ValueError(f"prompt must be UTF-8. Got other bytes: {error}.") from None
    if not text:
        raise ValueError("prompt must hold some text. Got none.")
    return text


def exit_of(model: LoopedLM, text: str) -> Exit:
    """Of "POLICY:TAU"."""
    name, _, tau = text.partition(":")
    policy = policy_named(name, None if model.exit_gate is None else model.exit_logit)
    try:
        return Exit(policy, float(tau))
    except ValueError:
        raise ValueError(f"exit must be POLICY:TAU, TAU a number. Got exit={text}.") from None


if __name__ == "__main__":
    sys.exit(main())
