"""bench/scaling.py on tiny shapes: the curves, their lines, the files."""

import json

import pytest

from bench import scaling
from bench.scaling import Curve


def test_line_and_deviation():
    straight = Curve("readout", "K", "fused", [1, 2, 4], [3.0, 5.0, 9.0], [1, 1, 1])
    straight.fit()
    assert (straight.slope, straight.intercept) == pytest.approx((2.0, 1.0))
    assert straight.worst_deviation == pytest.approx(0.0, abs=1e-9)
    bent = Curve("readout", "K", "fused", [0, 1, 2], [1.0, 1.0, 4.0], [1, 1, 1])
    bent.fit()  # the line 0.5 + 1.5 K is off by 0.5, 1.0, 0.5
    assert bent.worst_deviation == pytest.approx(1.0)


def test_smoke_writes_record_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "SMOKE_LOOPS", (1, 2))
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the operations themselves have tests of their own
    scaling.main(["--smoke", "--rounds", "1", "--out", str(tmp_path)])
    (record_path,) = tmp_path.glob("*-scaling.jsonl")
    figure = record_path.with_suffix(".png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    place, *curves = map(json.loads, record_path.read_text().splitlines())
    assert [(c["x"], c["variant"]) for c in curves] == [
        (x, variant) for x in ("K", "N", "V", "K", "N") for variant in ("fused", "plain")
    ]
    assert all(len(c["seconds"]) == len(c["peak_bytes"]) == len(c["values"]) for c in curves)
    assert all(second > 0 for c in curves for second in c["seconds"])
    plain_over_tokens = next(c for c in curves if c["x"] == "N" and c["variant"] == "plain")
    assert plain_over_tokens["peak_bytes"] == sorted(plain_over_tokens["peak_bytes"])
    assert place["commit"] is not None


def test_tiny_shapes_are_no_record(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--smoke"])
    assert "--smoke needs --out" in capsys.readouterr().err
