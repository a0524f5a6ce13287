"""The tables of bench/README.md are those of the newest record, and what it links to is there."""

import json
import re
from pathlib import Path

import pytest
from test_bench_records import record

from bench.measure import tables
from bench.measure.records import Session, complete, write, write_lines

SKIP = {"group": "readout K4", "implementation": "liger", "reason": "needs a GPU"}


def test_readme_has_the_tables_of_the_newest_record():
    page = tables.README.read_text()
    assert tables.insert(page, tables.render(tables.newest())) == page, "run python -m bench.measure.tables"
    for target in re.findall(r"\]\((results/[^)]+)\)", page):
        assert (tables.README.parent / target).exists(), target


def written(directory: Path, records: list[dict]) -> Path:
    complete(records)
    path = write(Session(records, [SKIP]), directory)
    assert path is not None
    return path


def test_a_row_for_each_case(tmp_path):
    records = [
        record("fused", 1.0), record("plain", 2.0), record("quick", 1.5), record("bad", 0.5, correct=False),
        record("plain", 3.0, group="readout K8"),
    ]  # fmt: skip
    text = tables.render(written(tmp_path, records))
    assert "| K4 | 100 | 300 GFLOP/s | 80% | 2.00 (1.75-2.25) | 1.50 (1.25-1.75), quick | 12, 12 |" in text
    assert "| K8 | - | - | - | 3.00 (2.75-3.25) | 3.00 (2.75-3.25), plain | -, 12 |" in text
    assert "- Wrong (cases): bad (1)." in text
    assert "- Skipped (cases): liger: needs a GPU (1)." in text
    assert "- 5 measurements took 0 minutes." in text


def test_the_newest_record_is_the_one_that_finished_last(tmp_path):
    first = written(tmp_path, [record("fused", 1.0)])
    second = written(tmp_path, [record("fused", 1.0, instructions="amx")])
    for path, finished in ((first, "2026-01-02T10:00:00+00:00"), (second, "2026-01-02T09:00:00+00:00")):
        *lines, session = map(json.loads, path.read_text().splitlines())
        write_lines(path, [*lines, session | {"finished": finished}])
    assert tables.newest(tmp_path) == first
    with pytest.raises(FileNotFoundError, match="must hold a record"):
        tables.newest(tmp_path / "none")


def test_insert_needs_both_markers():
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    assert tables.insert(page, "new") == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter"
    with pytest.raises(ValueError, match="must hold the markers"):
        tables.insert(f"{tables.BEGIN} and no end", "new")
