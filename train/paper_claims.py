"""The claims of Sharma & Vu (arXiv 2606.24898), each with the rule by which a seed's runs confirm it.

The thresholds come from the paper's numbers, not from any of ours. A claim is *reproduced* if its rule holds for every
seed that has all the runs it needs, and *not reproduced* if it fails for one; with no such seed it is *not measured*.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from train.evidence import Evidence

Seed = Mapping[str, Evidence]  # the complete runs of one seed, by condition
Mark = Literal["reproduced", "not reproduced", "not measured", "not testable at this scale"]

TIMES = 10  # an order of magnitude, where the paper's own ratio is a thousand
TERMINAL_GAP = 1.0  # nats; the paper's terminal-only exit gap is 3.98
CLOSED_GAP = 0.1  # nats; the paper's per-loop exit gaps are 0.002 to 0.032
BLIND_FRACTION, VISIBLE_FRACTION = 1e-6, 1e-3  # the paper's radial fractions, 1e-8 and 1e-2, are far outside
BLIND_RANGE, VISIBLE_RANGE = 0.01, 0.1  # nats over alpha in [0.1, 10]
CLAMP = 0.01  # nats; the paper's largest is 0.0055
RESPONSE = 0.01  # of the next loop to twice the state
LEVEL = 1.5  # ||H_K|| over ||H_1|| up to which the state does not build up
RELATIVE_ERROR = 0.1  # of a prediction

SCALE_CONTROLLED = {
    "per-loop-raw": ("the raw readout", (4.68, 4.55, 4.54, 4.55)),
    "per-loop-final-only": ("the final-only readout", (4.70, 4.57, 4.56, 4.55)),
    "per-loop-rmsnorm-penalty": ("the norm penalty", (4.67, 4.52, 4.51, 4.53)),
}  # condition: its name, and the paper's perplexity at K = 1..4 (129M)
BASELINE_PPL = (4.98, 4.95, 4.95, 4.97)  # per-loop-rmsnorm


@dataclass(frozen=True)
class Quantity:
    """A number of one seed. form: how it is printed."""

    label: str
    value: Callable[[Seed], float]
    form: str = "{:.4g}"


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


@dataclass(frozen=True)
class Untestable:
    """A claim that no run of a sweep can confirm or deny, and why."""

    title: str
    paper: str
    why: str


@dataclass(frozen=True)
class Outcome:
    """values: [quantities] of every seed that has the runs. held: those for which the rule holds."""

    mark: Mark
    values: dict[int, list[float]]
    held: list[int]


def judge(claim: Claim | Untestable, seeds: Mapping[int, Seed]) -> Outcome:
    """The mark of a claim, from the numbers alone. A quantity that is not finite confirms nothing."""
    if isinstance(claim, Untestable):
        return Outcome("not testable at this scale", {}, [])
    values = {
        number: [quantity.value(runs) for quantity in claim.quantities]
        for number, runs in seeds.items()
        if all(condition in runs for condition in claim.conditions)
    }
    held = [number for number, row in values.items() if all(map(math.isfinite, row)) and claim.holds(*row)]
    if not values:
        return Outcome("not measured", values, held)
    return Outcome("reproduced" if len(held) == len(values) else "not reproduced", values, held)


def _norm(condition: str) -> Quantity:
    return Quantity(f"\\|\\|H_4\\|\\|, `{condition}`", lambda seed: seed[condition].result.state_norm, "{:,.1f}")


def _ppl(condition: str) -> Quantity:
    return Quantity(f"PPL at K = 4, `{condition}`", lambda seed: seed[condition].result.ppl)


def _exit_gap(condition: str) -> Quantity:
    return Quantity(f"CE(K=1) - CE(K=4), `{condition}`", lambda seed: seed[condition].result.exit_gap, "{:+.4f}")


def _clamp(condition: str) -> Quantity:
    return Quantity(f"change of CE, `{condition}`", lambda seed: seed[condition].measured.clamp.change, "{:+.5f}")


def _radial(condition: str, which: Callable[[Sequence[float]], float]) -> Quantity:
    return Quantity(
        f"radial fraction, {_name(which)} of the loops, `{condition}`",
        lambda seed: which(seed[condition].measured.radial.immediate),
        "{:.2g}",
    )


def _alpha(condition: str, which: Callable[[Sequence[float]], float]) -> Quantity:
    return Quantity(
        f"range of CE over alpha, {_name(which)} of the loops, `{condition}`",
        lambda seed: which(seed[condition].measured.alpha.ranges),
        "{:.2g}",
    )


def _name(which: Callable[[Sequence[float]], float]) -> str:
    return "largest" if which is max else "smallest"


def _ppl_gap(condition: str, k: int) -> Quantity:
    """PPL of per-loop-rmsnorm minus that of a condition after k loops."""

    def gap(seed: Seed) -> float:
        blind, controlled = (seed[name].result.evaluation[k - 1] for name in ("per-loop-rmsnorm", condition))
        return _ppl_of(blind) - _ppl_of(controlled)

    return Quantity(f"PPL of `per-loop-rmsnorm` minus PPL of `{condition}`, K = {k}", gap, "{:+.4g}")


def _ppl_of(row: Mapping[str, float | None]) -> float:
    return math.nan if row["ppl"] is None else row["ppl"]


def _relative_error(seed: Seed, errors: str) -> float:
    """Mean absolute error of a prediction of the scale's increments, token by token, over their mean size."""
    updates = seed["per-loop-rmsnorm"].measured.updates
    return sum(getattr(updates, errors)) / sum(map(abs, updates.increment))


