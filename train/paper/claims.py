"""The claims of Sharma & Vu (arXiv 2606.24898) as data, in the order of the page. claim.py judges them.

First the thresholds and what is measured, then the claims that are made of several conditions, then all of them.
"""

import math
from dataclasses import replace

from train.paper.claim import Claim, Evidence, Quantity, Reading, Rule, diagnosed
from train.paper.conditions import (
    BLIND,
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
    TERMINAL_PENALISED,
    TERMINAL_RAW,
    Condition,
)  # fmt: skip
from train.paper.seed_tables import first_order_error, second_order_error

TIMES = 10  # an order of magnitude, where the paper's own ratio is a thousand
BLIND_FRACTION, VISIBLE_FRACTION = 1e-6, 1e-3  # the paper's radial fractions, 1e-8 and 1e-2, are far outside
BLIND_RANGE, VISIBLE_RANGE = 0.01, 0.1  # nats over alpha in [0.1, 10]
CLAMPED = 0.01  # nats; the paper's largest is 0.0055
NO_RESPONSE = 0.01  # of the next loop to twice the state
LEVEL = 1.5  # ||H_K|| over ||H_1|| up to which the state does not build up
RELATIVE_ERROR = 0.1  # of a prediction
TERMINAL_GAP = 1.0  # nats; the paper's terminal-only exit gap is 3.98
CLOSED_GAP = 0.1  # nats; the paper's per-loop exit gaps are 0.002 to 0.032
EARLY = 1.39  # mean halting loops: midway between the paper's 1.00 and its next, 1.78
RATE_TOLERANCE = 0.2  # of a ratio of the paper

CONTROLLED: dict[Condition, str] = {
    RAW: "the raw readout",
    FINAL_ONLY: "the final-only readout",
    PENALISED: "the norm penalty",
}
GROWN = "39,207 (44M) and 56,051 (129M)"
FREE = f"{GROWN} under per-loop RMSNorm"
READING = (
    "Final-only is read as it was trained, without the norm before loop 4: the norm's weight is trained at loop 4 "
    "only, so that this is the model that cross-entropy at every loop made. The other reading, each loop as if it were "
    "the last and so through the norm, is given beside it and does not decide; which one the paper's numbers are of is "
    "not known here"
)
AS_LAST = "with every loop read as the last"
WHAT_CLAMPS = (
    "The form that decides takes away all that the scale does after loop 1, freezing it and removing the radial part "
    "of each update; freezing alone and removing alone are given beside it"
)
FROZEN = "the scale frozen and updates whole"

NORM = Quantity("\\|\\|H_4\\|\\|, {}", lambda run: run.result.state_norm, "{:,.1f}")
PPL = Quantity("PPL at K = 4, {}", lambda run: run.result.ppl)
CE_AT_1 = Quantity("CE at K = 1", lambda run: run.result.at(1, "ce"))
CE_AT_4 = Quantity("CE at K = 4", lambda run: run.result.at(4, "ce"))
EXIT_GAP = Quantity("CE(K=1) - CE(K=4), {}", lambda run: run.result.exit_gap, "{:+.4f}")
EXIT_GAP_AS_LAST = replace(EXIT_GAP, label=f"{EXIT_GAP.label}, as last")
EXIT_GAP_AS_TRAINED = diagnosed(
    f"{EXIT_GAP.label}, as trained (tokens of the diagnosis)",
    lambda run: run.depth.as_trained[0] - run.depth.as_trained[-1],
    "{:+.4f}",
)
MOST_RADIAL = diagnosed("radial fraction, largest of the loops, {}", lambda run: max(run.radial.immediate), "{:.2g}")
LEAST_RADIAL = diagnosed("radial fraction, smallest of the loops, {}", lambda run: min(run.radial.immediate), "{:.2g}")
MOST_RANGE = diagnosed("range of CE over alpha, largest of the loops, {}", lambda run: max(run.alpha.ranges), "{:.2g}")
LEAST_RANGE = diagnosed(
    "range of CE over alpha, smallest of the loops, {}", lambda run: min(run.alpha.ranges), "{:.2g}"
)
WHOLE_BEFORE = diagnosed(
    "radial fraction of the whole gradient, smallest of loops 1 to 3, {}",
    lambda run: min(run.radial.total[:-1]),
    "{:.2g}",
)
WHOLE_AT_4 = diagnosed("radial fraction of the whole gradient, loop 4, {}", lambda run: run.radial.total[-1], "{:.2g}")
CLAMP = diagnosed(
    "change of CE, scale frozen and radial part removed, {}", lambda run: run.clamp.both.change[-1], "{:+.5f}"
)
FREEZE = diagnosed("change of CE, scale frozen, {}", lambda run: run.clamp.frozen.change[-1], "{:+.5f}")
REMOVAL = diagnosed("change of CE, radial part removed, {}", lambda run: run.clamp.tangential.change[-1], "{:+.5f}")
CLAMP_ERROR = diagnosed("standard error of the first, {}", lambda run: run.clamp.both.error[-1], "{:.5f}")
RESPONSE = diagnosed(
    "response of the next loop to twice the state, largest of the loops", lambda run: max(run.response), "{:.2g}"
)
GROWTH_TO_4 = diagnosed("\\|\\|H_4\\|\\| over \\|\\|H_1\\|\\|", lambda run: run.norms.mean[3] / run.norms.mean[0])
GROWTH_TO_30 = diagnosed("\\|\\|H_30\\|\\| over \\|\\|H_4\\|\\|", lambda run: run.norms.mean[29] / run.norms.mean[3])
LEAST_GROWTH = diagnosed(
    "smallest \\|\\|H_k+1\\|\\| over \\|\\|H_k\\|\\|, k = 4..29",
    lambda run: min(run.norms.mean[k] / run.norms.mean[k - 1] for k in range(4, 30)),
)
FIRST_ORDER = diagnosed("relative error to first order", first_order_error, "{:.2%}").of(BLIND)
SECOND_ORDER = diagnosed("relative error to second order", second_order_error, "{:.2%}")


