"""The claims of Sharma & Vu (arXiv 2606.24898) as data, in the order of the page. claim.py judges them.

First what the claims measure, then the claims that are made for several conditions, then all of them.
"""

import math
from collections.abc import Callable

from looped.diagnose.verdict import Measurements
from train.paper.claim import Claim, Measure, OtherReading, Quantity, Untestable, diagnosed, evaluated
from train.paper.conditions import (
    BLIND,
    CONTROLLED,
    FINAL_ONLY,
    LAYER_NORM,
    LOOP_NORM,
    N_LOOPS,
    PAPER_HALTING,
    PAPER_PPL,
    PAPER_RATES,
    PENALISED,
    RAW,
    TERMINAL,
    Condition,
)
from train.paper.evidence import Evidence
from train.paper.seed_tables import first_order_error, second_order_error

TIMES = 10  # an order of magnitude, where the paper's own ratio is a thousand
BLIND_FRACTION, VISIBLE_FRACTION = 1e-6, 1e-3  # the paper's radial fractions, 1e-8 and 1e-2, are far outside
BLIND_RANGE, VISIBLE_RANGE = 0.01, 0.1  # nats over alpha in [0.1, 10]
CLAMP = 0.01  # nats; the paper's largest is 0.0055
RESPONSE = 0.01  # of the next loop to twice the state
LEVEL = 1.5  # ||H_K|| over ||H_1|| up to which the state does not build up
RELATIVE_ERROR = 0.1  # of a prediction
TERMINAL_GAP = 1.0  # nats; the paper's terminal-only exit gap is 3.98
CLOSED_GAP = 0.1  # nats; the paper's per-loop exit gaps are 0.002 to 0.032
EARLY = 1.39  # mean halting loops: midway between the paper's 1.00 and its next, 1.78
RATE_TOLERANCE = 0.2  # of a ratio of the paper
PAPER_RATIOS = [rate / PAPER_RATES[0] for rate in PAPER_RATES]

GROWN = "39,207 (44M) and 56,051 (129M)"
READING = (
    "final-only is read as it was trained, without the norm before loop 4: the norm's weight is trained at loop 4 "
    "only, so that this is the model that cross-entropy at every loop made. The other reading, each loop as if it were "
    "the last and so through the norm, is given beside it and does not decide; which one the paper's numbers are of is "
    "not known here"
)
AS_LAST = "with every loop read as the last"
CLAMP_RULE = (
    "The form that decides takes away all that the scale does after loop 1, freezing it and removing the radial part "
    "of each update; freezing alone and removing alone are given beside it"
)
FROZEN = "the scale frozen and updates whole"

NORM = evaluated("\\|\\|H_4\\|\\|, {}", lambda run: run.state_norm, "{:,.1f}")
PPL = evaluated("PPL at K = 4, {}", lambda run: run.ppl)
EXIT_GAP = evaluated("CE(K=1) - CE(K=4), {}", lambda run: run.exit_gap, "{:+.4f}")
MOST_RADIAL = diagnosed("radial fraction, largest of the loops, {}", lambda run: max(run.radial.immediate), "{:.2g}")
LEAST_RADIAL = diagnosed("radial fraction, smallest of the loops, {}", lambda run: min(run.radial.immediate), "{:.2g}")
MOST_RANGE = diagnosed("range of CE over alpha, largest of the loops, {}", lambda run: max(run.alpha.ranges), "{:.2g}")
LEAST_RANGE = diagnosed(
    "range of CE over alpha, smallest of the loops, {}", lambda run: min(run.alpha.ranges), "{:.2g}"
)
CLAMPS = (  # both parts of the clamp, each part alone, and the error of the first
    diagnosed(
        "change of CE, scale frozen and radial part removed, {}", lambda run: run.clamp.both.change[-1], "{:+.5f}"
    ),
    diagnosed("change of CE, scale frozen, {}", lambda run: run.clamp.frozen.change[-1], "{:+.5f}"),
    diagnosed("change of CE, radial part removed, {}", lambda run: run.clamp.tangential.change[-1], "{:+.5f}"),
    diagnosed("standard error of the first, {}", lambda run: run.clamp.both.error[-1], "{:.5f}"),
)