def _angular_error(loop: int) -> Quantity:
    """How far the angular motion after a loop (from 1) is from its first-order prediction, relative to that."""

    def error(seed: Seed) -> float:
        updates = seed["per-loop-rmsnorm"].measured.updates
        return abs(updates.angular_times_scale[loop - 1] / updates.tangential[loop - 1] - 1)

    return Quantity(f"relative difference of s rms(u+ - u) and rms(b_perp), loop {loop}", error, "{:.2%}")


def _scale_claims() -> list[Claim]:
    blind = "per-loop-rmsnorm"
    paper = {
        "per-loop-raw": "39,207 (44M) and 56,051 (129M) against tens",
        "per-loop-rmsnorm-penalty": "39,207 (44M) and 56,051 (129M) against 17-22",
    }
    return [
        Claim(
            f"Under per-loop cross-entropy with an RMSNorm readout the state grows; {SCALE_CONTROLLED[condition][0]} "
            "keeps it small",
            numbers,
            (blind, condition),
            (_norm(blind), _norm(condition)),
            f"the first norm is at least {TIMES} times the second",
            lambda free, held: free >= TIMES * held,
            "exit_gap.png",
        )
        for condition, numbers in paper.items()
    ]


def _perplexity_claims() -> list[Claim]:
    blind = "per-loop-rmsnorm"
    claims = []
    for condition, (name, ppl) in SCALE_CONTROLLED.items():
        paper = [free - held for free, held in zip(BASELINE_PPL, ppl, strict=True)]
        claims += [
            Claim(
                f"At K = 4, {name} has a lower perplexity than RMSNorm at every loop",
                f"{ppl[3]} against {BASELINE_PPL[3]} (129M)",
                (blind, condition),
                (_ppl(blind), _ppl(condition)),
                "the second perplexity is below the first",
                lambda free, held: held < free,
                "depth.png",
            ),
            Claim(
                f"At every K = 1..4, and so at equal throughput, {name} has a lower perplexity than RMSNorm at every "
                "loop",
                f"{' / '.join(f'{gap:.2f}' for gap in paper)} PPL lower (129M)",
                (blind, condition),
                tuple(_ppl_gap(condition, k) for k in range(1, 5)),
                "all four differences are above 0",
                lambda *differences: min(differences) > 0,
                "depth.png",
            ),
        ]
    return claims


