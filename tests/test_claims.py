import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from diagnosed_models import clamp, halting, measurements

from looped.diagnose import Diagnosis
from looped.diagnose.depth import Depth
from looped.diagnose.dynamics import Norms, Updates
from looped.diagnose.interventions import ALPHAS, AlphaSweep
from looped.diagnose.radial import RadialFractions
from looped.diagnose.verdict import judge as verdict
from train.paper.claim import Evidence, judge, judge_values
from train.paper.claims import CLAIMS
from train.paper.claims_page import markdown
from train.paper.conditions import CONDITIONS, PAPER_RATES, SEEDS
from train.paper.judging import Sweep, record_of, write_claims
from train.paper.runs import RunResult
from train.paper.seed_tables import TABLES

COMMITTED = Path(__file__).parents[1] / "bench/results/paper-demo/claims.json"
VISIBLE = RadialFractions(*[[0.02] * 4] * 5)
# Condition: cross-entropy at K = 1..4, norm of the last state, and what differs from a blind model's measurements.
AS_IN_THE_PAPER = {
    "terminal-rmsnorm": ([5.5, 3.0, 2.0, 1.58], 900.0, {}),
    "terminal-raw": ([5.5, 3.0, 2.0, 1.6], 30.0, {}),
    "per-loop-rmsnorm": ([1.606, 1.60, 1.60, 1.604], 39_000.0, {}),
    "per-loop-raw": (
        [1.54, 1.52, 1.51, 1.51],
        30.0,
        {
            "radial": VISIBLE,
            "alpha": AlphaSweep(list(ALPHAS), [[5.0, *[4.0] * 12]] * 4),
            "halting": halting(2.16),
        },
    ),
    "per-loop-final-only": ([1.55, 1.52, 1.51, 1.51], 40.0, {"halting": halting(1.78)}),
    "terminal-rmsnorm-penalty": ([5.0, 3.0, 2.0, 1.6], 20.0, {}),
    "per-loop-rmsnorm-penalty": ([1.54, 1.51, 1.51, 1.50], 20.0, {"halting": halting(2.60)}),
    "per-loop-layernorm": ([1.61, 1.61, 1.61, 1.61], 30_000.0, {}),
    "per-loop-rmsnorm-loop-norm": ([1.6, 1.6, 1.6, 1.6], 25.0, {"response": [1e-4] * 3}),
}


def updates(**changes) -> Updates:
    """29 of them, which slow down; second order predicts better than first."""
    size = [10.0] * 29
    fields = {
        "increment": size, "first_order": size, "second_order": size, "first_error": [0.2] * 29,
        "second_error": [0.1] * 29, "tangential": size, "angular": [1 / k for k in range(1, 30)],
        "angular_times_scale": [10 + 3 / k for k in range(1, 30)],
    }  # fmt: skip
    return Updates(**(fields | changes))


def norms(mean: list[float]) -> Norms:
    """Percentiles of ||H_k|| are 1, 2, ... 9 times its mean."""
    percentiles = [[place * value for place in range(1, 10)] for value in mean]
    return Norms(mean, percentiles, mean, mean, [1.0] * len(mean))


def evidence(
    condition: str,
    seed: int = 42,
    *,
    ce: list[float] | None = None,
    as_trained: list[float] | None = None,
    norm: float | None = None,
    rates: tuple[float, ...] = PAPER_RATES,
    **changes,
):
    """A run as the paper describes it; ``changes`` replace measurements."""
    usual_ce, usual_norm, differing = AS_IN_THE_PAPER[condition]
    ce, norm = ce or usual_ce, norm or usual_norm
    rows = [
        {"n_loops": k, "ce": value, "ppl": math.exp(value), "bits_per_byte": 1.0, "state_norm": norm,
         "tokens_per_second": rate}
        for k, (value, rate) in enumerate(zip(ce, rates, strict=True), start=1)
    ]  # fmt: skip
    level = condition == "per-loop-rmsnorm-loop-norm"
    usual = {
        "norms": norms([10.0 + (0.01 if level else 10.0) * k for k in range(30)]),
        "updates": updates(),
        "clamp": clamp(0.004),
        "alpha": AlphaSweep(list(ALPHAS), [[5.0001, *[5.0] * 12]] * 4),
        "depth": Depth([5.0] * 16, [148.0] * 16, [math.nan] * 16, as_trained or ce),
    }
    measured = measurements(**(usual | differing | changes))
    result = RunResult(condition, seed, "complete", 8, 1.5, rows, 1000, "cpu: synthetic", {"torch": "0"}, "abc")
    return Evidence(result, Diagnosis(condition, 4096, measured, verdict(measured), {"date": "2026-11-24"}))


def paper_seed(seed: int = 42) -> dict[str, Evidence]:
    return {condition: evidence(condition, seed) for condition in CONDITIONS}


