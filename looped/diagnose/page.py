"""What a diagnosis leaves: one self-contained page, its figures as PNGs, and every number as JSON."""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt

from looped.diagnose.diagnosis import Diagnosis
from looped.diagnose.figures import FIGURES, drawn_models
from looped.diagnose.findings import findings
from looped.diagnose.record import write_record
from looped.diagnose.tables import OVERVIEW_COLUMNS, SECTIONS, Row, Section, origin_rows, overview_row

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #57606a; --ground: #ffffff; --card: #f4f6f8; --line: #d5dae0; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #a0a9b3; --ground: #15181c; --card: #1e2329; --line: #39414a; --accent: #56b4e9; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 64rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p.about, dl { color: var(--soft); margin: .4rem 0 .8rem; }
dt { float: left; clear: left; margin-right: .5rem; font-weight: 600; } dd { margin: 0 0 .2rem; }
.advice { background: var(--card); border-left: 4px solid var(--accent); padding: .7rem 1rem; margin: .8rem 0;
  font-size: 1.1rem; }
img { display: block; max-width: 100%; background: #fff; padding: 6px; border: 1px solid var(--line);
  border-radius: 6px; box-sizing: border-box; margin-bottom: .8rem; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .22rem .35rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { background: var(--card); font-weight: 600; vertical-align: bottom; }
th.model { color: var(--accent); }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
h1, h2, td:first-child, th.model, table.text td { overflow-wrap: anywhere; }
table.text { font-size: .88rem; }
table.findings td:nth-child(1) { width: 19%; } table.findings td:nth-child(2) { width: 15%; font-weight: 600; }
table.findings td:nth-child(3) { width: 41%; }
.whole { white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .8rem; }
"""

# A browser may break a line at any hyphen, and so within 1.2e-08.
WHOLE, NOT_BROKEN = re.compile(r"[\d.]+e-\d+"), r'<span class="whole">\g<0></span>'

QUESTION = (
    "A looped model applies the same layers K times. After every loop each token has a state, H_k: a vector with a "
    "size and a direction. A readout that normalises the state sees the direction alone, so that the loss may leave "
    "the size to drift. Does anything in the training of a model hold the size, and what should be done?"
)

WORDS = {
    "K": "the loops that the model was trained with; k is one of them.",
    "Size of a state": "its norm ||H_k||, or its scale s = rms(H_k), which is the norm over the root of the channels. "
    "h is the state of one token, u = h/s its direction.",
    "Readout": "what turns a state into the prediction: a norm, if there is one, and the head.",
    "Blind": "a readout whose cross-entropy does not depend on the size of the state.",
    "Radial fraction": "the share of a gradient along the state itself, 0 to 1. At 0 it cannot change the size.",
    "CE, PPL": "cross-entropy in nats a token, and its exponential, perplexity; means over the validation tokens.",
    "As the last, as trained": "loop k is read as the last loop is; or as training reads it. The two differ only "
    "where training normalises the last loop alone (readout final-only).",
    "Precision": "everything is computed in the model's own precision unless it says float64.",
}  # fmt: skip


def write_diagnosis(diagnoses: Sequence[Diagnosis], out: Path, colours: Mapping[str, str] | None = None) -> None:
    """Write index.html, diagnosis.json and one PNG for each figure into the directory `out`, which is created.

    colours: by name, of models in all figures. A model that is not in it is coloured by its place.
    """
    write_record(diagnoses, out / "diagnosis.json")
    models, images = drawn_models(diagnoses, colours), {}
    for name, draw in FIGURES.items():
        figure, buffer = draw(models), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        images[name] = buffer.getvalue()
        (out / f"{name}.png").write_bytes(images[name])
    (out / "index.html").write_text(page(diagnoses, images), encoding="utf-8")


def page(diagnoses: Sequence[Diagnosis], images: Mapping[str, bytes]) -> str:
    """The page. images: the figures as PNG, by name, which become part of it."""
    subject = diagnoses[0].name if len(diagnoses) == 1 else f"{len(diagnoses)} models"
    numbers = f"<h2>The main numbers</h2>{_table(OVERVIEW_COLUMNS, {'': map(overview_row, diagnoses)})}"
    comparison = f"<h2>Side by side</h2>{_answers(diagnoses)}" if len(diagnoses) > 1 else ""
    verdicts = "".join(map(_verdict, diagnoses))
    words = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in WORDS.items())
    sections = "".join(_section(section, diagnoses, images) for section in SECTIONS)
    origin = _table(("fact", "value", "models"), {"": origin_rows(diagnoses)}, kind="text")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Diagnosis: {escape(subject)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>What the loss controls: {escape(subject)}</h1>"
        f'<p class="about">{escape(QUESTION)}</p>'
        f"{comparison}{verdicts}{numbers}"
        f"<h2>Words on this page</h2><dl>{words}</dl>{sections}"
        f'<h2>Origin</h2><p class="about">Every number is also in diagnosis.json.</p>{origin}</body></html>\n'
    )


def _answers(diagnoses: Sequence[Diagnosis]) -> str:
    """The answers of every model to the questions that its verdict asks."""
    answers = {
        diagnosis.name: {finding.question: finding.answer for finding in findings(diagnosis.measured)}
        for diagnosis in diagnoses
    }
    questions = list(dict.fromkeys(question for of_model in answers.values() for question in of_model))
    rows = [(name, *(of_model.get(question, "-") for question in questions)) for name, of_model in answers.items()]
    return _table(("model", *questions), {"": rows}, kind="text")


def _verdict(diagnosis: Diagnosis) -> str:
    """The advice, then a row for each finding."""
    header = ("question", "answer", "measured, and the threshold", "what to do")
    head = "".join(f"<th>{column}</th>" for column in header)
    rows = "".join(
        f"<tr><td>{escape(finding.question)}</td><td>{escape(finding.answer)}</td>"
        f"<td>{WHOLE.sub(NOT_BROKEN, escape(finding.number))}<small>{escape(finding.threshold)}</small></td>"
        f"<td>{escape(finding.action)}</td></tr>"
        for finding in findings(diagnosis.measured)
    )
    return (
        f'<h2>{escape(diagnosis.name)}</h2><p class="advice">{escape(diagnosis.verdict.advice)}</p>'
        f'<table class="text findings"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _section(section: Section, diagnoses: Sequence[Diagnosis], images: Mapping[str, bytes]) -> str:
    pictures = "".join(
        f'<img alt="{escape(section.title)}" src="data:image/png;base64,{base64.b64encode(images[name]).decode()}">'
        for name in section.figures
    )
    table = _table(section.columns, {diagnosis.name: section.rows(diagnosis) for diagnosis in diagnoses})
    return f'<h2>{escape(section.title)}</h2><p class="about">{escape(section.explanation)}</p>{pictures}{table}'


def _table(columns: Sequence[str], rows_by_model: Mapping[str, Iterable[Row]], *, kind: str = "numbers") -> str:
    """A table with the rows of every model under a line with its name; the name of a single model is left out."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = ""
    for model, rows in rows_by_model.items():
        if len(rows_by_model) > 1:
            body += f'<tr><th class="model" colspan="{len(columns)}">{escape(model)}</th></tr>'
        body += "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:.4g}".replace("e+0", "e").replace("e-0", "e-")  # narrow: twelve columns stand side by side
