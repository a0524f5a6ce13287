"""What a claim of the paper is here: the runs it needs, the numbers taken from them, and a rule that they obey or not.

Thresholds come from the paper's numbers, not from any of ours. A claim is *reproduced* if its rule holds for every seed
that has all the runs it needs, and *not reproduced* if it fails for one; with no such seed it is *not measured*.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from train.evidence import Evidence

Seed = Mapping[str, Evidence]  # the complete runs of one seed, by condition
Mark = Literal["reproduced", "not reproduced", "not measured", "not testable at this scale"]

BLIND = "per-loop-rmsnorm"  # what the remedies are compared with
SCALE_CONTROLLED = {
    "per-loop-raw": ("the raw readout", (4.68, 4.55, 4.54, 4.55)),
    "per-loop-final-only": ("the final-only readout", (4.70, 4.57, 4.56, 4.55)),
    "per-loop-rmsnorm-penalty": ("the norm penalty", (4.67, 4.52, 4.51, 4.53)),
}  # condition: its name, and the paper's perplexity at K = 1..4 (129M)
BASELINE_PPL = (4.98, 4.95, 4.95, 4.97)  # BLIND
READING = (
    "final-only is read as it was trained, without the norm before loop 4: the norm's weight is trained at loop 4 "
    "only, so that this is the model that cross-entropy at every loop made. The other reading, each loop as if it were "
    "the last and so through the norm, is given beside it and does not decide; which one the paper's numbers are of is "
    "not known here"
)


@dataclass(frozen=True)
class Quantity:
    """A number of one seed. form: how it is printed."""

    label: str
    value: Callable[[Seed], float]
    form: str = "{:.4g}"


@dataclass(frozen=True)
class Alternative:
    """Another reading of the same runs, under which the rule is tried as well without deciding. holds: of the claim's
    quantities, all of them."""

    words: str
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Claim:
    """holds: of the quantities of one seed, in order; ``rule`` says the same in words. figure: of the page, a file."""

    title: str
    paper: str
    conditions: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    rule: str
    holds: Callable[..., bool]
    figure: str
    alternative: Alternative | None = None


@dataclass(frozen=True)
class Untestable:
    """A claim that no run of a sweep can confirm or deny, and why."""

    title: str
    paper: str
    why: str


@dataclass(frozen=True)
class Outcome:
    """values: [quantities] of every seed that has the runs. held: those for which the rule holds; held_otherwise: those
    for which it does with the alternative reading."""

    mark: Mark
    values: dict[int, list[float]]
    held: list[int]
    held_otherwise: list[int] = field(default_factory=list)


def judge(claim: Claim | Untestable, seeds: Mapping[int, Seed]) -> Outcome:
    """The mark of a claim, from the numbers alone. A quantity that is not finite confirms nothing."""
    if isinstance(claim, Untestable):
        return Outcome("not testable at this scale", {}, [])
    values = {
        number: [quantity.value(runs) for quantity in claim.quantities]
        for number, runs in seeds.items()
        if all(condition in runs for condition in claim.conditions)
    }

    def held(rule: Callable[..., bool]) -> list[int]:
        return [number for number, row in values.items() if all(map(math.isfinite, row)) and rule(*row)]

    confirmed = held(claim.holds)
    otherwise = held(claim.alternative.holds) if claim.alternative else []
    if not values:
        return Outcome("not measured", values, confirmed, otherwise)
    return Outcome("reproduced" if len(confirmed) == len(values) else "not reproduced", values, confirmed, otherwise)


def norm(condition: str) -> Quantity:
    """Mean of ||H_4||."""
    return Quantity(f"\\|\\|H_4\\|\\|, `{condition}`", lambda seed: seed[condition].result.state_norm, "{:,.1f}")


def ppl(condition: str) -> Quantity:
    """At K = 4."""
    return Quantity(f"PPL at K = 4, `{condition}`", lambda seed: seed[condition].result.ppl)


def exit_gap(condition: str) -> Quantity:
    """CE(K=1) - CE(K=4) of the evaluation, each loop read as the last."""
    return Quantity(f"CE(K=1) - CE(K=4), `{condition}`", lambda seed: seed[condition].result.exit_gap, "{:+.4f}")


def growth(seed: Seed, condition: str, later: int, earlier: int) -> float:
    """Mean norm after one loop (0-based) over that after another."""
    mean = seed[condition].measured.norms.mean
    return mean[later] / mean[earlier]


def which_loop(which: Callable[[Sequence[float]], float]) -> str:
    """The word for max or min over loops."""
    return "largest" if which is max else "smallest"