TESTABLE = [claim for claim in CLAIMS if claim.quantities]


@pytest.mark.parametrize("claim", TESTABLE, ids=lambda claim: claim.title)
def test_runs_like_the_papers_reproduce_it(claim):
    outcome = judge(claim, {seed: paper_seed(seed) for seed in SEEDS}, "demo")
    assert outcome["mark"] == "reproduced"
    assert outcome["seeds_that_hold"] == list(SEEDS)
    assert all(len(row) == len(claim.quantities) for row in outcome["values_by_seed"].values())


# What, in one run, contradicts which claims, by the place that they have on the page.
CONTRADICTIONS = [
    ("per-loop-rmsnorm", {"norm": 250.0}, {1, 21, 23}),  # 8 times 30, 6 times 40, 12 times 20
    ("per-loop-rmsnorm", {"norm": 150.0}, {1, 2, 21, 22, 23}),
    ("per-loop-rmsnorm-penalty", {"norm": 4000.0}, {2}),
    ("per-loop-raw", {"ce": [1.54, 1.52, 1.51, 1.61]}, {3, 4}),
    ("per-loop-raw", {"ce": [1.608, 1.52, 1.51, 1.51]}, {4}),
    ("per-loop-final-only", {"ce": [1.55, 1.52, 1.51, 1.61]}, {5, 6}),
    ("per-loop-final-only", {"ce": [1.55, 1.61, 1.51, 1.51]}, {6}),
    ("per-loop-rmsnorm-penalty", {"ce": [1.54, 1.51, 1.51, 1.61]}, {7, 8}),
    ("per-loop-rmsnorm-penalty", {"ce": [1.54, 1.51, 1.61, 1.50]}, {8}),
    ("terminal-rmsnorm", {"ce": [5.5, 3.0, 2.0, 1.61]}, {9}),
    ("terminal-rmsnorm", {"ce": [2.5, 2.0, 1.8, 1.58]}, {10}),
    ("per-loop-raw", {"ce": [1.56, 1.52, 1.51, 1.45]}, {11}),
    ("per-loop-rmsnorm", {"radial": VISIBLE}, {12, 24}),
    ("per-loop-raw", {"radial": measurements().radial}, {12}),
    ("per-loop-raw", {"radial": dataclasses.replace(VISIBLE, immediate=[0.02, 1e-8, 0.02, 0.02])}, {12}),
    ("per-loop-rmsnorm", {"alpha": AlphaSweep(list(ALPHAS), [[5.0] * 13, [5.02, *[5.0] * 12]] * 2)}, {13}),
    ("per-loop-raw", {"alpha": AlphaSweep(list(ALPHAS), [[5.02, *[5.0] * 12]] * 4)}, {13}),
    ("per-loop-raw", {"alpha": AlphaSweep(list(ALPHAS), [[6.0, *[5.0] * 12]] * 3 + [[5.0] * 13])}, {13}),
    ("per-loop-layernorm", {"radial": VISIBLE}, {14}),
    ("per-loop-layernorm", {"alpha": AlphaSweep(list(ALPHAS), [[5.02, *[5.0] * 12]] * 4)}, {14}),
    ("per-loop-rmsnorm-loop-norm", {"response": [0.0, 0.5, 0.0]}, {15}),
    ("per-loop-rmsnorm-loop-norm", {"norms": norms([10.0 * k for k in range(1, 31)])}, {15}),
    ("per-loop-rmsnorm", {"clamp": clamp(-0.02)}, {16}),
    ("per-loop-raw", {"clamp": clamp(0.02)}, {17}),
    ("per-loop-rmsnorm", {"updates": updates(second_error=[2.0] * 29, first_error=[3.0] * 29)}, {18}),
    ("per-loop-rmsnorm", {"updates": updates(first_error=[0.05] * 29)}, {18}),
    ("per-loop-rmsnorm", {"updates": updates(angular_times_scale=[12.0] * 29)}, {19}),
    ("per-loop-rmsnorm", {"updates": updates(angular=[0.1] * 29)}, {19}),
    ("per-loop-rmsnorm", {"norms": norms([10.0 + min(k, 20) for k in range(30)])}, {20}),
    ("terminal-raw", {"norm": 4000.0}, {21}),
    ("terminal-rmsnorm-penalty", {"norm": 4000.0}, {22}),
    ("per-loop-final-only", {"norm": 4000.0}, {23}),
    (
        "per-loop-rmsnorm",
        {"radial": dataclasses.replace(measurements().radial, total=[0.02, 0.01, 1e-5, 1e-8])},
        {24},
    ),
    ("per-loop-rmsnorm", {"halting": halting(1.5)}, {25}),
    ("per-loop-raw", {"halting": halting(1.1)}, {25}),
    ("per-loop-final-only", {"halting": halting(1.1, 2.0)}, {25}),
    ("per-loop-rmsnorm", {"rates": (80, 60, 28, 21)}, {26}),
]


