"""What a diagnosis leaves: one self-contained page, its figures as PNGs, and every number as JSON."""

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt

from looped.diagnose.depth import Depth
from looped.diagnose.diagnosis import Diagnosis
from looped.diagnose.dynamics import PERCENTILES
from looped.diagnose.figures import FIGURES, colours_of, halting_readings
from looped.diagnose.verdict import CONTROLS, THRESHOLDS

FORMAT = 2  # of diagnosis.json: raised whenever what is measured, or how it is called, changes
CLAMP_FORMS = {"frozen": "scale frozen", "tangential": "radial part removed", "both": "both"}

Rows = Iterable[Sequence[str | float]]

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #57606a; --ground: #ffffff; --card: #f4f6f8; --line: #d5dae0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #a0a9b3; --ground: #15181c; --card: #1e2329; --line: #39414a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 92rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.6rem; } h3 { font-size: 1rem; margin: 0 0 .3rem; }
p.about, p.note { color: var(--soft); max-width: 62rem; }
.verdict { background: var(--card); border-left: 4px solid var(--line); padding: .8rem 1rem; margin: .8rem 0; }
.verdict p { margin: 0; max-width: 75rem; }
.beside { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.beside > div { flex: 1 1 36rem; min-width: 0; }
img { display: block; max-width: 100%; background: #fff; padding: 6px; border: 1px solid var(--line);
  border-radius: 6px; box-sizing: border-box; margin-bottom: .8rem; }
.scroll { overflow: auto; max-height: 32rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
"""


def write_diagnosis(diagnoses: Sequence[Diagnosis], out: Path, colours: Mapping[str, str] | None = None) -> None:
    """Write index.html, diagnosis.json and one PNG a figure into the directory `out`, which is made.

    colours: of the models in all figures, by name; of those that are not in it, by their place.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, chosen = {}, colours_of([one.name for one in diagnoses], colours)
    for name, draw in FIGURES.items():
        figure, buffer = draw(diagnoses, chosen), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        images[name] = buffer.getvalue()
        (out / f"{name}.png").write_bytes(images[name])
    (out / "diagnosis.json").write_text(to_json(diagnoses), encoding="utf-8")
    (out / "index.html").write_text(page(diagnoses, images), encoding="utf-8")


def to_json(diagnoses: Sequence[Diagnosis]) -> str:
    """Every number; nan and infinity, which JSON does not have, as null."""
    content = {
        "format": FORMAT,
        "percentiles": PERCENTILES,
        "thresholds": THRESHOLDS,
        "diagnoses": [
            asdict(one) | {"alpha_ranges": one.measured.alpha.ranges, "clamp_change": one.measured.clamp.change}
            for one in diagnoses
        ],
    }
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1, allow_nan=False) + "\n"


def page(diagnoses: Sequence[Diagnosis], images: dict[str, bytes]) -> str:
    """The page, with `images` (PNG, by the figures' names) inside it."""
    shown = diagnoses[0].name if len(diagnoses) == 1 else f"{len(diagnoses)} models"
    verdicts = "".join(
        f'<div class="verdict"><h3>{escape(one.name)}: {CONTROLS[one.verdict.control]}</h3>'
        f"<p>{escape(one.verdict.text)}</p></div>"
        for one in diagnoses
    )
    sections = "".join(
        _section(title, about, figures, table(diagnoses), images) for title, about, figures, table in SECTIONS
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Diagnosis: {escape(shown)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>What the loss controls: {escape(shown)}</h1>"
        '<p class="about">H_k is the state after loop k, h = s u its row of a token, s = rms(h). Cross-entropy is in '
        "nats a token. Means are over the validation tokens named below; all arithmetic is in the model's precision "
        "unless it says float64. As the last: loop k is read as the last one is; as trained: as training reads it, "
        "which for a readout that normalises the last loop only is without the norm before that.</p>"
        f'{verdicts}<p class="note">{escape(THRESHOLDS)}</p>{_summary(diagnoses)}{sections}'
        f"{_origins(diagnoses)}</body></html>\n"
    )


def _summary(diagnoses: Sequence[Diagnosis]) -> str:
    header = ("model", "verdict", "K", "tokens", "||H_K||", "CE at K", "PPL at K", "bits/byte", "CE at 1",
              "range over alpha, K", "radial, K", "clamp", "halting loops")  # fmt: skip
    return f'<div class="scroll">{_table(header, map(_summary_row, diagnoses))}</div>'


def _summary_row(one: Diagnosis) -> Sequence[str | float]:
    measured, depth, last = one.measured, one.measured.depth, one.measured.n_loops - 1
    return (
        one.name, CONTROLS[one.verdict.control], str(measured.n_loops), f"{one.n_tokens:,}", measured.norms.mean[last],
        depth.ce[last], depth.ppl[last], depth.bits_per_byte[last], depth.ce[0], measured.alpha.ranges[last],
        measured.radial.immediate[last], f"{measured.clamp.change:+.4f}", measured.halting.as_trained.loops,
    )  # fmt: skip


def _norm_table(diagnoses: Sequence[Diagnosis]) -> str:
    percentiles = (f"{percent}%" for percent in PERCENTILES)
    header = ("model", "k", "mean", *percentiles, "loop begins with", "makes of it, times")
    return _table(
        header,
        (
            (one.name, str(k), norms.mean[k - 1], *norms.percentiles[k - 1], norms.entered[k - 1], norms.within[k - 1])
            for one in diagnoses
            for norms in [one.measured.norms]
            for k in _chosen(one, len(norms.mean))
        ),
    )


def _radial_table(diagnoses: Sequence[Diagnosis]) -> str:
    header = ("model", "k", "immediate", "immediate, float64", "by the equation", "whole, CE", "whole, with penalty")
    return _table(
        header,
        (
            (one.name, str(k), *values)
            for one in diagnoses
            for k, values in enumerate(zip(*asdict(one.measured.radial).values(), strict=True), start=1)
        ),
    )


def _update_table(diagnoses: Sequence[Diagnosis]) -> str:
    header = ("model", "k", "s_k", "s_k+1 - s_k", "first order", "second order", "its error", "error of second",
              "rms(b_perp)", "angular", "angular x s_k")  # fmt: skip
    return _table(
        header,
        (
            (one.name, str(k), one.measured.norms.scale[k - 1], *(column[k - 1] for column in columns))
            for one in diagnoses
            for columns in [list(asdict(one.measured.updates).values())]
            for k in _chosen(one, len(columns[0]))
        ),
    )


def _clamp_table(diagnoses: Sequence[Diagnosis]) -> str:
    columns = [column for form in CLAMP_FORMS.values() for column in (form, "standard error")]
    return _table(
        ("model", "k", "CE", *columns),
        (
            (one.name, str(k + 1), free, *_clamp_cells(one, k))
            for one in diagnoses
            for k, free in enumerate(one.measured.clamp.free)
        ),
    )


def _clamp_cells(one: Diagnosis, loop: int) -> list[str]:
    forms = [getattr(one.measured.clamp, form) for form in CLAMP_FORMS]
    return [cell for form in forms for cell in (f"{form.change[loop]:+.5f}", f"{form.error[loop]:.5f}")]


def _alpha_table(diagnoses: Sequence[Diagnosis]) -> str:
    shown = (0, 3, 6, 9, 12)
    header = (
        "model",
        "k",
        "range, nats",
        *(f"alpha = {diagnoses[0].measured.alpha.alphas[i]:.2g}" for i in shown),
        "readout",
    )
    return _table(
        header,
        (
            (one.name, str(k), spread, *(ce[i] for i in shown), "blind" if blind else "sees it")
            for one in diagnoses
            for k, (spread, ce, blind) in enumerate(
                zip(one.measured.alpha.ranges, one.measured.alpha.ce, one.verdict.blind, strict=True), start=1
            )
        ),
    )


def _depth_table(diagnoses: Sequence[Diagnosis]) -> str:
    return _table(
        ("model", "K", "CE", "CE as trained", "PPL", "bits/byte"),
        (
            (one.name, str(k), depth.ce[k - 1], _as_trained(depth, k), depth.ppl[k - 1], depth.bits_per_byte[k - 1])
            for one in diagnoses
            for depth in [one.measured.depth]
            for k in _chosen(one, len(depth.ce))
        ),
    )


def _as_trained(depth: Depth, k: int) -> str | float:
    if k > len(depth.as_trained):
        return "-"
    return depth.as_trained[k - 1] if depth.as_trained[k - 1] != depth.ce[k - 1] else "the same"


def _halting_table(diagnoses: Sequence[Diagnosis]) -> str:
    header = ("model", "read", "tau", "loops", "PPL / PPL at K", "loops, calibration", "PPL / PPL at K, calibration",
              "tokens: calibration", "report", "share of tokens that stop at 1..K")  # fmt: skip
    return _table(
        header,
        (
            (
                one.name, read, "none" if halt.tau is None else halt.tau, halt.loops, f"{halt.ratio:.4f}",
                halt.calibration_loops, f"{halt.calibration_ratio:.4f}", f"{halting.calibration_tokens:,}",
                f"{halting.report_tokens:,}", " / ".join(f"{share:.1%}" for share in halt.exits),
            )
            for one in diagnoses
            for halting in [one.measured.halting]
            for read, halt in halting_readings(one).items()
        ),
    )  # fmt: skip


def _origins(diagnoses: Sequence[Diagnosis]) -> str:
    """What each diagnosis says of itself; the page of models of one's own has no run, step, data or tokenizer."""
    columns = list(dict.fromkeys(key for one in diagnoses for key in one.origin))
    rows = [(one.name, *(one.origin.get(column, "-") for column in columns)) for one in diagnoses]
    return f'<h2>Origin</h2><div class="scroll">{_table(("model", *columns), rows)}</div>'


# Title, what it is, the figures beside the table, the table.
SECTIONS: tuple[tuple[str, str, tuple[str, ...], Callable[[Sequence[Diagnosis]], str]], ...] = (
    (
        "1. Norm of the state",
        "||H_k||_2 token by token, far beyond the trained loops: percentiles, since a mean can hide a few huge tokens. "
        "A loop begins with H_0, then with H_{k-1} or, with a norm between loops, with what that makes of it; the last "
        "column is the mean over tokens of ||H_k|| over that.",
        ("norms",),
        _norm_table,
    ),
    (
        "2. Radial fraction of the gradients",
        "|<g, h>| / (|g| |h|): the share of a gradient that can change a token's scale. Immediate: of CE_k through "
        "readout k alone. By the equation: what an RMSNorm or LayerNorm readout leaves of it, eps rstd^3 <w dL/dy, h>; "
        "what is measured above that in low precision is rounding. Whole: of the training loss, through later loops.",
        ("radial",),
        _radial_table,
    ),
    (
        "3. Updates",
        "b = H_{k+1} - H_k, split into its radial part a = <u, b>/d and b_perp = b - a u. Predicted increments of the "
        "scale: a, and a + rms(b_perp)^2 / 2s; errors are means over tokens. Angular motion is rms(u_{k+1} - u_k), "
        "which falls as rms(b_perp)/s. With a norm between loops, b is the difference of the states that are read.",
        ("updates",),
        _update_table,
    ),
    (
        "4. Radial clamp",
        "From loop 2 on. Scale frozen: every token is set back to the scale it had after loop 1, s_1 v / rms(v) with "
        "v = H + b. Radial part removed: H + b_perp, whose scale still grows by what b_perp adds. Both: s_1 v / rms(v) "
        "with v = H + b_perp. What the cross-entropy loses is what the loops made of the scale; the standard error is "
        "of the paired difference, from the windows' means. Loops before the last are read as if they were the last.",
        ("clamp",),
        _clamp_table,
    ),
    (
        "5. The state scaled by alpha before the readout",
        "Read as in training, at every loop. A flat line is a readout that cannot see the scale.",
        ("alpha-final", "alpha-loops"),
        _alpha_table,
    ),
    (
        "6. Depth",
        "Stopping after K loops, each read as the last; beyond the trained depth too. As trained: each of the trained "
        "loops read as training reads it, which differs where only the last loop is normalised.",
        ("depth",),
        _depth_table,
    ),
    (
        "7. Calibrated halting",
        "A token stops at the first loop k < K whose margin, its largest logit minus the second, is at least tau, else "
        "at K. tau uses the fewest loops among those that cost at most 1% of perplexity on the first half of the "
        "windows; the figure and the first columns are of the other half. The margin is the token's own, so the rule "
        "is causal; later tokens attend to the states of all loops, so those of a token that has stopped are computed "
        "all the same, and no time is saved that way.",
        ("halting",),
        _halting_table,
    ),
)  # fmt: skip


def _section(title: str, about: str, figures: Sequence[str], table: str, images: dict[str, bytes]) -> str:
    pictures = "".join(
        f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(images[name]).decode()}">'
        for name in figures
    )
    return (
        f'<h2>{escape(title)}</h2><p class="about">{escape(about)}</p>'
        f'<div class="beside"><div>{pictures}</div><div class="scroll">{table}</div></div>'
    )


def _table(header: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return "-" if not math.isfinite(value) else f"{value:.4g}"


def _chosen(one: Diagnosis, count: int) -> list[int]:
    """Of the loops 1..count: the trained ones, then twice and four times as many, and the last."""
    n_loops = one.measured.n_loops
    return sorted(k for k in {*range(1, n_loops + 1), 2 * n_loops, 4 * n_loops, count} if k <= count)
