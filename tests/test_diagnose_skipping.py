"""Halting policies of a diagnosis: with all loops computed, with later loops left out, and on the page."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diagnosed_models import N_LOOPS, Recurrence, batches, measurements
from tiny_decoder import model, tokens
from torch import Tensor

from looped.diagnose import Batch, Diagnosis, diagnose, from_decoder, read_record, write_record
from looped.diagnose.halting import measure_halting
from looped.diagnose.skipping import NO_POLICY
from looped.diagnose.tables import SECTIONS
from looped.diagnose.verdict import judge
from looped.early_exit import run_with_exits
from looped.halting import WITHOUT_A_GATE, calibrate, exit_loops
from looped.model import LoopedLM

NAMES = ["margin", "top-probability", "entropy", "state-change"]
POLICY_TABLE = next(section for section in SECTIONS if section.title.startswith("8."))


def windows(length: int, sizes: tuple[int, ...] = (3, 4)) -> list[Batch]:
    """Of unequal size, so that the halves begin within a batch."""
    rows = [tokens(size, length + 1, seed=seed) for seed, size in enumerate(sizes)]
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def test_every_policy_is_calibrated_and_reported():
    """Of a model that is no LoopedLM, against scores of its own."""
    network = Recurrence()
    measured = measure_halting(network.described(), batches((3, 2), 40), tolerance=1.05)
    rows, targets = (torch.cat(parts) for parts in zip(*batches((3, 2), 40), strict=True))
    with torch.no_grad():
        embedded = network.embedding(rows)
        states = [embedded]
        for _ in range(N_LOOPS):
            states.append(network.advance(states[-1], embedded, 0))
        logits = torch.stack([network.head(network.norm(state)) for state in states[1:]])
    p, best = logits.softmax(-1), logits.sort(-1, descending=True).values
    change = [(a - b).norm(dim=-1) / a.norm(dim=-1) for b, a in pairwise(states)]
    scores = dict(zip(NAMES, (best[..., 0] - best[..., 1], p.amax(-1), (p * p.log()).sum(-1)), strict=False))
    scores["state-change"] = -torch.stack(change)
    loss = losses(logits, targets.expand(N_LOOPS, -1, -1))
    assert list(measured.policies) == NAMES
    for name, score in scores.items():
        halt = measured.policies[name]
        tau = calibrate(loss[:, :2], score[:, :2], 1.05)
        assert (math.inf if halt.tau is None else halt.tau) == pytest.approx(tau)
        exits = exit_loops(score[:, 2:], tau)
        assert halt.loops == pytest.approx(exits.double().mean().item())
        assert halt.exits == pytest.approx([(exits == k).double().mean().item() for k in range(1, N_LOOPS + 1)])
    assert measured.policies["margin"] == measured.as_trained
    assert measured.exit_gap == pytest.approx((loss[0, 2:] - loss[-1, 2:]).mean().item())
    assert measured.skipped == {}


CHANGES: list[dict[str, Any]] = [
    {},
    {"readout": "final-only", "embedding_std": 0.3},
    {"exit_gate": True, "n_coda": 1, "embedding_std": 0.2, "seed": 1},
    {"injection": "add", "start": "zero", "n_coda": 1, "embedding_std": 0.2, "seed": 2},
]


def decoder_of(changes: dict) -> LoopedLM:
    decoder = model(n_loops=4, **changes).double().eval()
    if decoder.exit_gate is not None:
        torch.nn.init.normal_(decoder.exit_gate.weight)
    return decoder


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_is_left_out_matters_to_no_token_that_is_alone(changes):
    """In windows of one token: the scores, readings and outcomes are those that nothing is left out of."""
    measured = measure_halting(from_decoder(decoder_of(changes)), windows(1, (33, 40)), 1.1)
    assert list(measured.skipped) == [NO_POLICY, *NAMES, *(["gate"] if "exit_gate" in changes else [])]
    for name, halt in measured.policies.items():
        skipped = measured.skipped[name]
        assert skipped.exits == halt.exits
        assert skipped.loops == halt.loops
        assert skipped.ratio == pytest.approx(halt.ratio, rel=1e-12)
    assert any(1 < halt.loops < 4 for halt in measured.policies.values())
    assert "gate" not in measured.policies or 1 < measured.policies["gate"].loops < 4


def test_what_is_left_out_is_measured_on_the_report_slice():
    decoder = decoder_of({"positions": "rotary"})
    measured = measure_halting(from_decoder(decoder), windows(9), 1.1)
    rows, targets = (torch.cat(parts)[3:] for parts in zip(*windows(9), strict=True))
    with torch.no_grad():
        at_k = losses(decoder(rows, logits=True).logits, targets).mean()
    for policy in WITHOUT_A_GATE:
        tau = measured.policies[policy.name].tau
        exits = run_with_exits(decoder, rows, policy, math.inf if tau is None else tau)
        skipped = measured.skipped[policy.name]
        assert skipped.loops == exits.loops.double().mean().item()
        assert skipped.exits == pytest.approx([(exits.loops == k).double().mean().item() for k in (1, 2, 3, 4)])
        assert skipped.ratio == pytest.approx(math.exp(losses(exits.logits, targets).mean() - at_k), rel=1e-12)
        assert math.isnan(skipped.speed)
    fixed = measured.skipped[NO_POLICY]
    assert (fixed.loops, fixed.exits, fixed.ratio) == (4.0, [0.0, 0.0, 0.0, 1.0], 1.0)


def test_the_speed_is_timed_in_turn(monkeypatch):
    """Median of tokens over seconds, and of the quotients with the same round's K loops; the clock is ours."""
    seconds = iter([8.0, 1.0, 2.0, 4.0, 8.0, 4.0, 2.0, 1.0, 2.0, 1.0, 10.0, 5.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr("looped.diagnose.skipping._seconds", lambda run, batches: next(seconds))
    measured = measure_halting(from_decoder(decoder_of({})), windows(6), rounds=3)
    tokens_timed = 4 * 6
    rounds = {NO_POLICY: (8, 4, 10), "margin": (1, 2, 5), "entropy": (4, 2, 5)}
    for name, times in rounds.items():
        quotients = [fixed / time for fixed, time in zip(rounds[NO_POLICY], times, strict=True)]
        assert measured.skipped[name].speed == sorted(quotients)[1]
        assert measured.skipped[name].tokens_per_second == tokens_timed / sorted(times)[1]


def test_time_is_taken():
    timed = measure_halting(from_decoder(model().eval()), windows(6), rounds=1).skipped
    assert all(each.tokens_per_second > 0 for each in timed.values())
    assert timed[NO_POLICY].speed == 1.0


def test_on_the_page():
    diagnosis = Diagnosis("mine", 512, measurements(), judge(measurements()), {})
    shares = "70.0% / 10.0% / 10.0% / 10.0%"
    gap = "+0.0200"
    assert list(POLICY_TABLE.rows(diagnosis)) == [
        ("none, K = 4", "-", "-", "-", 4.0, "1.0020", shares, "3,000", "1.00", gap),
        ("margin", 0.5, 1.0, "1.0090", 1.0, "1.0020", shares, "3,000", "4.00", gap),
        ("state-change", -0.03, 1.5, "1.0090", 1.6, "1.0020", shares, "3,000", "2.50", gap),
    ]
    assert len(POLICY_TABLE.columns) == 10


def test_without_times_or_a_decoder_the_page_has_no_numbers_of_them(tmp_path):
    halting = measurements().halting
    untimed = {
        name: dataclasses.replace(each, speed=math.nan, tokens_per_second=math.nan)
        for name, each in halting.skipped.items()
    }
    for skipped, expected in ((untimed, ("-", "-")), ({}, ("-", "-"))):
        measured = measurements(halting=dataclasses.replace(halting, skipped=skipped))
        write_record([Diagnosis("mine", 512, measured, judge(measured), {})], tmp_path / "diagnosis.json")
        read = read_record(tmp_path / "diagnosis.json")[0]
        rows = {row[0]: row for row in POLICY_TABLE.rows(read)}
        assert rows["margin"][7:9] == expected
        assert rows["margin"][4] == (1.0 if skipped else "-")


def test_bad_input_is_refused_before_anything_is_computed(monkeypatch):
    described = from_decoder(model().eval())
    monkeypatch.setattr("looped.diagnose.halting._slices", None)
    with pytest.raises(ValueError, match=r"^tolerance must be at least 1. Got tolerance=0.5.$"):
        measure_halting(described, windows(6), 0.5)
    with pytest.raises(ValueError, match=r"^rounds must be at least 0. Got rounds=-1.$"):
        measure_halting(described, windows(6), rounds=-1)
    monkeypatch.setattr("looped.diagnose.diagnosis.measure_depth", None)
    with pytest.raises(ValueError, match=r"^rounds must be at least 0. Got rounds=-1.$"):
        diagnose(described, windows(6), rounds=-1)