def growth(run: Measurements, later: int, earlier: int) -> float:
    """Mean norm after one loop (from 1) over that after another."""
    return run.norms.mean[later - 1] / run.norms.mean[earlier - 1]


def turn_error(loop: int) -> Measure:
    """How far the angular motion after a loop (from 1) is from its first-order prediction, relative to that."""
    return diagnosed(
        f"relative difference of s rms(u+ - u) and rms(b_perp), loop {loop}",
        lambda run: abs(run.updates.angular_times_scale[loop - 1] / run.updates.tangential[loop - 1] - 1),
        "{:.2%}",
    )


def ppl_gaps(condition: Condition, label: str, ppl: Callable[[Evidence, int], float]) -> tuple[Quantity, ...]:
    """Perplexity of the blind condition minus that of another, at every K."""

    def gap(k: int) -> Callable[[Evidence, Evidence], float]:
        return lambda blind, other: ppl(blind, k) - ppl(other, k)

    label = f"PPL of `{BLIND}` minus PPL of `{condition}`{label}"
    return tuple(Quantity(label.format(k), gap(k), "{:+.4g}", (BLIND, condition)) for k in range(1, N_LOOPS + 1))


def halting(condition: Condition, reading: str = "") -> Measure:
    return diagnosed(
        f"mean halting loops, {{}}{reading} (the paper: {PAPER_HALTING[condition]:.2f})",
        lambda run: (run.halting.as_last if reading == ", as last" else run.halting.as_trained).loops,
        "{:.2f}",
    )


def rate_ratio(k: int) -> Measure:
    return evaluated(
        f"tokens/s at K = {k} over K = 1 (the paper: {PAPER_RATIOS[k - 1]:.3f})",
        lambda run: run.at(k, "tokens_per_second") / run.at(1, "tokens_per_second"),
        "{:.3f}",
    )


def kept_small(title: str, paper: str, condition: Condition) -> Claim:
    return Claim(
        title,
        paper,
        (NORM.of(BLIND), NORM.of(condition)),
        f"the first norm is at least {TIMES} times the second",
        lambda free, held: free >= TIMES * held,
        "exit_gap.png",
    )


def better_at_4(condition: Condition) -> Claim:
    return Claim(
        f"At K = 4, {CONTROLLED[condition]} has a lower perplexity than RMSNorm at every loop",
        f"{PAPER_PPL[condition][3]} against {PAPER_PPL[BLIND][3]} (129M)",
        (PPL.of(BLIND), PPL.of(condition)),
        "the second perplexity is below the first",
        lambda free, held: held < free,
        "depth.png",
    )


def better_at_all(condition: Condition) -> Claim:
    gaps = [free - held for free, held in zip(PAPER_PPL[BLIND], PAPER_PPL[condition], strict=True)]
    read_as_last = lambda run, k: run.result.at(k, "ppl")  # noqa: E731
    quantities, rule, other = ppl_gaps(condition, ", K = {}", read_as_last), "all four differences are above 0", None
    if condition == FINAL_ONLY:
        read_as_trained = lambda run, k: math.exp(run.measured.depth.as_trained[k - 1])  # noqa: E731
        as_trained = ppl_gaps(condition, ", as trained, K = {} (tokens of the diagnosis)", read_as_trained)
        quantities = as_trained + ppl_gaps(condition, ", as last, K = {}", read_as_last)
        rule = f"the four differences as trained are above 0; {READING}"
        other = OtherReading(AS_LAST, lambda *gaps: min(gaps[4:]) > 0)
    return Claim(
        f"At every K = 1..4, and so at equal throughput, {CONTROLLED[condition]} has a lower perplexity than RMSNorm "
        "at every loop",
        f"{' / '.join(f'{gap:.2f}' for gap in gaps)} PPL lower (129M)",
        quantities,
        rule,
        lambda *gaps: min(gaps[:4]) > 0,
        "depth.png",
        other,
    )


