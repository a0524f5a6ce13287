import importlib.metadata
import math
import sys

import matplotlib.pyplot as plt
import pytest
import torch
from tiny_run import arguments

import train
from train.picture import draw
from train.report import environment, table
from train.run import main
from train.step import LoopResult

RESULTS = [
    LoopResult(1, 1.5, math.exp(1.5), 1.25, 20.0, 80_000.0),
    LoopResult(2, 1.25, math.exp(1.25), None, 39_207.0, 41_000.0),
]


def row(step: int, **fields):
    defaults = {"loss": 8.0 / step, "ce": [8.0 / step, 7.0 / step], "state_norm": [20.0, 30.0 * step]}
    return {"step": step} | defaults | fields


def test_table():
    lines = table(RESULTS).splitlines()
    assert lines[0].split() == ["K", "CE", "PPL", "bits/byte", "||H_K||", "tokens/s"]
    assert lines[1].split() == ["1", "1.5000", "4.482", "1.2500", "20", "80,000"]
    assert lines[2].split() == ["2", "1.2500", "3.49", "-", "3.921e+04", "41,000"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [row(1), row(10), row(20)],
        [row(1)],
        [],
        [row(1), row(10, loss=None, ce=[None, 1.0], state_norm=[None, None])],  # terminal supervision; divergence
        [row(step, state_norm=[10.0**step, 10.0 ** (2 * step)]) for step in range(1, 4)],
        [row(1), row(10, ce=[2.0], state_norm=[9.0]), row(20, ce=[None, 1.0, 1.5], state_norm=[1.0] * 3)],
    ],
)
def test_figure_is_drawn(tmp_path, rows):
    draw(tmp_path / "report.png", rows, RESULTS, "title\nof two lines")
    image = plt.imread(tmp_path / "report.png")
    assert image.shape[1] > 1500
    for panel in range(3):
        third = image[100:, panel * image.shape[1] // 3 : (panel + 1) * image.shape[1] // 3, :3]
        assert (third < 0.9).mean() > 0.003  # something is drawn in each of the three
    assert not plt.get_fignums()


def test_a_gated_run_has_a_panel_of_its_exits(tmp_path):
    draw(tmp_path / "three.png", [row(1)], RESULTS, "title")
    width = plt.imread(tmp_path / "three.png").shape[1]
    images = []
    for loop in (1.5, 1.9):
        rows = [row(1, exit_loop=1.2, exit_entropy=0.1), row(2, exit_loop=loop, exit_entropy=0.6), row(3)]
        draw(tmp_path / "four.png", [*rows, row(4, exit_loop=None, exit_entropy=None)], RESULTS, "title")
        images.append(plt.imread(tmp_path / "four.png"))
    assert images[0].shape[1] * 3 == width * 4
    assert (images[0][:, width:] != images[1][:, width:]).any()


BEYOND = [*RESULTS, LoopResult(4, 1.75, math.exp(1.75), None, 50_000.0, None)]


def test_table_beyond_the_models_depth():
    lines = table(BEYOND).splitlines()
    assert lines[3].split() == ["4", "1.7500", "5.755", "-", "5e+04", "-"]
    assert len({len(line) for line in lines}) == 1


def test_a_panel_for_depths_beyond_the_models(tmp_path, monkeypatch):
    """Perplexity against every K; against speed where there is one, and losses of the steps that had the loop."""
    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    rows = [row(1), row(10, ce=[2.0], state_norm=[9.0]), row(20, ce=[None, 1.0, 1.5], state_norm=[1.0, 2.0, 3.0])]
    draw(tmp_path / "report.png", rows, BEYOND, "title")
    monkeypatch.undo()
    losses, norms, frontier, depths = shown[0].axes
    curve = depths.lines[-1]
    assert curve.get_xdata().tolist() == [1, 2, 4]
    assert curve.get_ydata().tolist() == [result.ppl for result in BEYOND]
    assert frontier.lines[0].get_xdata().tolist() == [80_000.0, 41_000.0]
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in losses.lines}
    assert drawn["CE after loop 1"] == [(1, 8.0), (10, 2.0)]
    assert drawn["CE after loop 2"] == [(1, 7.0), (20, 1.0)]
    assert drawn["CE after loop 3"] == [(20, 1.5)]
    assert [line.get_xdata().tolist() for line in norms.lines] == [[1, 10, 20], [1, 20], [20]]
    plt.close(shown[0])


def test_environment():
    values = environment(torch.device("cpu"))
    assert values["device"].startswith("cpu: ")
    assert values["versions"]["torch"] == importlib.metadata.version("torch")
    assert values["versions"]["python"].count(".") == 2
    assert 50e6 < values["peak_memory_bytes"] < 1e12
    assert values["commit"] is None or len(values["commit"].removesuffix("-dirty")) == 40


def test_a_picture_that_cannot_be_drawn_is_found_before_training(tmp_path, monkeypatch, capsys):
    """Such as without matplotlib."""
    monkeypatch.delattr(train, "picture")
    monkeypatch.setitem(sys.modules, "train.picture", None)
    assert main(arguments(tmp_path, "--out", str(tmp_path / "run"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "train.picture" in line
    assert not (tmp_path / "run").exists()
