"""What a session of benchmarks keeps: ratios, verdicts, the files of a day."""

import json

import pytest
import torch

from bench.accuracy import allowing_for_luck, is_correct
from bench.records import complete, markdown, slug, write


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
        "correct": correct,
        "errors": {"loss": 1e-7, "dhead": 2e-3},
        "device": "Some CPU @ 2.00GHz",
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


def test_complete_keeps_groups_apart_and_follows_later_records():
    records = [record("fused", 1.0), record("plain", 3.0), record("fused", 1.0, group="readout K8")]
    complete(records)
    assert records[2]["fastest_competitor"] is None
    assert records[2]["ratio_to_fastest"] is None
    records.append(record("compiled", 1.5))
    complete(records)
    assert [r["ratio_to_fastest"] for r in records] == [pytest.approx(1 / 1.5), pytest.approx(2.0), None, 1.0]


def test_is_correct_compares_with_plain_in_the_same_dtype():
    allowed = {"loss": 1e-3, "dhead": 1e-2}
    assert is_correct({"loss": 2e-3, "dhead": 2e-2}, allowed)
    assert not is_correct({"loss": 2.1e-3, "dhead": 1e-2}, allowed)
    assert not is_correct({"loss": float("nan"), "dhead": 1e-2}, allowed)
    assert not is_correct({"loss": 1e-3}, allowed), "a result that is missing is wrong"


def test_a_lucky_loss_of_plain_pytorch_condemns_nobody_but_a_wrong_one():
    allowed = allowing_for_luck({"loss": 1e-9, "dhead": 1e-3}, torch.bfloat16)
    assert is_correct({"loss": 5e-4, "dhead": 1e-3}, allowed)
    assert not is_correct({"loss": 1.1e-2, "dhead": 1e-3}, allowed), "torch's chunked loss in bf16"
    assert not is_correct({"loss": 5e-4, "dhead": 3e-3}, allowed)


def test_markdown_has_a_row_for_each_and_marks_what_is_wrong():
    records = [record("plain", 2.0), record("fused", 1.0), record("bad", 1.5, correct=False)]
    complete(records)
    lines = markdown(records).splitlines()
    rows = [line for line in lines if line.startswith(("| fused", "| plain", "| bad"))]
    assert [row.split(" | ")[0] for row in rows] == ["| fused", "| bad", "| plain"], "fastest first"
    assert rows[0] == "| fused | 100 | 300.0 GFLOP/s | 80% | 12.5 | 1.00 | 0.50 | right (dhead 2.0e-03) |"
    assert "**wrong**" in rows[1]
    assert "**wrong**" not in rows[2]
    header = next(line for line in lines if line.startswith("| implementation"))
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert lines[-1] == "- 2026-01-02, Some CPU @ 2.00GHz, 2 threads, torch 2.13.0, commit 0123abc"


def test_markdown_writes_bytes_and_tokens():
    norm = record("fused", 1.0, gigabytes_per_second=20.0)
    del norm["gflops_per_second"]
    step = record("plain", 2.0, tokens_per_second=150.4)
    complete([norm, step])
    text = markdown([norm, step])
    assert "| 20.0 GB/s |" in text
    assert "| 150.0 GFLOP/s, 150 tokens/s |" in text


def test_write_replaces_groups_and_keeps_the_others(tmp_path):
    first = [record("fused", 1.0), record("fused", 1.0, group="readout K8")]
    later = [record("fused", 1.0, commit="later"), record("plain", 2.0, commit="later")]
    for records in (first, later):
        complete(records)
        paths = write(records, tmp_path)
    assert [path.name for path in paths] == ["2026-01-02-some-cpu-2-threads.json", "2026-01-02-some-cpu-2-threads.md"]
    kept = json.loads(paths[0].read_text())["records"]
    assert {(r["group"], r["implementation"], r["commit"]) for r in kept} == {
        ("readout K4", "fused", "later"),
        ("readout K4", "plain", "later"),
        ("readout K8", "fused", "0123abc"),
    }
    assert paths[1].read_text() == markdown(kept)


def test_write_leaves_smoke_out(tmp_path):
    assert write([record("fused", 1.0, smoke=True)], tmp_path / "results") == []
    assert not (tmp_path / "results").exists()


def test_slug():
    assert slug("Intel(R) Xeon(R) Processor @ 2.70GHz", 2) == "intel-xeon-processor-2-threads"
    assert slug("NVIDIA H100 80GB HBM3", 8) == "nvidia-h100-80gb-hbm3-8-threads"
