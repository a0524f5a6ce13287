"""The bench of stopping early, on a run of a few steps; its figures from points that are known."""

import json

import pytest
from tiny_run import arguments

from bench.exits import TOLERANCES, main
from bench.measure.place import environment
from train.run import main as train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exits")
    assert train(arguments(directory, "--supervision", "gated", "--out", str(directory / "run"))) == 0
    return directory / "run"


def test_record_figure_and_page(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.exits.environment", lambda *where: environment() | {"measured_on": str(where)})
    words = [str(run), "--tokens", "128", "--rounds", "1", "--new-tokens", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    (path,) = tmp_path.glob("*-exits.json")
    record = json.loads(path.read_text())
    assert record["measured_on"] == "(device(type='cpu'),)"  # where it runs, whatever else is there
    curves = record["curves"]
    assert list(curves) == ["fixed", "margin", "top-probability", "entropy", "state-change", "gate"]
    assert [each["loops"] for each in curves["fixed"]] == [3.0, 2.0, 1.0]
    assert curves["fixed"][0]["ratio"] == 1.0
    assert curves["fixed"][0]["speed"] == 1.0
    for name, points in curves.items():
        assert all(each["tokens_per_second"] > 0 for each in points)
        if name != "fixed":
            assert [each["tolerance"] for each in points] == list(TOLERANCES)
            loops = [each["loops"] for each in points]
            assert loops == sorted(loops, reverse=True)  # more is allowed, fewer loops are taken
    ways = {each["way"]: each for each in record["generation"]}
    assert list(ways) == ["K = 3", "K = 2", "K = 1", *list(curves)[1:], "K = 1 drafts"]
    assert [ways[f"K = {k}"]["loops"] for k in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert ways["K = 1 drafts"]["same_as_k"] == 1.0  # greedy speculation is exact
    assert path.with_suffix(".png").stat().st_size > 10_000
    page = path.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("\n| gate |") == len(TOLERANCES) + 1


def test_refuses_what_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err
