"""The measurements as tables: a section of the page for each kind, its explanation, its figures and its rows."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from looped.diagnose.diagnosis import Diagnosis
from looped.diagnose.dynamics import PERCENTILES
from looped.diagnose.interventions import ALPHAS
from looped.diagnose.skipping import NO_POLICY
from looped.diagnose.verdict import CONTROLS

Row = Sequence[str | float]  # a number is shown with four digits, a nan as "-"

SHOWN_ALPHAS = range(0, len(ALPHAS), 3)


@dataclass(frozen=True)
class Section:
    """figures: names in `FIGURES`. rows: of one model; a row has a cell for every column."""

    title: str
    explanation: str
    figures: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Callable[[Diagnosis], Iterable[Row]]


OVERVIEW_COLUMNS = (
    "model", "verdict", "K", "tokens", "||H_K||", "CE at K", "PPL at K", "bits/byte", "CE at 1",
    "CE range over alpha, K", "radial fraction, K", "clamp, nats", "halting, loops",
)  # fmt: skip


def overview_row(diagnosis: Diagnosis) -> Row:
    measured, depth, last = diagnosis.measured, diagnosis.measured.depth, diagnosis.measured.n_loops - 1
    return (
        diagnosis.name, CONTROLS[diagnosis.verdict.control], str(measured.n_loops), f"{diagnosis.n_tokens:,}",
        measured.norms.mean[last], depth.ce[last], depth.ppl[last], depth.bits_per_byte[last], depth.ce[0],
        measured.alpha.ranges[last], measured.radial.immediate[last], f"{measured.clamp.change:+.4f}",
        measured.halting.as_trained.loops,
    )  # fmt: skip


def _norm_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    norms = diagnosis.measured.norms
    return _by_loop(diagnosis, norms.mean, *zip(*norms.percentiles, strict=True), norms.entered, norms.within)


def _radial_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    return _by_loop(diagnosis, *asdict(diagnosis.measured.radial).values())


def _update_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    return _by_loop(diagnosis, diagnosis.measured.norms.scale[:-1], *asdict(diagnosis.measured.updates).values())


def _clamp_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    clamp = diagnosis.measured.clamp
    forms = [zip(form.change, form.error, strict=True) for form in clamp.forms.values()]
    changes = [[f"{change:+.5f} ± {error:.5f}" for change, error in form] for form in forms]
    return _by_loop(diagnosis, clamp.free, *changes, diagnosis.measured.response)


def _alpha_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    alpha = diagnosis.measured.alpha
    shown = [[ce[column] for ce in alpha.ce] for column in SHOWN_ALPHAS]
    return _by_loop(
        diagnosis, alpha.ranges, *shown, ["blind" if blind else "sees it" for blind in diagnosis.verdict.blind]
    )


def _depth_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    depth = diagnosis.measured.depth
    pairs = zip(depth.as_trained, depth.ce, strict=False)
    as_trained = ["the same" if trained == ce else trained for trained, ce in pairs]
    return _by_loop(diagnosis, depth.ce, as_trained, depth.ppl, depth.bits_per_byte)


def _halting_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    halting = diagnosis.measured.halting
    for reading, halt in diagnosis.measured.halting_readings.items():
        tau = "none" if halt.tau is None else halt.tau
        yield (
            reading, tau, "report", f"{halting.report_tokens:,}", halt.loops, f"{halt.ratio:.4f}", _shares(halt.exits),
        )  # fmt: skip
        yield (
            reading, tau, "calibration", f"{halting.calibration_tokens:,}", halt.calibration_loops,
            f"{halt.calibration_ratio:.4f}", "-",
        )  # fmt: skip


def _policy_rows(diagnosis: Diagnosis) -> Iterator[Row]:
    halting = diagnosis.measured.halting
    for name in {**halting.skipped, **halting.policies}:
        halt, skipped = halting.policies.get(name), halting.skipped.get(name)
        tau: str | float = "-" if halt is None else "none" if halt.tau is None else halt.tau
        all_computed = ("-", "-") if halt is None else (halt.loops, f"{halt.ratio:.4f}")
        left_out: Row = ("-",) * 5
        if skipped is not None:
            timed = math.isfinite(skipped.speed)
            left_out = (
                skipped.loops, f"{skipped.ratio:.4f}", _shares(skipped.exits),
                f"{skipped.tokens_per_second:,.0f}" if timed else "-", f"{skipped.speed:.2f}" if timed else "-",
            )  # fmt: skip
        label = f"none, K = {diagnosis.measured.n_loops}" if name == NO_POLICY else name
        yield (label, tau, *all_computed, *left_out, f"{halting.exit_gap:+.4f}")


def _shares(exits: Sequence[float]) -> str:
    return " / ".join(f"{share:.1%}" for share in exits)


def _by_loop(diagnosis: Diagnosis, *columns: Row) -> Iterator[Row]:
    """Rows of k and its value in each column, "-" where a column has ended.

    Of all loops k the trained ones are shown, then twice and four times as many, and the last.
    """
    n_loops, count = diagnosis.measured.n_loops, max(map(len, columns))
    for k in sorted(k for k in {*range(1, n_loops + 1), 2 * n_loops, 4 * n_loops, count} if k <= count):
        yield str(k), *(column[k - 1] if k <= len(column) else "-" for column in columns)


SECTIONS = (
    Section(
        "1. Norm of the state",
        "The length ||H_k|| of every token's state, far beyond the trained loops. The percentiles are over tokens: a "
        "mean can hide a few huge ones. Loop 1 begins with H_0. A later loop begins with the state before it or, with "
        "a norm between loops, with what that norm makes of it. The last column divides ||H_k|| by the norm that the "
        "loop begins with, and is a mean over tokens.",
        ("norms",),
        ("k", "mean", *(f"{percent}%" for percent in PERCENTILES), "begins with", "times that"),
        _norm_rows,
    ),
    Section(
        "2. Radial fraction of the gradients",
        "The radial fraction of a gradient g is |<g, h>| / (|g| |h|): the share of it that can change a token's size. "
        "Immediate: the gradient of loop k's own cross-entropy, through its readout alone. By the equation: what a "
        "readout with an RMSNorm or LayerNorm leaves of it in exact arithmetic, eps rstd^3 <w dL/dy, h>; what low "
        "precision measures above that is rounding. Whole: the gradient of the training loss, through all later loops.",
        ("radial",),
        ("k", "immediate", "immediate, float64", "by the equation", "whole, CE", "whole, with penalty"),
        _radial_rows,
    ),
    Section(
        "3. Updates",
        "The update b = H_{k+1} - H_k has a radial part a = <u, b>/d along the direction u, and a tangential part "
        "b_perp = b - a u. The scale s is predicted to grow by a (first order), or by a + rms(b_perp)^2 / 2s (second "
        "order). The errors of both are means over tokens. Angular motion, rms(u_{k+1} - u_k), is how far the "
        "direction turns; it falls as rms(b_perp)/s. With a norm between loops, b is the difference of the states "
        "that are read.",
        ("updates",),
        (
            "k", "scale s_k", "s_k+1 - s_k", "first order", "second order", "error of first", "error of second",
            "rms(b_perp)", "angular motion", "angular x s_k",
        ),
        _update_rows,
    ),
    Section(
        "4. Radial clamp",
        "What does the cross-entropy lose if loops may not change the size of a state? The clamp acts from loop 2 on, "
        "in three forms. Scale frozen: every token is set back to the scale it had after loop 1. Radial part removed: "
        "the state moves by b_perp alone, and its scale still grows by what b_perp adds. Both: the two together. Each "
        "column is the change in nats and its standard error, from the paired differences of the windows' means. "
        "Every loop is read as if it were the last. The response is how much a state twice as large changes the next "
        "loop's result, as a share of that result.",
        ("clamp",),
        ("k", "CE", "scale frozen", "radial part removed", "both", "response of the next loop"),
        _clamp_rows,
    ),
    Section(
        "5. The state scaled by alpha before the readout",
        "The state of every loop is multiplied by alpha and read as in training; the state that is fed back is left "
        "alone. A flat line is a readout that cannot see the size.",
        ("alpha-final", "alpha-loops"),
        ("k", "CE range, nats", *(f"alpha = {ALPHAS[column]:.2g}" for column in SHOWN_ALPHAS), "readout"),
        _alpha_rows,
    ),
    Section(
        "6. Depth",
        "The cross-entropy of stopping after K loops, each read as the last; beyond the trained depth too. As trained: "
        "each of the trained loops read as training reads it, which differs where only the last loop is normalised.",
        ("depth",),
        ("K", "CE", "CE as trained", "PPL", "bits/byte"),
        _depth_rows,
    ),
    Section(
        "7. Calibrated halting",
        "A token stops at the first loop before K whose margin is at least tau, and at K otherwise. The margin is the "
        "largest logit minus the second largest. tau is chosen on the first half of the windows (calibration): it uses "
        "the fewest loops among those that cost at most 1% of perplexity. The figure is of the other half (report). "
        "The margin is the token's own, so the rule is causal. No time is saved that way: later tokens attend to the "
        "states of all loops, so those of a token that has stopped are computed all the same. Section 8 leaves them "
        "out.",
        ("halting",),
        (
            "read", "tau", "half", "tokens", "loops per token", "PPL / PPL at K", "share of tokens that stop at 1..K",
        ),
        _halting_rows,
    ),
    Section(
        "8. Halting policies, with later loops left out",
        "Scores that say when a token is ready; larger is readier. Margin: as above. Top probability: the largest. "
        "Entropy: the prediction's, negated. State change: |H_k - H_k-1| / |H_k|, negated. Gate: how probable it is to "
        "have stopped. The tau of each is calibrated as above, on states of which nothing is left out; so are "
        "the two columns after it. Skipping: what a token would do after it has stopped is not computed. Later tokens "
        "attend to its last keys and values, so that loops and PPL differ a little. Speed is that of tokens to logits "
        "on this device, with the readouts that the score takes, in turn with K loops for every token. All is of the "
        "report half. Where CE(1) - CE(K) is about 0 the loops do nothing, and any policy may stop at once.",
        (),
        (
            "policy", "tau", "loops", "PPL / PPL at K", "loops, skipping", "PPL / PPL at K, skipping",
            "share that stops at 1..K, skipping", "tokens/s", "x K loops", "CE(1) - CE(K)",
        ),
        _policy_rows,
    ),
)  # fmt: skip


def origin_rows(diagnoses: Sequence[Diagnosis]) -> Iterator[Row]:
    """Where the numbers come from: a fact, its value, and the models that it is true of."""
    for fact in dict.fromkeys(fact for diagnosis in diagnoses for fact in diagnosis.origin):
        names: dict[str, list[str]] = {}
        for diagnosis in diagnoses:
            if fact in diagnosis.origin:
                names.setdefault(diagnosis.origin[fact], []).append(diagnosis.name)
        for value, models in names.items():
            yield fact, value, "all" if len(models) == len(diagnoses) else ", ".join(models)
