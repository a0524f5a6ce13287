"""The paper's claims about the scale of the state: that it grows, who sees it, how it moves, and what it is for."""

from collections.abc import Callable, Sequence

from train.claim import BLIND, SCALE_CONTROLLED, Alternative, Claim, Quantity, Seed, growth, norm, which_loop

TIMES = 10  # an order of magnitude, where the paper's own ratio is a thousand
BLIND_FRACTION, VISIBLE_FRACTION = 1e-6, 1e-3  # the paper's radial fractions, 1e-8 and 1e-2, are far outside
BLIND_RANGE, VISIBLE_RANGE = 0.01, 0.1  # nats over alpha in [0.1, 10]
CLAMP = 0.01  # nats; the paper's largest is 0.0055
RESPONSE = 0.01  # of the next loop to twice the state
LEVEL = 1.5  # ||H_K|| over ||H_1|| up to which the state does not build up
RELATIVE_ERROR = 0.1  # of a prediction
CLAMP_RULE = (
    "The form that decides takes away all that the scale does after loop 1, freezing it and removing the radial part "
    "of each update; freezing alone and removing alone are given beside it"
)


def growth_claims() -> list[Claim]:
    paper = {
        "per-loop-raw": "39,207 (44M) and 56,051 (129M) against tens",
        "per-loop-rmsnorm-penalty": "39,207 (44M) and 56,051 (129M) against 17-22",
    }
    return [
        _held_claim(
            f"Under per-loop cross-entropy with an RMSNorm readout the state grows; {SCALE_CONTROLLED[condition][0]} "
            "keeps it small",
            numbers,
            condition,
        )
        for condition, numbers in paper.items()
    ]


def remedy_claims() -> list[Claim]:
    """Conditions that a sweep trains and for which the paper gives no norm of its own."""
    grown = "39,207 (44M) and 56,051 (129M) under per-loop RMSNorm"
    remedies = {
        "terminal-raw": ("Cross-entropy at the last loop alone with a raw readout keeps the state small",
                         f"{grown}; raw readouts stay in the tens"),
        "terminal-rmsnorm-penalty": ("Cross-entropy at the last loop alone with the norm penalty keeps the state small",
                                     f"{grown}; the penalty keeps 17-22"),
        "per-loop-final-only": ("The final-only readout keeps the state small", f"{grown}; no number for final-only"),
    }  # fmt: skip
    return [_held_claim(title, numbers, condition) for condition, (title, numbers) in remedies.items()]


def _held_claim(title: str, numbers: str, condition: str) -> Claim:
    return Claim(
        title,
        numbers,
        (BLIND, condition),
        (norm(BLIND), norm(condition)),
        f"the first norm is at least {TIMES} times the second",
        lambda free, held: free >= TIMES * held,
        "exit_gap.png",
    )


def whole_gradient_claim() -> Claim:
    def total(words: str, value: Callable[[Sequence[float]], float]) -> Quantity:
        return Quantity(
            f"radial fraction of the whole gradient, {words}, `{BLIND}`",
            lambda seed: value(seed[BLIND].measured.radial.total),
            "{:.2g}",
        )

    return Claim(
        "Through later loops the whole gradient of the loss is radial before the last loop, also under RMSNorm, and "
        "not at it",
        "its Table 3 has the whole gradient beside the immediate one (no number here)",
        (BLIND,),
        (total("smallest of loops 1 to 3", lambda rows: min(rows[:-1])), total("loop 4", lambda rows: rows[-1])),
        f"the first is above {VISIBLE_FRACTION:g}, the second below {BLIND_FRACTION:g}, as for the immediate gradient",
        lambda before, last: before > VISIBLE_FRACTION and last < BLIND_FRACTION,
        "radial.png",
    )


def _radial(condition: str, which: Callable[[Sequence[float]], float]) -> Quantity:
    return Quantity(
        f"radial fraction, {which_loop(which)} of the loops, `{condition}`",
        lambda seed: which(seed[condition].measured.radial.immediate),
        "{:.2g}",
    )