def _placement_claims() -> list[Claim]:
    terminal, per_loop = "terminal-rmsnorm", "per-loop-rmsnorm"
    conditions = (per_loop, *SCALE_CONTROLLED)
    return [
        Claim(
            "With an RMSNorm readout, cross-entropy at the last loop alone gives a lower perplexity at K = 4 than at "
            "every loop",
            "5.40 against 6.04 (44M), 4.88 against 5.35 (129M)",
            (terminal, per_loop),
            (_ppl(terminal), _ppl(per_loop)),
            "the first perplexity is below the second",
            lambda once, always: once < always,
            "depth.png",
        ),
        Claim(
            "Trained at the last loop alone, a model is of no use at K = 1",
            "CE 5.52 at K = 1 against 1.54 at K = 4: a gap of 3.98 nats",
            (terminal,),
            (
                Quantity("CE at K = 1", lambda seed: seed[terminal].result.evaluation[0]["ce"] or math.nan),
                Quantity("CE at K = 4", lambda seed: seed[terminal].result.evaluation[-1]["ce"] or math.nan),
                _exit_gap(terminal),
            ),
            f"the gap is at least {TERMINAL_GAP:g} nat",
            lambda first, last, gap: gap >= TERMINAL_GAP,
            "exit_gap.png",
        ),
        Claim(
            "Cross-entropy at every loop closes the exit gap",
            "0.002 (RMSNorm), 0.028 (raw), 0.032 (final-only), 0.030 (penalty) nats (129M, from its perplexities)",
            conditions,
            tuple(_exit_gap(condition) for condition in conditions),
            f"all four gaps are within {CLOSED_GAP:g} nats of 0",
            lambda *gaps: max(map(abs, gaps)) <= CLOSED_GAP,
            "exit_gap.png",
        ),
    ]


def _visibility_claims() -> list[Claim]:
    blind, raw, layer, removed = (
        "per-loop-rmsnorm", "per-loop-raw", "per-loop-layernorm", "per-loop-rmsnorm-loop-norm",
    )  # fmt: skip
    return [
        Claim(
            "The immediate cross-entropy gradient is tangential under RMSNorm, and not under a raw readout",
            "radial fraction about 1e-8 normalised, about 1e-2 raw",
            (blind, raw),
            (_radial(blind, max), _radial(raw, min)),
            f"the first is below {BLIND_FRACTION:g}, the second above {VISIBLE_FRACTION:g}",
            lambda normalised, visible: normalised < BLIND_FRACTION and visible > VISIBLE_FRACTION,
            "radial.png",
        ),
        Claim(
            "Scaling the state by alpha in [0.1, 10] before the readout changes nothing under RMSNorm, and much under "
            "a raw readout",
            "flat under RMSNorm, not under raw (its Figures 5 and 6)",
            (blind, raw),
            (_alpha(blind, max), _alpha(raw, min)),
            f"the first is below {BLIND_RANGE:g} nats, the second above {VISIBLE_RANGE:g}",
            lambda normalised, visible: normalised < BLIND_RANGE and visible > VISIBLE_RANGE,
            "alpha-loops.png",
        ),
        Claim(
            "A LayerNorm readout is blind to the scale as well",
            "scale-invariant, as RMSNorm",
            (layer,),
            (_radial(layer, max), _alpha(layer, max), _norm(layer)),
            f"the radial fraction is below {BLIND_FRACTION:g} and the range below {BLIND_RANGE:g} nats",
            lambda fraction, spread, norm: fraction < BLIND_FRACTION and spread < BLIND_RANGE,
            "radial.png",
        ),
        Claim(
            "A recurrence that normalises the state between loops keeps the scale from building up",
            "the scale is removed at every loop",
            (removed,),
            (
                Quantity(
                    "response of the next loop to twice the state, largest of the loops",
                    lambda seed: max(seed[removed].measured.response),
                    "{:.2g}",
                ),
                Quantity("\\|\\|H_4\\|\\| over \\|\\|H_1\\|\\|", lambda seed: _growth(seed, removed, 3, 0)),
                _norm(removed),
            ),
            f"the response is at most {RESPONSE:g} and the ratio at most {LEVEL:g}",
            lambda response, growth, norm: response <= RESPONSE and growth <= LEVEL,
            "norms.png",
        ),
    ]


def _growth(seed: Seed, condition: str, later: int, earlier: int) -> float:
    """Mean norm after one loop (0-based) over that after another."""
    mean = seed[condition].measured.norms.mean
    return mean[later] / mean[earlier]


