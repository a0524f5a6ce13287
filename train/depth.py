"""How many loops each step has: fixed, or drawn anew for every step.

    fixed             K = n_loops
    uniform:1-8       K uniform on 1..8
    poisson:4         tau ~ N(log 4 - s^2 / 2, s), s = 1/2; K ~ Poisson(exp(tau)) + 1: a mean of 5, a long tail
                      (Huginn, Geiping et al., arXiv 2502.05171, which has 32 for the 4)

A depth is a function of (seed, step), so that a continued run draws what the whole one does.

Graphs are compiled and captured once for each depth, so that only a few depths occur, at most `MOST`. uniform:A-B has
all of A..B if those are few enough, and otherwise evenly spread ones from A to B. poisson:M has round(M 2^(i/2)) for
i = -3..4, at least 1. A draw between two of them becomes one of the two, with the probabilities that keep its mean:
that adds to the variance, and nothing to the mean. A draw outside becomes the nearest. uniform has none of these;
poisson's mean moves by less than 1% from M = 2 on, by -2.7% at M = 1.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MOST = 8  # different depths of one run
DEEPEST = 1024
SIGMA = 0.5  # of Huginn's log-normal rate
STREAM = 0x6465707468  # sets these draws apart from the order of the windows, which has the same seed


@dataclass(frozen=True)
class Depth:
    """values: the depths that occur, rising. draw: the depth of a step before it becomes one of them."""

    values: tuple[int, ...]
    draw: Callable[[np.random.Generator], int]

    def at(self, seed: int, step: int) -> int:
        """The loops of step ``step``, from 0."""
        generator = np.random.default_rng((seed, step, STREAM))
        return _one_of(self.values, self.draw(generator), generator)


def parse_depth(text: str, n_loops: int) -> Depth:
    """What ``text`` says, with K = ``n_loops`` where it is fixed. Raises ValueError for another form."""
    if text == "fixed":
        return Depth((n_loops,), lambda generator: n_loops)
    if match := re.fullmatch(r"uniform:(\d+)-(\d+)", text, re.ASCII):
        low, high = map(int, match.groups())
        if 1 <= low <= high <= DEEPEST:
            return _uniform(low, high)
    if match := re.fullmatch(r"poisson:(\d+(?:\.\d+)?)", text, re.ASCII):
        mean = float(match[1])
        if 1 <= mean <= DEEPEST:
            return _poisson(mean)
    raise ValueError(
        f"depth must be fixed, uniform:A-B with 1 <= A <= B <= {DEEPEST}, or poisson:M with 1 <= M <= {DEEPEST}. "
        f"Got depth={text!r}."
    )


def _uniform(low: int, high: int) -> Depth:
    values = np.linspace(low, high, min(MOST, high - low + 1)).round().astype(int)
    return Depth(tuple(values.tolist()), lambda generator: int(generator.integers(low, high + 1)))


def _poisson(mean: float) -> Depth:
    values = {max(1, round(mean * 2 ** (i / 2))) for i in range(-3, 5)}

    def draw(generator: np.random.Generator) -> int:
        tau = generator.normal(math.log(mean) - SIGMA**2 / 2, SIGMA)
        return int(generator.poisson(math.exp(tau))) + 1

    return Depth(tuple(sorted(values)), draw)


def _one_of(values: tuple[int, ...], drawn: int, generator: np.random.Generator) -> int:
    above = bisect_left(values, drawn)
    if above == 0 or above == len(values):
        return values[0] if above == 0 else values[-1]
    low, high = values[above - 1], values[above]
    return high if generator.random() * (high - low) < drawn - low else low


def evaluated_depths(n_loops: int, eval_loops: int) -> tuple[int, ...]:
    """1..n_loops, then its multiples up to ``eval_loops``, and that."""
    return tuple(sorted({*range(1, n_loops + 1), *range(2 * n_loops, eval_loops + 1, n_loops), eval_loops}))
