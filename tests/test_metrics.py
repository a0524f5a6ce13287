import json
import math
import resource

import pytest
from forked_runs import run_forked

from looped.whole_file import replacing
from train.metrics import MetricsLog, finite, foreign_lines, read_metrics, write_json, write_record


def test_nan_and_infinity_are_null(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": 3, "e": "nan", "f": None}
    expected = {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": 3, "e": "nan", "f": None}
    assert finite(value) == expected
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_record_has_an_item_of_a_list_on_a_line(tmp_path):
    write_record(tmp_path / "x.json", {"a": [1, math.nan], "runs": [{"b": math.inf}, {"b": 2}], "none": []})
    assert (tmp_path / "x.json").read_text() == (
        '{\n"a": [1, null],\n"runs": [\n{"b": null},\n{"b": 2}\n],\n"none": []\n}\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def row(step: int | str, **fields) -> dict:
    per_loop = {"ce": [8.0, None], "state_norm": [2.0, 3.0], "radial_fraction": [None, None]}
    scalars = {"tokens": 64, "loss": 8.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 100.0}
    return {"step": step} | scalars | per_loop | fields


def test_rows_are_readable_at_once_and_kept_on_reopening(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.append(row(step, loss=math.nan))
        assert read_metrics(path)[-1] == row(step, loss=None)
    log = MetricsLog(path, keep=lambda row: row["step"] <= 3)
    assert [kept["step"] for kept in log.kept] == [1, 2, 3]
    log.append(row(4))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_rows_of_changing_depth(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [row(n, n_loops=n, **dict.fromkeys(("ce", "state_norm", "radial_fraction"), [1.0] * n)) for n in (3, 1, 8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    assert read_metrics(path) == rows
    assert foreign_lines(path) == []


FOREIGN = {
    "cut": b'{"st',
    "not UTF-8": b'{"step": 2, "note": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "another program's": b'{"step": 2, "loss": 3.5}',
    "no step": json.dumps(row("two", tokens=2)).encode(),
    "tokens that are no number": json.dumps(row(2, tokens=None)).encode(),
    "a step that cannot be": json.dumps(row(-10)).encode(),
    "a loss in words": json.dumps(row(2, loss="low")).encode(),
    "lists of two lengths": json.dumps(row(2, ce=[1.0])).encode(),
    "endless": b"[" * 100_000,
    "binary": bytes(range(10)) + bytes(range(11, 256)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_lines_that_are_no_rows_are_left_out_and_told(tmp_path, name):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(row(step)).encode() + b"\n" for step in (1, 3)]
    path.write_bytes(whole[0] + b"\n" + FOREIGN[name] + b"\n" + whole[1])
    assert foreign_lines(path) == [3]  # the second is blank
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    MetricsLog(path)
    assert path.read_bytes() == b"".join(whole)
    assert foreign_lines(path) == []


def test_a_last_line_cut_short_is_no_foreign_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + '\n{"st')
    assert foreign_lines(path) == []
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert read_metrics(tmp_path / "none.jsonl") == foreign_lines(tmp_path / "none.jsonl") == []


def test_of_a_row_that_does_not_fit_nothing_stays(tmp_path):
    """In a process that may write no file beyond a size, in the midst of a row."""
    path, line = tmp_path / "metrics.jsonl", len(json.dumps(row(1))) + 1

    def write() -> int:
        log = MetricsLog(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (line * 5 // 2, resource.RLIM_INFINITY))
        for _ in range(3):
            log.append(row(1))
        return 0

    code, error = run_forked(write)
    assert code == 70
    assert error.endswith(f"\nOSError: [Errno 27] File too large: '{path}'\n")
    assert path.stat().st_size == 2 * line


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def fail() -> None:
        with replacing(path) as scratch:
            scratch.write_text("half")
            raise OSError(27, "File too large")

    with pytest.raises(OSError, match=r"File too large: '.*x.json'"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text()) == {"a": 1}
