import json
import math

from train.metrics import MetricsLog, finite, read_metrics, write_json


def test_nan_and_infinity_are_null(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": 3, "e": "nan", "f": None}
    expected = {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": 3, "e": "nan", "f": None}
    assert finite(value) == expected
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_rows_are_readable_at_once_and_kept_on_reopening(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.append({"step": step, "loss": math.nan})
        assert read_metrics(path)[-1] == {"step": step, "loss": None}
    log.close()
    log = MetricsLog(path, keep=lambda row: row["step"] <= 3)
    log.append({"step": 4})
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    log = MetricsLog(path)
    log.append({"step": 3})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert read_metrics(tmp_path / "none.jsonl") == []