@pytest.mark.parametrize(("condition", "change", "contradicted"), CONTRADICTIONS)
def test_a_run_that_contradicts(condition, change, contradicted):
    runs = {seed: paper_seed(seed) for seed in SEEDS}
    runs[101][condition] = evidence(condition, 101, **change)
    outcomes = {number: judge(claim, runs, "demo") for number, claim in enumerate(TESTABLE, start=1)}
    assert {number for number, outcome in outcomes.items() if outcome["mark"] == "not reproduced"} == contradicted
    for number in contradicted:
        assert outcomes[number]["seeds_that_hold"] == [42, 202]


def test_every_claim_can_fail():
    assert set.union(*(contradicted for _, _, contradicted in CONTRADICTIONS)) == set(range(1, len(TESTABLE) + 1))


def test_what_freezing_the_scale_alone_gives_is_told_beside_the_clamp_that_decides():
    """Both parts of the clamp cost too much, freezing does not."""
    runs = {42: paper_seed() | {name: evidence(name, clamp=clamp(0.02, 0.004)) for name in ("per-loop-rmsnorm",)}}
    runs[42]["per-loop-raw"] = evidence("per-loop-raw", clamp=clamp(0.02, 0.03))
    first, second = (judge(CLAIMS[number - 1], runs, "demo") for number in (16, 17))
    for outcome, otherwise in ((first, [42]), (second, [])):
        assert (outcome["mark"], outcome["alternative"]["seeds_that_hold"]) == ("not reproduced", otherwise)


READINGS = [  # number of the claim, what final-only is: as trained it agrees, as last it does not; and the reverse
    (6, {"ce": [1.62, 1.52, 1.51, 1.51], "as_trained": [1.55, 1.52, 1.51, 1.51]}, "reproduced", 0),
    (6, {"ce": [1.55, 1.52, 1.51, 1.51], "as_trained": [1.62, 1.52, 1.51, 1.51]}, "not reproduced", 1),
    (11, {"ce": [1.85, 1.52, 1.51, 1.51], "as_trained": [1.55, 1.52, 1.51, 1.51]}, "reproduced", 0),
    (11, {"ce": [1.55, 1.52, 1.51, 1.51], "as_trained": [1.85, 1.52, 1.51, 1.51]}, "not reproduced", 1),
    (25, {"halting": halting(1.78, 1.0)}, "reproduced", 0),
    (25, {"halting": halting(1.0, 1.78)}, "not reproduced", 1),
]


@pytest.mark.parametrize(("number", "change", "mark", "otherwise"), READINGS)
def test_both_readings_of_final_only_are_told_and_one_decides(number, change, mark, otherwise):
    runs = {42: paper_seed() | {"per-loop-final-only": evidence("per-loop-final-only", **change)}}
    outcome = judge(CLAIMS[number - 1], runs, "demo")
    assert (outcome["mark"], outcome["alternative"]["seeds_that_hold"]) == (mark, [42] * otherwise)
    record = record_of(sweep_of(runs))
    section = markdown(record).partition(f"### {number}. ")[2].partition("\n#")[0]
    would = "reproduced" if otherwise else "not reproduced"
    other = f"with every loop read as the last: the rules hold for {otherwise} of 1 seeds, which would be *{would}*."
    assert other in section
    assert "Final-only is read as it was trained" in section
    assert record["claims"][number - 1]["alternative"]["seeds_that_hold"] == [42] * otherwise


def test_all_that_is_said_of_a_preset_is_of_that_preset():
    sweep = sweep_of({42: paper_seed()})
    record = record_of(dataclasses.replace(sweep, settings=sweep.settings | {"preset": "paper-129m"}))
    (ouro,) = (judged for judged in record["claims"] if "why" in judged)
    assert "preset paper-129m" in ouro["why"]
    assert not re.search("small|minutes|demo|{", " ".join([ouro["why"], ouro["title"], ouro["paper"]]))


def test_the_committed_page_is_that_of_its_record():
    """Both the judgements and the words, from the numbers of 27 runs."""
    record = json.loads(COMMITTED.read_text())
    assert markdown(record) == COMMITTED.with_suffix(".md").read_text()
    for claim, judged in zip(TESTABLE, record["claims"][: len(TESTABLE)], strict=True):  # the last is not testable
        values = {int(seed): row for seed, row in judged["values_by_seed"].items()}
        assert judge_values(claim, values) == judged | {"values_by_seed": values}