def turn_error(loop: int) -> Quantity:
    """How far the angular motion after a loop (from 1) is from its first-order prediction, relative to that."""
    return diagnosed(
        f"relative difference of s rms(u+ - u) and rms(b_perp), loop {loop}",
        lambda run: abs(run.updates.angular_times_scale[loop - 1] / run.updates.tangential[loop - 1] - 1),
        "{:.2%}",
    )


def turn(loop: int) -> Quantity:
    return diagnosed(f"rms(u+ - u) after loop {loop}", lambda run: run.updates.angular[loop - 1])


def halting(condition: Condition, rule: Rule, where: str = "") -> Quantity:
    return diagnosed(
        f"mean halting loops, {{}}{where} (the paper: {PAPER_HALTING[condition]:.2f})",
        lambda run: (run.halting.as_last if rule.reading == "other" else run.halting.as_trained).loops,
        "{:.2f}",
    ).of(condition, rule)


def rate_ratio(k: int) -> Quantity:
    expected = PAPER_RATES[k - 1] / PAPER_RATES[0]
    ratio = Quantity(
        f"tokens/s at K = {k} over K = 1 (the paper: {expected:.3f})",
        lambda run: run.result.at(k, "tokens_per_second") / run.result.at(1, "tokens_per_second"),
        "{:.3f}",
    )
    low, high = (expected * (1 + sign * RATE_TOLERANCE) for sign in (-1, 1))
    return ratio.of(BLIND, Rule("at least", low), Rule("at most", high))


def ppl_gap(condition: Condition, k: int, where: str = "K = {}", reading: Reading = "both") -> Quantity:
    """Perplexity of the blind condition minus that of another after K = k loops. ``where`` says so in the label.

    Where the reading decides, loops are read as they were trained; otherwise as if each were the last.
    """

    def ppl(run: Evidence) -> float:
        if reading == "decisive":
            return math.exp(run.diagnosis.measured.depth.as_trained[k - 1])
        return run.result.at(k, "ppl")

    label = f"PPL of `{BLIND}` minus PPL of `{condition}`, {where.format(k)}"
    rules = (Rule("above", 0, reading=reading),)
    return Quantity(label, lambda blind, other: ppl(blind) - ppl(other), "{:+.4g}", (BLIND, condition), rules)


def claim(title: str, paper: str, figure: str, *quantities: Quantity, note: str = "", other_reading: str = "") -> Claim:
    return Claim(title, paper, figure, quantities, note, other_reading)


def kept_small(title: str, paper: str, condition: Condition) -> Claim:
    small = NORM.of(condition)
    return claim(title, paper, "exit_gap.png", NORM.of(BLIND, Rule("at least", small, times=TIMES)), small)


def better_at_4(condition: Condition) -> Claim:
    return claim(
        f"At K = 4, {CONTROLLED[condition]} has a lower perplexity than RMSNorm at every loop",
        f"{PAPER_PPL[condition][3]} against {PAPER_PPL[BLIND][3]} (129M)",
        "depth.png",
        PPL.of(BLIND),
        PPL.of(condition, Rule("below", PPL.of(BLIND))),
    )