def within(bound: float, *values: float) -> bool:
    return max(map(abs, values)) <= bound


CLAIMS: tuple[Claim | Untestable, ...] = (
    kept_small(
        "Under per-loop cross-entropy with an RMSNorm readout the state grows; the raw readout keeps it small",
        f"{GROWN} against tens",
        RAW,
    ),
    kept_small(
        "Under per-loop cross-entropy with an RMSNorm readout the state grows; the norm penalty keeps it small",
        f"{GROWN} against 17-22",
        PENALISED,
    ),
    *(claim(condition) for condition in CONTROLLED for claim in (better_at_4, better_at_all)),
    Claim(
        "With an RMSNorm readout, cross-entropy at the last loop alone gives a lower perplexity at K = 4 than at every "
        "loop",
        "5.40 against 6.04 (44M), 4.88 against 5.35 (129M)",
        (PPL.of(TERMINAL), PPL.of(BLIND)),
        "the first perplexity is below the second",
        lambda once, always: once < always,
        "depth.png",
    ),
    Claim(
        "Trained at the last loop alone, a model is of no use at K = 1",
        "CE 5.52 at K = 1 against 1.54 at K = 4: a gap of 3.98 nats",
        (
            evaluated("CE at K = 1", lambda run: run.at(1, "ce")).of(TERMINAL),
            evaluated("CE at K = 4", lambda run: run.at(4, "ce")).of(TERMINAL),
            EXIT_GAP.of(TERMINAL),
        ),
        f"the gap is at least {TERMINAL_GAP:g} nat",
        lambda first, last, gap: gap >= TERMINAL_GAP,
        "exit_gap.png",
    ),
    Claim(
        "Cross-entropy at every loop closes the exit gap",
        "0.002 (RMSNorm), 0.028 (raw), 0.032 (final-only), 0.030 (penalty) nats (129M, from its perplexities)",
        (
            *(EXIT_GAP.of(condition) for condition in (BLIND, RAW, PENALISED)),
            diagnosed(
                "CE(K=1) - CE(K=4), {}, as trained (tokens of the diagnosis)",
                lambda run: run.depth.as_trained[0] - run.depth.as_trained[-1],
                "{:+.4f}",
            ).of(FINAL_ONLY),
            evaluated("CE(K=1) - CE(K=4), {}, as last", lambda run: run.exit_gap, "{:+.4f}").of(FINAL_ONLY),
        ),
        f"the first four gaps are within {CLOSED_GAP:g} nats of 0; {READING}",
        lambda *gaps: within(CLOSED_GAP, *gaps[:4]),
        "exit_gap.png",
        OtherReading(AS_LAST, lambda *gaps: within(CLOSED_GAP, *gaps[:3], gaps[4])),
    ),
    Claim(
        "The immediate cross-entropy gradient is tangential under RMSNorm, and not under a raw readout",
        "radial fraction about 1e-8 normalised, about 1e-2 raw",
        (MOST_RADIAL.of(BLIND), LEAST_RADIAL.of(RAW)),
        f"the first is below {BLIND_FRACTION:g}, the second above {VISIBLE_FRACTION:g}",
        lambda normalised, visible: normalised < BLIND_FRACTION and visible > VISIBLE_FRACTION,
        "radial.png",
    ),
    Claim(
        "Scaling the state by alpha in [0.1, 10] before the readout changes nothing under RMSNorm, and much under a "
        "raw readout",
        "flat under RMSNorm, not under raw (its Figures 5 and 6)",
        (MOST_RANGE.of(BLIND), LEAST_RANGE.of(RAW)),
        f"the first is below {BLIND_RANGE:g} nats, the second above {VISIBLE_RANGE:g}",
        lambda normalised, visible: normalised < BLIND_RANGE and visible > VISIBLE_RANGE,
        "alpha-loops.png",
    ),
    Claim(
        "A LayerNorm readout is blind to the scale as well",
        "scale-invariant, as RMSNorm",
        (MOST_RADIAL.of(LAYER_NORM), MOST_RANGE.of(LAYER_NORM), NORM.of(LAYER_NORM)),
        f"the radial fraction is below {BLIND_FRACTION:g} and the range below {BLIND_RANGE:g} nats",
        lambda fraction, spread, norm: fraction < BLIND_FRACTION and spread < BLIND_RANGE,
        "radial.png",
    ),
    Claim(
        "A recurrence that normalises the state between loops keeps the scale from building up",
        "the scale is removed at every loop",
        (
            diagnosed(
                "response of the next loop to twice the state, largest of the loops",
                lambda run: max(run.response),
                "{:.2g}",
            ).of(LOOP_NORM),
            diagnosed("\\|\\|H_4\\|\\| over \\|\\|H_1\\|\\|", lambda run: growth(run, 4, 1)).of(LOOP_NORM),
            NORM.of(LOOP_NORM),
        ),
        f"the response is at most {RESPONSE:g} and the ratio at most {LEVEL:g}",
        lambda response, growth, norm: response <= RESPONSE and growth <= LEVEL,
        "norms.png",
    ),
    Claim(
        "The loops make no use of the scale that RMSNorm leaves free: the radial clamp costs next to nothing",
        "+0.0004 to +0.0055 nats",
        tuple(measure.of(BLIND) for measure in CLAMPS),
        f"the first change is within {CLAMP:g} nats of 0. {CLAMP_RULE}",
        lambda both, frozen, tangential, error: within(CLAMP, both),
        "clamp.png",
        OtherReading(FROZEN, lambda both, frozen, tangential, error: within(CLAMP, frozen)),
    ),
    Claim(
        "The radial clamp costs next to nothing where the scale is controlled, too",
        "+0.0004 to +0.0055 nats",
        tuple(measure.of(condition) for condition in CONTROLLED for measure in CLAMPS),
        f"under both, all three changes are within {CLAMP:g} nats of 0. {CLAMP_RULE}",
        lambda *changes: within(CLAMP, *changes[::4]),
        "clamp.png",
        OtherReading(FROZEN, lambda *changes: within(CLAMP, *changes[1::4])),
    ),
    Claim(
        "The radial part of an update predicts the increment of the scale, better with the second-order term",
        "s+ = s + a + rms(b_perp)^2 / (2 s) + O(s^-2) (no number)",
        (
            diagnosed("relative error to first order", first_order_error, "{:.2%}").of(BLIND),
            diagnosed("relative error to second order", second_order_error, "{:.2%}").of(BLIND),
        ),
        f"the second is below {RELATIVE_ERROR:.0%} and below the first (29 updates, `{BLIND}`)",
        lambda first, second: second < RELATIVE_ERROR and second < first,
        "updates.png",
    ),
    Claim(
        "The direction turns by the tangential part over the scale, and so ever less as the scale grows",
        "u+ = u + b_perp / s + O(s^-2) (no number)",
        (
            turn_error(1).of(BLIND),
            turn_error(29).of(BLIND),
            diagnosed("rms(u+ - u) after loop 1", lambda run: run.updates.angular[0]).of(BLIND),
            diagnosed("rms(u+ - u) after loop 29", lambda run: run.updates.angular[28]).of(BLIND),
        ),
        f"after loop 29 the difference is below {RELATIVE_ERROR:.0%} and below that after loop 1, and the turn is "
        "smaller",
        lambda early, late, first, last: late < RELATIVE_ERROR and late < early and last < first,
        "updates.png",
    ),
    Claim(
        "Beyond the trained depth, the scale that RMSNorm leaves free goes on growing, to 30 loops",
        "dynamics over 30 loops (no number)",
        (
            diagnosed("\\|\\|H_30\\|\\| over \\|\\|H_4\\|\\|", lambda run: growth(run, 30, 4)).of(BLIND),
            diagnosed(
                "smallest \\|\\|H_k+1\\|\\| over \\|\\|H_k\\|\\|, k = 4..29",
                lambda run: min(growth(run, k + 1, k) for k in range(4, 30)),
            ).of(BLIND),
        ),
        "no loop after the fourth shrinks the mean norm: the second ratio is above 1",
        lambda whole, smallest: smallest > 1,
        "norms.png",
    ),
    # Conditions that a sweep trains and for which the paper gives no norm of its own.
    kept_small(
        "Cross-entropy at the last loop alone with a raw readout keeps the state small",
        f"{GROWN} under per-loop RMSNorm; raw readouts stay in the tens",
        "terminal-raw",
    ),
    kept_small(
        "Cross-entropy at the last loop alone with the norm penalty keeps the state small",
        f"{GROWN} under per-loop RMSNorm; the penalty keeps 17-22",
        "terminal-rmsnorm-penalty",
    ),
    kept_small(
        "The final-only readout keeps the state small",
        f"{GROWN} under per-loop RMSNorm; no number for final-only",
        FINAL_ONLY,
    ),
    Claim(
        "Through later loops the whole gradient of the loss is radial before the last loop, also under RMSNorm, and "
        "not at it",
        "its Table 3 has the whole gradient beside the immediate one (no number here)",
        (
            diagnosed(
                "radial fraction of the whole gradient, smallest of loops 1 to 3, {}",
                lambda run: min(run.radial.total[:-1]),
                "{:.2g}",
            ).of(BLIND),
            diagnosed(
                "radial fraction of the whole gradient, loop 4, {}", lambda run: run.radial.total[-1], "{:.2g}"
            ).of(BLIND),
        ),
        f"the first is above {VISIBLE_FRACTION:g}, the second below {BLIND_FRACTION:g}, as for the immediate gradient",
        lambda before, last: before > VISIBLE_FRACTION and last < BLIND_FRACTION,
        "radial.png",
    ),
    Claim(
        "Calibrated halting stops after one loop under RMSNorm, later where the scale is controlled",
        "1.00 (RMSNorm), 2.16 (raw), 1.78 (final-only), 2.60 (penalty) mean loops",
        (
            halting(BLIND).of(BLIND),
            halting(RAW).of(RAW),
            halting(FINAL_ONLY, ", as trained").of(FINAL_ONLY),
            halting(PENALISED).of(PENALISED),
            halting(FINAL_ONLY, ", as last").of(FINAL_ONLY),
        ),
        f"the first number is below {EARLY}, midway between the paper's 1.00 and 1.78, and the next three are not. "
        "Tokens stop by the margin of their own logits, so the rule is causal (a score averaged over the sequence is "
        "not); the states of those that have stopped are still computed, for later tokens attend to them. The "
        "threshold is calibrated on one half of the windows, at 1% of perplexity, and the loops are those of the other "
        f"half; {READING}",
        lambda blind, raw, final_only, penalty, as_last: blind < EARLY <= min(raw, final_only, penalty),
        "halting.png",
        OtherReading(AS_LAST, lambda blind, raw, _, penalty, as_last: blind < EARLY <= min(raw, as_last, penalty)),
    ),
    Claim(
        "Throughput falls nearly as 1/K",
        f"{' / '.join(f'{rate // 1000}k' for rate in PAPER_RATES)} tokens/s at K = 1..4 (129M, on a GPU that it does "
        "not name)",
        tuple(rate_ratio(k).of(BLIND) for k in (2, 3, 4)),
        f"each ratio is within {RATE_TOLERANCE:.0%} of the paper's. Ratios, since tokens/s themselves are the "
        f"machine's; forward pass and the last state's logits, `{BLIND}`. The logits are paid once whatever K is, and "
        "are a larger part of a small model, whose ratios lie higher for that alone",
        lambda *ratios: within(
            RATE_TOLERANCE, *(ours / theirs - 1 for ours, theirs in zip(ratios, PAPER_RATIOS[1:], strict=True))
        ),
        "depth.png",
    ),
    Untestable(
        "The same blindness in Ouro 1.4B",
        "radial fractions and dynamics of a pretrained model at K = 4",
        "It needs the pretrained weights (1.4 billion parameters, blocks with norms after attention and MLP, which are "
        "not built here), its tokenizer and FineWeb; a model of preset {preset}, trained from nothing by a sweep, "
        "stands for none of them.",
    ),
)