def test_what_is_missing_is_not_judged():
    runs = {42: paper_seed(42), 101: {}, 202: {"per-loop-rmsnorm": evidence("per-loop-rmsnorm", 202)}}
    for claim in TESTABLE:
        outcome = judge(claim, runs, "demo")
        assert outcome["mark"] == "reproduced"
        assert list(outcome["values_by_seed"]) == ([42, 202] if claim.conditions == ["per-loop-rmsnorm"] else [42])
        assert judge(claim, {101: {}}, "demo")["mark"] == "not measured"


def test_a_number_that_is_not_finite_confirms_nothing():
    runs = {42: paper_seed()}
    run = runs[42]["per-loop-rmsnorm"]
    rows = [row | {"ppl": None, "state_norm": None} for row in run.result.evaluation]
    runs[42]["per-loop-rmsnorm"] = dataclasses.replace(run, result=dataclasses.replace(run.result, evaluation=rows))
    assert [judge(claim, runs, "demo")["mark"] for claim in CLAIMS[:8]] == ["not reproduced"] * 8


def settings() -> dict[str, object]:
    return {
        "preset": "demo", "data": "sotu", "tokenizer": "bpe", "vocab_size": 4096, "n_loops": 4, "seq_len": 128,
        "batch_size": 16, "steps": 8, "epochs": None, "learning_rate": 0.003, "dtype": "fp32", "fused": True,
        "eval_tokens": None,
    }  # fmt: skip


def sweep_of(runs: dict[int, dict[str, Evidence]]) -> Sweep:
    results = [one.result for seed in runs.values() for one in seed.values()]
    return Sweep(
        results, settings(), runs, SEEDS, ["python -m train.paper sweep --preset demo", "python -m train.paper claims"]
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of two seeds, the second without the raw readout."""
    out = tmp_path_factory.mktemp("page") / "out"
    runs = {42: paper_seed(42), 101: paper_seed(101)}
    del runs[101]["per-loop-raw"]
    runs[101]["per-loop-rmsnorm"] = evidence("per-loop-rmsnorm", 101, norm=150.0)
    sweep = sweep_of(runs)
    diverged = RunResult("per-loop-raw", 101, "diverged", 3, 0.5, [])
    marks = write_claims(dataclasses.replace(sweep, results=[*sweep.results, diverged]), out)
    assert len(marks) == len(CLAIMS)
    return out


def test_page_and_record_have_every_claim_and_measurement(page):
    """How they are printed is seen in the committed page."""
    text, record = (page / "claims.md").read_text(), json.loads((page / "claims.json").read_text())
    for number, (claim, judged) in enumerate(zip(CLAIMS, record["claims"], strict=True), start=1):
        assert f"| {number} | {claim.title} | {judged['mark']} |" in text
        assert f"### {number}. {claim.title}\n\n**{judged['mark']}**" in text
    for said in (*record["commands"], "Commit: abc", "cpu: synthetic", record["made"]["date"]):
        assert said in text
    for measured, (title, columns) in zip(record["measurements"], TABLES.items(), strict=True):
        section = text.partition(f"\n{title}:\n\n")[2].partition("\n\n")[0]
        assert len(section.splitlines()) == 2 + len(CONDITIONS)
        values = measured["values_by_seed"]
        assert {name: set(rows) for name, rows in values.items()} == {
            name: {"42"} if name == "per-loop-raw" else {"42", "101"} for name in CONDITIONS
        }
        assert all(len(row) == len(columns) for rows in values.values() for row in rows.values())
    norms = record["measurements"][0]["values_by_seed"]["per-loop-rmsnorm"]["42"]
    assert norms[:4] == [10.0, 10.0, 40.0, 4.0]


def test_page_says_what_is_missing(page):
    text = (page / "claims.md").read_text()
    assert "**10 of 27 runs are missing:**" in text
    assert "`terminal-raw` seed 202 (not there)" in text
    assert "`per-loop-raw` seed 101 (diverged)" in text
    first, second = (text.partition(f"### {number}. ")[2].partition("\n#")[0] for number in (1, 2))
    assert "**reproduced**: 1 of 1 seeds (2 of 3 missing)." in first
    assert "Seeds: 42; 101, 202 missing." in first
    assert "**not reproduced**: 1 of 2 seeds (1 of 3 missing)." in second
    assert "The rules fail for 101." in second
    assert "| 19,575.0 (150.0 to 39,000.0) |" in second
    record = json.loads((page / "claims.json").read_text())["claims"][1]
    assert record["values_by_seed"] == {"42": [39_000.0, 20.0], "101": [150.0, 20.0]}
    assert record["seeds_that_hold"] == [42]


def test_page_can_be_read_and_is_small(page):
    text = (page / "claims.md").read_text()
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert {claim.figure for claim in TESTABLE} <= links
    assert all((page / link).is_file() for link in links)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == len(TESTABLE) + 5 + len(TABLES)
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table
    assert sum(path.stat().st_size for path in page.iterdir()) < 3e6
