"""What a session of benchmarks keeps: ratios, verdicts, the files of a day."""

import json

import pytest
import torch

from bench.measure.accuracy import (
    FLOOR,
    closest_to_limit,
    is_correct,
    limits,
    limits_of_float32_loss,
    limits_with_mean_loss,
)
from bench.measure.records import Results, Session, complete, read, write
from bench.measure.tables import markdown
from looped.provenance import machine_slug


def record(implementation: str, ratio: float, *, group: str = "readout K4", correct: bool = True, **fields):
    return {
        "subject": "readout",
        "group": group,
        "smoke": False,
        "implementation": implementation,
        "milliseconds": 100 * ratio,
        "rounds": 3,
        "gflops_per_second": 300 / ratio,
        "share_of_roof": 0.8 / ratio,
        "peak_memory_mib": 12.5,
        "ratio_to_fused": ratio,
        "ratio_quartiles": [ratio - 0.25, ratio + 0.25],
        "correct": correct,
        "errors": {"loss": 1e-3, "dhead": 2e-3},
        "allowed": {"loss": 1e-3, "dhead": 4e-3},
        "device": "Some CPU @ 2.00GHz",
        "instructions": "avx2",
        "memory": {"l2_bytes": 2**19, "l3_bytes": None, "ram_bytes": 3 * 2**30},
        "threads": 2,
        "versions": {"torch": "2.13.0", "liger-kernel": None},
        "commit": "0123abc",
        "date": "2026-01-02",
    } | fields


def test_fastest_competitor_is_right_and_not_ours():
    records = [record("fused", 1.0), record("plain", 2.0), record("quick", 1.25), record("wrong", 0.5, correct=False)]
    complete(records)
    assert {r["fastest_competitor"] for r in records} == {"quick"}
    assert [r["ratio_to_fastest"] for r in records] == pytest.approx([0.8, 1.6, 1.0, 0.4])


def test_shares_of_the_roof_follow_from_the_fused_one_and_the_ratio_to_it():
    records = [record("plain", 2.0, share_of_roof=None), record("fused", 1.0, share_of_roof=0.9)]
    lone = record("plain", 2.0, group="readout K8", share_of_roof=None)
    complete([*records, lone])
    assert [r["share_of_roof"] for r in (*records, lone)] == [pytest.approx(0.45), 0.9, None]
    assert "| 150.0 GFLOP/s |  |" in markdown(Results([lone]))


def test_complete_keeps_groups_apart_and_follows_later_records():
    records = [record("fused", 1.0), record("plain", 3.0), record("fused", 1.0, group="readout K8")]
    complete(records)
    assert records[2]["fastest_competitor"] is None
    assert records[2]["ratio_to_fastest"] is None
    records.append(record("compiled", 1.5))
    complete(records)
    assert [r["ratio_to_fastest"] for r in records] == [pytest.approx(1 / 1.5), pytest.approx(2.0), None, 1.0]


def test_twice_the_error_of_plain_in_the_same_dtype_is_allowed():
    allowed = limits({"dstates": 1e-3, "dhead": 1e-2})
    assert is_correct({"dstates": 2e-3, "dhead": 2e-2}, allowed)
    assert not is_correct({"dstates": 2.1e-3, "dhead": 1e-2}, allowed)
    assert not is_correct({"dstates": float("nan"), "dhead": 1e-2}, allowed)
    assert not is_correct({"dstates": 1e-3}, allowed), "a result that is missing is wrong"


def test_the_verdict_on_a_loss_does_not_hang_on_plain_pytorchs_luck():
    """bf16 keeps 8 bits: rounding alone may cost 2^-8 = 3.9e-3."""
    for luck in (1e-9, 3e-3):
        allowed = limits_with_mean_loss({"loss": luck, "dhead": 1e-3}, torch.bfloat16)
        assert is_correct({"loss": 3.8e-3, "dhead": 1e-3}, allowed)
        assert not is_correct({"loss": 5e-3, "dhead": 1e-3}, allowed), "torch's chunked loss in bf16"
        assert not is_correct({"loss": 3.8e-3, "dhead": 3e-3}, allowed)
    assert limits_with_mean_loss({"loss": 6e-3}, torch.bfloat16) == {"loss": 6e-3 + FLOOR}, (
        "plain is never wrong itself"
    )


def test_the_error_that_breaks_the_rule_is_named():
    allowed = {"loss": 1e-3, "dhead": 1e-1}
    assert closest_to_limit({"loss": 2e-3, "dhead": 9e-2}, allowed) == "loss"
    assert closest_to_limit({"loss": 1e-4, "dhead": 9e-2}, allowed) == "dhead"
    assert closest_to_limit({"loss": float("nan"), "dhead": 9e-1}, allowed) == "loss"


def test_markdown_has_a_row_for_each_and_marks_what_is_wrong():
    records = [record("plain", 2.0), record("fused", 1.0), record("bad", 1.5, correct=False)]
    complete(records)
    skipped = [{"group": "readout K4", "implementation": "liger", "reason": "needs a GPU"}]
    sessions = [{"finished": "2026-01-02T03:04:05+00:00", "records": 3, "skipped": 1, "wall_seconds": 61.2}]
    lines = markdown(Results(records, skipped, sessions)).splitlines()
    rows = [line for line in lines if line.startswith(("| fused", "| plain", "| bad"))]
    assert [row.split(" | ")[0] for row in rows] == ["| fused", "| bad", "| plain"], "fastest first"
    verdict = "right (loss 1.0e-03, allowed 1.0e-03)"
    assert rows[0] == f"| fused | 100 | 300.0 GFLOP/s | 80% | 12.5 | 1.00 | 0.50 | 3 | {verdict} |"
    assert "| 2.00 (1.75-2.25) |" in rows[2]
    assert "**wrong**" in rows[1]
    assert "**wrong**" not in rows[2]
    header = next(line for line in lines if line.startswith("| implementation"))
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert "Skipped: liger: needs a GPU" in lines
    machine = "Some CPU @ 2.00GHz, avx2, 2 threads, L2 0.5 MiB, RAM 3.0 GiB"
    assert lines[-2:] == [
        f"- 2026-01-02, {machine}, torch 2.13.0, commit 0123abc",
        "- 2026-01-02T03:04:05+00:00: 3 measurements in 61 s",
    ]


