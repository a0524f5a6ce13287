"""What a claim of the paper is here: numbers taken from runs, and a rule that they obey or not.

Thresholds come from the paper's numbers, not from any of ours. A claim is *reproduced* if its rule holds for every seed
that has all the runs it needs, and *not reproduced* if it fails for one; with no such seed it is *not measured*.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from looped.diagnose.verdict import Measurements
from train.paper.evidence import Evidence
from train.paper.runs import RunResult

Seed = Mapping[str, Evidence]  # the complete runs of one seed, by condition
Mark = Literal["reproduced", "not reproduced", "not measured", "not testable at this scale"]
Rule = Callable[..., bool]  # of the quantities of one seed, in order


@dataclass(frozen=True)
class Measure:
    """A number of one complete run. label: may have a place for the condition. form: how the number is printed."""

    label: str
    value: Callable[[Evidence], float]
    form: str = "{:.4g}"

    def of(self, condition: str) -> "Quantity":
        return Quantity(self.label.format(f"`{condition}`"), self.value, self.form, (condition,))


def evaluated(label: str, value: Callable[[RunResult], float], form: str = "{:.4g}") -> Measure:
    """Of the evaluation that training left, in which every loop is read as the last."""
    return Measure(label, lambda run: value(run.result), form)


def diagnosed(label: str, value: Callable[[Measurements], float], form: str = "{:.4g}") -> Measure:
    """Of the diagnosis of the run."""
    return Measure(label, lambda run: value(run.measured), form)


@dataclass(frozen=True)
class Quantity:
    """A number of one seed. value: of the runs of these conditions, in order. form: how it is printed."""

    label: str
    value: Callable[..., float]
    form: str
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class OtherReading:
    """Another reading of the same runs, under which the rule is tried as well. It does not decide."""

    title: str
    holds: Rule


@dataclass(frozen=True)
class Claim:
    """title: the paper's statement. paper: its numbers. rule, holds: the same thing, in English and as code. figure: a
    file, beside the page."""

    title: str
    paper: str
    quantities: tuple[Quantity, ...]
    rule: str
    holds: Rule
    figure: str
    other_reading: OtherReading | None = None

    @property
    def conditions(self) -> tuple[str, ...]:
        """Those whose runs are needed."""
        return tuple(dict.fromkeys(name for quantity in self.quantities for name in quantity.conditions))


@dataclass(frozen=True)
class Untestable:
    """A claim that no run of a sweep can confirm or deny, and why. The reason has a place for the sweep's preset."""

    title: str
    paper: str
    why: str


@dataclass(frozen=True)
class Outcome:
    """values: [quantities] of every seed that has the runs. held: the seeds for which the rule holds. held_otherwise:
    those for which it does under the other reading."""

    mark: Mark
    values: dict[int, list[float]]
    held: list[int]
    held_otherwise: list[int] = field(default_factory=list)


def judge(claim: Claim | Untestable, seeds: Mapping[int, Seed]) -> Outcome:
    """The mark of a claim, from the runs of every seed."""
    if isinstance(claim, Untestable):
        return Outcome("not testable at this scale", {}, [])
    values = {
        number: [quantity.value(*(runs[name] for name in quantity.conditions)) for quantity in claim.quantities]
        for number, runs in seeds.items()
        if all(condition in runs for condition in claim.conditions)
    }
    return judge_values(claim, values)


def judge_values(claim: Claim, values: dict[int, list[float]]) -> Outcome:
    """The mark of a claim, from the numbers of every seed alone. One that is not finite confirms nothing."""

    def seeds_that_obey(rule: Rule) -> list[int]:
        return [number for number, row in values.items() if all(map(math.isfinite, row)) and rule(*row)]

    held = seeds_that_obey(claim.holds)
    otherwise = seeds_that_obey(claim.other_reading.holds) if claim.other_reading else []
    if not values:
        return Outcome("not measured", values, held, otherwise)
    return Outcome(mark_of(len(held), len(values)), values, held, otherwise)


def mark_of(n_held: int, n_seeds: int) -> Mark:
    """Of a claim that was measured with ``n_seeds`` seeds."""
    return "reproduced" if n_held == n_seeds else "not reproduced"
