"""What a claim of the paper is here: numbers taken from runs, some of which have to obey rules.

Thresholds come from the paper's numbers, not from any of ours. A claim is *reproduced* if its rules hold for every seed
that has all the runs it needs, and *not reproduced* if one fails for one seed; with no such seed it is *not measured*.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from looped.diagnose import Diagnosis
from looped.diagnose.verdict import Measurements
from train.paper.conditions import Condition
from train.paper.runs import RunResult

Mark = Literal["reproduced", "not reproduced", "not measured", "not testable at this scale"]
Reading = Literal["both", "decisive", "other"]
Relation = Literal["below", "above", "at most", "at least", "within"]  # within: of 0
RELATIONS: dict[Relation, Callable[[float, float], bool]] = {
    "below": operator.lt,
    "above": operator.gt,
    "at most": operator.le,
    "at least": operator.ge,
    "within": lambda value, limit: abs(value) <= limit,
}


@dataclass(frozen=True)
class Evidence:
    """What is known of a complete run: what its training left, and its diagnosis, which bears the condition's name."""

    result: RunResult
    diagnosis: Diagnosis


Seed = Mapping[str, Evidence]  # the complete runs of one seed, by condition


@dataclass(frozen=True)
class Rule:
    """What a quantity must be.

    limit: a number of this unit, or another quantity of the claim, which counts so many ``times``.
    reading: some claims read the same runs in two ways; this is the way in which the rule has to hold.
    """

    relation: Relation
    limit: "float | Quantity"
    unit: str = ""
    times: float = 1
    reading: Reading = "both"

    def holds(self, value: float, numbers: Mapping[str, float]) -> bool:
        """Whether a value obeys it. numbers: the quantities of the same seed, by label."""
        limit = numbers[self.limit.label] if isinstance(self.limit, Quantity) else self.limit
        return RELATIONS[self.relation](value, self.times * limit)

    def __str__(self) -> str:
        if isinstance(self.limit, Quantity):
            limit = f"{self.times:g} times {self.limit.label}" if self.times != 1 else self.limit.label
        else:
            limit = f"{self.limit:.0%}" if self.unit == "%" else f"{self.limit:g} {self.unit}".strip()
        return f"{self.relation} {limit}{' of 0' if self.relation == 'within' else ''}"


@dataclass(frozen=True)
class Quantity:
    """A number taken from complete runs of one seed.

    value: gives it, from the evidence of one run of each of the conditions. form: how it is printed.
    """

    label: str
    value: Callable[..., float]
    form: str = "{:.4g}"
    conditions: tuple[Condition, ...] = ()
    rules: tuple[Rule, ...] = ()

    def of(self, condition: Condition, *rules: Rule) -> "Quantity":
        """The quantity of one condition, and its rules. The label names the condition if it has a place for it."""
        return replace(self, label=self.label.format(f"`{condition}`"), conditions=(condition,), rules=rules)

    @property
    def must_be(self) -> str:
        """Its rules in English; empty if it is only given."""
        text = " and ".join(map(str, self.rules))
        return f"in the other reading: {text}" if any(rule.reading == "other" for rule in self.rules) else text


def diagnosed(label: str, value: Callable[[Measurements], float], form: str = "{:.4g}") -> Quantity:
    """A number of the diagnosis of a run."""
    return Quantity(label, lambda run: value(run.diagnosis.measured), form)


@dataclass(frozen=True)
class Claim:
    """title: the paper's statement. paper: its numbers. figure: a file beside the page. note: on how it is measured.
    other_reading: a second way to read the same runs, in words. It is told, and does not decide.

    Without quantities no run of a sweep can confirm or deny it. The note says why, with a place for the preset.
    """

    title: str
    paper: str
    figure: str
    quantities: tuple[Quantity, ...]
    note: str = ""
    other_reading: str = ""

    @property
    def conditions(self) -> list[Condition]:
        """Those whose runs are needed."""
        return list(dict.fromkeys(name for quantity in self.quantities for name in quantity.conditions))

    def holding(self, values: Mapping[int, Sequence[float]], reading: Reading) -> list[int]:
        """The seeds whose numbers obey the rules of a reading."""
        return [seed for seed, row in values.items() if self._holds(row, reading)]

    def _holds(self, row: Sequence[float], reading: Reading) -> bool:
        """A number that is not finite confirms nothing."""
        numbers = {quantity.label: value for quantity, value in zip(self.quantities, row, strict=True)}
        return all(map(math.isfinite, row)) and all(
            rule.holds(numbers[quantity.label], numbers)
            for quantity in self.quantities
            for rule in quantity.rules
            if rule.reading in ("both", reading)
        )


def judge(claim: Claim, seeds: Mapping[int, Seed], preset: str) -> dict[str, Any]:
    """The claim as it stands in claims.json, from the runs of every seed. preset: of the sweep."""
    if not claim.quantities:
        why = claim.note.format(preset=preset)
        return {"title": claim.title, "paper": claim.paper, "mark": "not testable at this scale", "why": why}
    values = {
        number: [quantity.value(*(runs[name] for name in quantity.conditions)) for quantity in claim.quantities]
        for number, runs in seeds.items()
        if all(condition in runs for condition in claim.conditions)
    }
    return judge_values(claim, values)


def judge_values(claim: Claim, values: Mapping[int, list[float]]) -> dict[str, Any]:
    """The same, where the numbers of every seed are known."""
    held = claim.holding(values, "decisive")
    judged = {
        "title": claim.title,
        "paper": claim.paper,
        "mark": mark_of(len(held), len(values)),
        "conditions": claim.conditions,
        "quantities": [quantity.label for quantity in claim.quantities],
        "rules": [quantity.must_be for quantity in claim.quantities],
        "values_by_seed": values,
        "seeds_that_hold": held,
    }
    if claim.other_reading:
        held = claim.holding(values, "other")
        judged["alternative"] = {"reading": claim.other_reading, "seeds_that_hold": held}
    return judged


def mark_of(n_held: int, n_seeds: int) -> Mark:
    """The mark of a claim whose rules hold for ``n_held`` of the seeds that have the runs."""
    if n_seeds == 0:
        return "not measured"
    return "reproduced" if n_held == n_seeds else "not reproduced"
