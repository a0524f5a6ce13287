"""bench/depth.py on a tiny model: the runs, the curves, the files."""

import json
import re

import pytest
from tiny_run import arguments

from bench import depth
from bench.measure.place import environment
from train.run import main


def test_curves_and_files(tmp_path, monkeypatch, capsys):
    trained = []

    def train_tiny(options):
        trained.append(options)
        return main(arguments(tmp_path, *options))

    monkeypatch.setattr(depth, "train", train_tiny)
    monkeypatch.setattr(depth, "environment", lambda *where: environment() | {"measured_on": str(where)})
    options = ["--runs", str(tmp_path / "runs"), "--steps", "3", "--tokens", "64", "--supervision", "terminal"]
    for _ in range(2):  # the second takes the runs that are there
        depth.main([*options, "--out", str(tmp_path / "out")])
    assert len(trained) == 3
    (path,) = (tmp_path / "out").glob("*-depth.json")
    record = json.loads(path.read_text())
    assert record["measured_on"] == "(device(type='cpu'),)"  # where it runs, whatever else is there
    assert [curve["depth"] for curve in record["curves"]] == ["fixed", "uniform:1-8", "poisson:4"]
    assert record["curves"][0]["mean_loops"] == 4
    assert record["curves"][1]["mean_loops"] != 4
    for curve in record["curves"]:
        assert len(curve["ce"]) == len(record["loops"]) == 16
        assert curve["seconds"] > 0
        summary = json.loads(
            (tmp_path / "runs" / f"terminal-{curve['depth'].replace(':', '-')}/summary.json").read_text()
        )
        assert summary["evaluation"][3]["ce"] != curve["ce"][3]  # on other tokens
        assert summary["evaluation"][3]["ce"] == pytest.approx(curve["ce"][3], abs=0.1)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = path.with_suffix(".md").read_text().splitlines()[-3:]
    assert [line.split(" | ")[1] for line in lines] == ["`fixed`", "`uniform:1-8`", "`poisson:4`"]
    assert lines[0].split(" | ")[3] == f"{record['curves'][0]['ce'][0]:.3f}"
    with pytest.raises(SystemExit):
        depth.main([*options, "--steps", "4", "--out", str(tmp_path / "out")])
    assert re.search(
        r"terminal-fixed must be a run of terminal, fixed, 4 steps\. Got \(.*Remove it", capsys.readouterr().err
    )