def _alpha(condition: str, which: Callable[[Sequence[float]], float]) -> Quantity:
    return Quantity(
        f"range of CE over alpha, {which_loop(which)} of the loops, `{condition}`",
        lambda seed: which(seed[condition].measured.alpha.ranges),
        "{:.2g}",
    )


def _clamp(condition: str) -> tuple[Quantity, ...]:
    """Change of the cross-entropy at K = 4 under both parts of the clamp, then each part alone, then the error."""

    def change(form: str, words: str) -> Quantity:
        return Quantity(
            f"change of CE, {words}, `{condition}`",
            lambda seed: getattr(seed[condition].measured.clamp, form).change[-1],
            "{:+.5f}",
        )

    error = Quantity(
        f"standard error of the first, `{condition}`",
        lambda seed: seed[condition].measured.clamp.both.error[-1],
        "{:.5f}",
    )
    return (
        change("both", "scale frozen and radial part removed"),
        change("frozen", "scale frozen"),
        change("tangential", "radial part removed"),
        error,
    )


def _relative_error(seed: Seed, errors: str) -> float:
    """Mean absolute error of a prediction of the scale's increments, token by token, over their mean size."""
    updates = seed[BLIND].measured.updates
    return sum(getattr(updates, errors)) / sum(map(abs, updates.increment))


def _angular_error(loop: int) -> Quantity:
    """How far the angular motion after a loop (from 1) is from its first-order prediction, relative to that."""

    def error(seed: Seed) -> float:
        updates = seed[BLIND].measured.updates
        return abs(updates.angular_times_scale[loop - 1] / updates.tangential[loop - 1] - 1)

    return Quantity(f"relative difference of s rms(u+ - u) and rms(b_perp), loop {loop}", error, "{:.2%}")


def visibility_claims() -> list[Claim]:
    blind, raw, layer, removed = (
        BLIND, "per-loop-raw", "per-loop-layernorm", "per-loop-rmsnorm-loop-norm",
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
            (_radial(layer, max), _alpha(layer, max), norm(layer)),
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
                Quantity("\\|\\|H_4\\|\\| over \\|\\|H_1\\|\\|", lambda seed: growth(seed, removed, 3, 0)),
                norm(removed),
            ),
            f"the response is at most {RESPONSE:g} and the ratio at most {LEVEL:g}",
            lambda response, growth, norm: response <= RESPONSE and growth <= LEVEL,
            "norms.png",
        ),
    ]


def clamp_claims() -> list[Claim]:
    controlled = tuple(SCALE_CONTROLLED)
    words = "the scale frozen and updates whole"
    return [
        Claim(
            "The loops make no use of the scale that RMSNorm leaves free: the radial clamp costs next to nothing",
            "+0.0004 to +0.0055 nats",
            (BLIND,),
            _clamp(BLIND),
            f"the first change is within {CLAMP:g} nats of 0. {CLAMP_RULE}",
            lambda both, frozen, tangential, error: abs(both) <= CLAMP,
            "clamp.png",
            Alternative(words, lambda both, frozen, tangential, error: abs(frozen) <= CLAMP),
        ),
        Claim(
            "The radial clamp costs next to nothing where the scale is controlled, too",
            "+0.0004 to +0.0055 nats",
            controlled,
            tuple(quantity for condition in controlled for quantity in _clamp(condition)),
            f"under both, all three changes are within {CLAMP:g} nats of 0. {CLAMP_RULE}",
            lambda *changes: max(map(abs, changes[::4])) <= CLAMP,
            "clamp.png",
            Alternative(words, lambda *changes: max(map(abs, changes[1::4])) <= CLAMP),
        ),
    ]


def dynamics_claims() -> list[Claim]:
    blind = BLIND
    return [
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
                Quantity("\\|\\|H_30\\|\\| over \\|\\|H_4\\|\\|", lambda seed: growth(seed, blind, 29, 3)),
                Quantity(
                    "smallest \\|\\|H_k+1\\|\\| over \\|\\|H_k\\|\\|, k = 4..29",
                    lambda seed: min(growth(seed, blind, k, k - 1) for k in range(4, 30)),
                ),
            ),
            "no loop after the fourth shrinks the mean norm: the second ratio is above 1",
            lambda whole, smallest: smallest > 1,
            "norms.png",
        ),
    ]