def better_at_all(condition: Condition) -> Claim:
    loops = range(1, N_LOOPS + 1)
    gaps = [free - held for free, held in zip(PAPER_PPL[BLIND], PAPER_PPL[condition], strict=True)]
    quantities, note, other_reading = [ppl_gap(condition, k) for k in loops], "", ""
    if condition == FINAL_ONLY:
        note, other_reading = READING, AS_LAST
        quantities = [ppl_gap(condition, k, "as trained, K = {} (tokens of the diagnosis)", "decisive") for k in loops]
        quantities += [ppl_gap(condition, k, "as last, K = {}", "other") for k in loops]
    return claim(
        f"At every K = 1..4, and so at equal throughput, {CONTROLLED[condition]} has a lower perplexity than RMSNorm "
        "at every loop",
        f"{' / '.join(f'{gap:.2f}' for gap in gaps)} PPL lower (129M)",
        "depth.png",
        *quantities,
        note=note,
        other_reading=other_reading,
    )


def clamp(title: str, *conditions: Condition) -> Claim:
    quantities = [
        quantity
        for condition in conditions
        for quantity in (
            CLAMP.of(condition, Rule("within", CLAMPED, "nats", reading="decisive")),
            FREEZE.of(condition, Rule("within", CLAMPED, "nats", reading="other")),
            REMOVAL.of(condition),
            CLAMP_ERROR.of(condition),
        )
    ]
    paper = "+0.0004 to +0.0055 nats"
    return claim(title, paper, "clamp.png", *quantities, note=WHAT_CLAMPS, other_reading=FROZEN)