def test_markdown_writes_bytes_and_tokens():
    norm = record("fused", 1.0, gigabytes_per_second=20.0)
    del norm["gflops_per_second"]
    step = record("plain", 2.0, tokens_per_second=150.4)
    complete([norm, step])
    text = markdown(Results([norm, step]))
    assert "| 20.0 GB/s |" in text
    assert "| 150.0 GFLOP/s, 150 tokens/s |" in text


def test_write_replaces_what_is_measured_again_and_keeps_all_else(tmp_path):
    skip = {"group": "readout K4", "implementation": "liger", "reason": "needs a GPU"}
    gone = {"group": "readout K4", "implementation": "compiled", "reason": "no compiler"}
    first = [record("fused", 1.0), record("plain", 2.0), record("fused", 1.0, group="readout K8")]
    later = [record("plain", 3.0, commit="later"), record("compiled", 1.5, commit="later")]
    for records, skipped in ((first, [skip, gone]), (later, [])):
        complete(records)
        path = write(Session(records, skipped), tmp_path)
    assert path.name == "2026-01-02-some-cpu-2-00ghz-avx2-2-threads.jsonl"
    kept = read(path)
    assert {(r["group"], r["implementation"], r["commit"]) for r in kept.records} == {
        ("readout K4", "fused", "0123abc"),
        ("readout K4", "plain", "later"),
        ("readout K4", "compiled", "later"),
        ("readout K8", "fused", "0123abc"),
    }
    assert kept.records[0]["ratio_to_fastest"] == pytest.approx(1 / 1.5), "of the whole group"
    assert kept.skipped == [skip]
    assert [session["records"] for session in kept.sessions] == [3, 2]
    assert all(session["wall_seconds"] >= 0 for session in kept.sessions)


def test_a_file_has_a_line_for_each_measurement_and_each_place(tmp_path):
    """And what is read is what was measured, to six digits."""
    records = [record("fused", 1.0), record("plain", 1 / 3), record("compiled", 1.5, commit="later")]
    complete(records)
    path = write(Session(records), tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["place", "measurement", "measurement", "place", "measurement", "session"]
    assert [line["place"] for line in lines[:-1]] == [0, 0, 0, 1, 1]
    assert not any("device" in line for line in lines if line["kind"] == "measurement")
    for kept, measured in zip(read(path).records, records, strict=True):
        for name, value in kept.items():
            number = isinstance(value, float) or name == "ratio_quartiles"
            assert value == (pytest.approx(measured[name], rel=1e-5) if number else measured[name])


def test_smoke_never_enters_the_results(tmp_path, monkeypatch):
    """Elsewhere it does, for those who look whether a record is written."""
    skip = {"group": "smoke readout K4", "implementation": "liger", "reason": "needs a GPU"}
    session = Session([record("fused", 1.0, group="smoke readout K4", smoke=True)], [skip])
    elsewhere = write(session, tmp_path / "elsewhere")
    assert elsewhere is not None
    assert [len(read(elsewhere).records), read(elsewhere).skipped] == [1, [skip]]
    monkeypatch.setattr("bench.measure.records.RESULTS", tmp_path / "results")
    assert write(session, tmp_path / "results") is None
    assert not (tmp_path / "results").exists()


def test_a_session_may_be_written_again_and_again(tmp_path):
    """As it goes: what it has measured by then, and one line of itself; facts by their names."""
    place = {name: record("fused", 1.0)[name] for name in ("device", "instructions", "threads", "date")}
    session = Session([record("fused", 1.0)], facts=[{"name": "tests", "passed": 1, **place}])
    write(session, tmp_path)
    session.records.append(record("plain", 2.0))
    path = write(session, tmp_path)
    write(Session(facts=[{"name": "tests", "passed": 2, **place}]), tmp_path)
    assert path is not None
    found = read(path)
    assert [r["implementation"] for r in found.records] == ["fused", "plain"]
    assert [s["records"] for s in found.sessions] == [2, 0]
    assert [fact["passed"] for fact in found.facts] == [2]


def test_slug_tells_machines_apart():
    intel = {"device": "Intel(R) Xeon(R) Processor @ 2.70GHz", "instructions": "amx", "threads": 2}
    assert machine_slug(intel) == "intel-xeon-processor-2-70ghz-amx-2-threads"
    assert machine_slug(intel | {"instructions": "avx512-bf16"}) != machine_slug(intel)
    gpu = {"device": "NVIDIA H100 80GB HBM3", "instructions": "sm-90", "threads": 8}
    assert machine_slug(gpu) == "nvidia-h100-80gb-hbm3-sm-90-8-threads"


def test_a_float32_loss_is_held_to_half_a_rounding_however_wrong_plain_is():
    allowed = limits_of_float32_loss(
        limits_with_mean_loss({"loss": 6e-3, "dhead": 1e-3}, torch.bfloat16), torch.bfloat16
    )
    assert allowed["dhead"] == 2e-3 + FLOOR
    assert is_correct({"loss": 1.9e-3, "dhead": 2e-3}, allowed)
    assert not is_correct({"loss": 2e-3, "dhead": 2e-3}, allowed)