def _dynamics_claims() -> list[Claim]:
    blind = "per-loop-rmsnorm"
    controlled = tuple(SCALE_CONTROLLED)
    return [
        Claim(
            "The loops make no use of the scale that RMSNorm leaves free: the radial clamp costs next to nothing",
            "+0.0004 to +0.0055 nats",
            (blind,),
            (_clamp(blind),),
            f"the change is within {CLAMP:g} nats of 0",
            lambda change: abs(change) <= CLAMP,
            "clamp.png",
        ),
        Claim(
            "The radial clamp costs next to nothing where the scale is controlled, too",
            "+0.0004 to +0.0055 nats",
            controlled,
            tuple(_clamp(condition) for condition in controlled),
            f"all three changes are within {CLAMP:g} nats of 0",
            lambda *changes: max(map(abs, changes)) <= CLAMP,
            "clamp.png",
        ),
        Claim(
            "The radial part of an update predicts the increment of the scale, better with the second-order term",
            "s+ = s + a + rms(b_perp)^2 / (2 s) + O(s^-2) (no number)",
            (blind,),
            (
                Quantity("relative error to first order", lambda seed: _relative_error(seed, "first_error"), "{:.2%}"),
                Quantity(
                    "relative error to second order", lambda seed: _relative_error(seed, "second_error"), "{:.2%}"
                ),
            ),
            f"the second is below {RELATIVE_ERROR:.0%} and below the first (29 updates, `{blind}`)",
            lambda first, second: second < RELATIVE_ERROR and second < first,
            "updates.png",
        ),
        Claim(
            "The direction turns by the tangential part over the scale, and so ever less as the scale grows",
            "u+ = u + b_perp / s + O(s^-2) (no number)",
            (blind,),
            (
                _angular_error(1),
                _angular_error(29),
                Quantity("rms(u+ - u) after loop 1", lambda seed: seed[blind].measured.updates.angular[0]),
                Quantity("rms(u+ - u) after loop 29", lambda seed: seed[blind].measured.updates.angular[28]),
            ),
            f"after loop 29 the difference is below {RELATIVE_ERROR:.0%} and below that after loop 1, and the turn is "
            "smaller",
            lambda early, late, first, last: late < RELATIVE_ERROR and late < early and last < first,
            "updates.png",
        ),
        Claim(
            "Beyond the trained depth, the scale that RMSNorm leaves free goes on growing, to 30 loops",
            "dynamics over 30 loops (no number)",
            (blind,),
            (
                Quantity("\\|\\|H_30\\|\\| over \\|\\|H_4\\|\\|", lambda seed: _growth(seed, blind, 29, 3)),
                Quantity(
                    "smallest \\|\\|H_k+1\\|\\| over \\|\\|H_k\\|\\|, k = 4..29",
                    lambda seed: min(_growth(seed, blind, k, k - 1) for k in range(4, 30)),
                ),
            ),
            "no loop after the fourth shrinks the mean norm: the second ratio is above 1",
            lambda whole, smallest: smallest > 1,
            "norms.png",
        ),
    ]


UNTESTABLE = (
    Untestable(
        "The same blindness in Ouro 1.4B",
        "radial fractions and dynamics of a pretrained model at K = 4",
        "It needs the pretrained weights (1.4 billion parameters, blocks with norms after attention and MLP, which "
        "are not built here), its tokenizer and FineWeb; a model trained in minutes stands for none of them.",
    ),
    Untestable(
        "Calibrated halting stops after one loop under RMSNorm, later where the scale is controlled",
        "1.00 (RMSNorm), 2.16 (raw), 1.78 (final-only), 2.60 (penalty) mean loops",
        "It needs models that stop by themselves, with a threshold calibrated on one slice of text and reported on "
        "another. Nothing in a sweep does that yet.",
    ),
    Untestable(
        "Throughput at K = 1..4",
        "80k / 41k / 28k / 21k tokens/s (129M)",
        "The paper does not name its GPU, and these runs are of a smaller model.",
    ),
)

CLAIMS: tuple[Claim | Untestable, ...] = (
    *_scale_claims(), *_perplexity_claims(), *_placement_claims(), *_visibility_claims(), *_dynamics_claims(),
    *UNTESTABLE,
)  # fmt: skip