CLAIMS: tuple[Claim, ...] = (
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
    *(better(condition) for condition in CONTROLLED for better in (better_at_4, better_at_all)),
    claim(
        "With an RMSNorm readout, cross-entropy at the last loop alone gives a lower perplexity at K = 4 than at every "
        "loop",
        "5.40 against 6.04 (44M), 4.88 against 5.35 (129M)",
        "depth.png",
        PPL.of(TERMINAL, Rule("below", PPL.of(BLIND))),
        PPL.of(BLIND),
    ),
    claim(
        "Trained at the last loop alone, a model is of no use at K = 1",
        "CE 5.52 at K = 1 against 1.54 at K = 4: a gap of 3.98 nats",
        "exit_gap.png",
        CE_AT_1.of(TERMINAL),
        CE_AT_4.of(TERMINAL),
        EXIT_GAP.of(TERMINAL, Rule("at least", TERMINAL_GAP, "nat")),
    ),
    claim(
        "Cross-entropy at every loop closes the exit gap",
        "0.002 (RMSNorm), 0.028 (raw), 0.032 (final-only), 0.030 (penalty) nats (129M, from its perplexities)",
        "exit_gap.png",
        *(EXIT_GAP.of(condition, Rule("within", CLOSED_GAP, "nats")) for condition in (BLIND, RAW, PENALISED)),
        EXIT_GAP_AS_TRAINED.of(FINAL_ONLY, Rule("within", CLOSED_GAP, "nats", reading="decisive")),
        EXIT_GAP_AS_LAST.of(FINAL_ONLY, Rule("within", CLOSED_GAP, "nats", reading="other")),
        note=READING,
        other_reading=AS_LAST,
    ),
    claim(
        "The immediate cross-entropy gradient is tangential under RMSNorm, and not under a raw readout",
        "radial fraction about 1e-8 normalised, about 1e-2 raw",
        "radial.png",
        MOST_RADIAL.of(BLIND, Rule("below", BLIND_FRACTION)),
        LEAST_RADIAL.of(RAW, Rule("above", VISIBLE_FRACTION)),
    ),
    claim(
        "Scaling the state by alpha in [0.1, 10] before the readout changes nothing under RMSNorm, and much under a "
        "raw readout",
        "flat under RMSNorm, not under raw (its Figures 5 and 6)",
        "alpha-loops.png",
        MOST_RANGE.of(BLIND, Rule("below", BLIND_RANGE, "nats")),
        LEAST_RANGE.of(RAW, Rule("above", VISIBLE_RANGE, "nats")),
    ),
    claim(
        "A LayerNorm readout is blind to the scale as well",
        "scale-invariant, as RMSNorm",
        "radial.png",
        MOST_RADIAL.of(LAYER_NORM, Rule("below", BLIND_FRACTION)),
        MOST_RANGE.of(LAYER_NORM, Rule("below", BLIND_RANGE, "nats")),
        NORM.of(LAYER_NORM),
    ),
    claim(
        "A recurrence that normalises the state between loops keeps the scale from building up",
        "the scale is removed at every loop",
        "norms.png",
        RESPONSE.of(LOOP_NORM, Rule("at most", NO_RESPONSE)),
        GROWTH_TO_4.of(LOOP_NORM, Rule("at most", LEVEL)),
        NORM.of(LOOP_NORM),
    ),
    clamp("The loops make no use of the scale that RMSNorm leaves free: the radial clamp costs next to nothing", BLIND),
    clamp("The radial clamp costs next to nothing where the scale is controlled, too", *CONTROLLED),
    claim(
        "The radial part of an update predicts the increment of the scale, better with the second-order term",
        "s+ = s + a + rms(b_perp)^2 / (2 s) + O(s^-2) (no number)",
        "updates.png",
        FIRST_ORDER,
        SECOND_ORDER.of(BLIND, Rule("below", RELATIVE_ERROR, "%"), Rule("below", FIRST_ORDER)),
        note=f"29 updates, `{BLIND}`",
    ),
    claim(
        "The direction turns by the tangential part over the scale, and so ever less as the scale grows",
        "u+ = u + b_perp / s + O(s^-2) (no number)",
        "updates.png",
        turn_error(1).of(BLIND),
        turn_error(29).of(BLIND, Rule("below", RELATIVE_ERROR, "%"), Rule("below", turn_error(1))),
        turn(1).of(BLIND),
        turn(29).of(BLIND, Rule("below", turn(1))),
    ),
    claim(
        "Beyond the trained depth, the scale that RMSNorm leaves free goes on growing, to 30 loops",
        "dynamics over 30 loops (no number)",
        "norms.png",
        GROWTH_TO_30.of(BLIND),
        LEAST_GROWTH.of(BLIND, Rule("above", 1)),
    ),
    # Conditions that a sweep trains and for which the paper gives no norm of its own.
    kept_small(
        "Cross-entropy at the last loop alone with a raw readout keeps the state small",
        f"{FREE}; raw readouts stay in the tens",
        TERMINAL_RAW,
    ),
    kept_small(
        "Cross-entropy at the last loop alone with the norm penalty keeps the state small",
        f"{FREE}; the penalty keeps 17-22",
        TERMINAL_PENALISED,
    ),
    kept_small("The final-only readout keeps the state small", f"{FREE}; no number for final-only", FINAL_ONLY),
    claim(
        "Through later loops the whole gradient of the loss is radial before the last loop, also under RMSNorm, and "
        "not at it",
        "its Table 3 has the whole gradient beside the immediate one (no number here)",
        "radial.png",
        WHOLE_BEFORE.of(BLIND, Rule("above", VISIBLE_FRACTION)),
        WHOLE_AT_4.of(BLIND, Rule("below", BLIND_FRACTION)),
        note="The thresholds are those of the immediate gradient",
    ),
    claim(
        "Calibrated halting stops after one loop under RMSNorm, later where the scale is controlled",
        "1.00 (RMSNorm), 2.16 (raw), 1.78 (final-only), 2.60 (penalty) mean loops",
        "halting.png",
        halting(BLIND, Rule("below", EARLY)),
        halting(RAW, Rule("at least", EARLY)),
        halting(FINAL_ONLY, Rule("at least", EARLY, reading="decisive"), ", as trained"),
        halting(PENALISED, Rule("at least", EARLY)),
        halting(FINAL_ONLY, Rule("at least", EARLY, reading="other"), ", as last"),
        note=f"{EARLY} is midway between the paper's 1.00 and 1.78. Tokens stop by the margin of their own logits, so "
        "the rule is causal (a score averaged over the sequence is not); the states of those that have stopped are "
        "still computed, for later tokens attend to them. The threshold is calibrated on one half of the windows, at "
        f"1% of perplexity, and the loops are those of the other half. {READING}",
        other_reading=AS_LAST,
    ),
    claim(
        "Throughput falls nearly as 1/K",
        f"{' / '.join(f'{rate // 1000}k' for rate in PAPER_RATES)} tokens/s at K = 1..4 (129M, on a GPU that it does "
        "not name)",
        "depth.png",
        *(rate_ratio(k) for k in range(2, N_LOOPS + 1)),
        note=f"The limits are {RATE_TOLERANCE:.0%} from the paper's ratios. Ratios, since tokens/s themselves are the "
        f"machine's; forward pass and the last state's logits, `{BLIND}`. The logits are paid once whatever K is, and "
        "are a larger part of a small model, whose ratios lie higher for that alone",
    ),
    claim(
        "The same blindness in Ouro 1.4B",
        "radial fractions and dynamics of a pretrained model at K = 4",
        "",
        note="It needs the pretrained weights (1.4 billion parameters, blocks with norms after attention and MLP, "
        "which are not built here), its tokenizer and FineWeb; a model of preset {preset}, trained from nothing by a "
        "sweep, stands for none of them.",
    ),
)
