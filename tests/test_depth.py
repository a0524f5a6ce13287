"""Depth drawn for every step: the distributions, what runs at changing depth leave, graphs and compilations."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graph_tape import install
from test_graph import graphed
from test_trainer import assert_same_run
from tiny_run import arguments

from looped.graph import WARM_UP
from train import progress, trainer
from train.config import RESUMABLE, RETUNABLE, complete, preset_config, read_config
from train.depth import MOST, evaluated_depths, parse_depth
from train.metrics import read_metrics
from train.run import main
from train.text.batches import batch_indices

pytestmark = pytest.mark.usefixtures("no_picture")


def drawn(text: str, n: int = 20_000) -> np.ndarray:
    generator = np.random.default_rng(1)
    return np.array([parse_depth(text, 4).draw(generator) for _ in range(n)])


def used(text: str, n: int = 20_000, seed: int = 42) -> np.ndarray:
    depth = parse_depth(text, 4)
    return np.array([depth.at(seed, step) for step in range(n)])


def assert_moments(sample: np.ndarray, mean: float, variance: float) -> None:
    """Within four standard errors; that of the variance from the sample's own fourth moment."""
    n, centred = len(sample), sample - sample.mean()
    assert abs(sample.mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(sample.var() - variance) < 4 * math.sqrt(((centred**4).mean() - sample.var() ** 2) / n)


@pytest.mark.parametrize("mean", [1, 4, 32])
def test_poisson_is_huginns_distribution(mean):
    """Of Poisson(rate) + 1 with E rate = M and Var rate = M^2 (exp(1/4) - 1)."""
    sample = drawn(f"poisson:{mean}")
    assert_moments(sample, mean + 1, mean + mean**2 * (math.exp(0.25) - 1))
    assert sample.min() == 1 or mean == 32
    # Of a log-normal rate, whose median is below its mean; with a constant rate of 32 the median would be 33.
    assert mean < 32 or abs(np.median(sample) - 32 * math.exp(-1 / 8) - 1) < 1


def test_uniform_is_uniform():
    assert_moments(drawn("uniform:3-12"), 7.5, (10**2 - 1) / 12)
    values, counts = np.unique(used("uniform:1-8"), return_counts=True)
    assert values.tolist() == list(range(1, 9))
    assert (abs(counts - 2500) < 4 * math.sqrt(2500 * 7 / 8)).all()


@pytest.mark.parametrize(
    ("text", "values", "shift"),
    [
        ("uniform:1-8", range(1, 9), 0),
        ("uniform:5-5", [5], 0),
        ("uniform:1-64", [1, 10, 19, 28, 37, 46, 55, 64], 0),
        ("poisson:1", [1, 2, 3, 4], -0.027),
        ("poisson:2.5", [1, 2, 4, 5, 7, 10], -0.008),
        ("poisson:4", [1, 2, 3, 4, 6, 8, 11, 16], -0.003),
        ("poisson:32", [11, 16, 23, 32, 45, 64, 91, 128], 0.002),
    ],
)
def test_few_depths_occur_and_keep_the_mean(text, values, shift):
    sample, before = used(text), drawn(text)
    assert sorted(set(sample.tolist())) == list(values) == list(parse_depth(text, 4).values)
    assert len(values) <= MOST
    error = math.sqrt((sample.var() + before.var()) / len(sample)) / before.mean()
    assert abs(sample.mean() / before.mean() - 1 - shift) < 4 * error + 0.0005
    # Moving a draw by chance to a neighbour adds variance: at most a quarter of the squared gap.
    gap = max(np.diff(list(values)), default=0)
    assert sample.var() <= 1.03 * before.var() + gap**2 / 4


def test_a_depth_is_a_function_of_seed_and_step():
    depth = parse_depth("poisson:4", 4)
    first = [depth.at(42, step) for step in range(200)]
    np.random.default_rng(7).random(100)
    torch.rand(3)
    batch_indices(100, seed=42, step=3, batch_size=4)
    assert [parse_depth("poisson:4", 9).at(42, step) for step in reversed(range(200))] == first[::-1]
    assert [depth.at(43, step) for step in range(200)] != first
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.3
    assert parse_depth("fixed", 5).at(42, 17) == 5


def test_draws_are_not_those_of_the_window_order():
    """Both have the run's seed: epoch 3's permutation and step 3's depth must not start from the same state."""
    depth = parse_depth("uniform:1-1024", 4)
    numbers = [depth.draw(np.random.default_rng((42, step))) for step in range(50)]
    assert [depth.at(42, step) for step in range(50)] != numbers
    recorded: list[float] = []
    recording = type(depth)(depth.values, lambda generator: recorded.append(generator.random()) or 1)
    recording.at(42, 3)
    assert recorded[0] != np.random.default_rng((42, 3)).random()


BAD = ["uniform:8-1", "uniform:0-3", "uniform:1-1025", "uniform:3", "poisson:0", "poisson:nan", "poisson:inf",
       "poisson:-4", "poisson:1e9", "poisson:4:0.5", "deep", "4", "", "Fixed", "uniform:1-8 "]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_rejects_other_depths(text):
    with pytest.raises(ValueError, match=r"^depth must be fixed, uniform:A-B with .* Got depth='.*'\.$") as caught:
        parse_depth(text, 4)
    assert repr(text) in str(caught.value)


def test_evaluated_depths():
    assert evaluated_depths(4, 4) == (1, 2, 3, 4)
    assert evaluated_depths(4, 16) == (1, 2, 3, 4, 8, 12, 16)
    assert evaluated_depths(3, 10) == (1, 2, 3, 6, 9, 10)
    assert evaluated_depths(1, 4) == (1, 2, 3, 4)
    assert complete(preset_config("demo")).eval_loops == 4


# Runs -----------------------------------------------------------------------------------------------------------------

RANDOM = ("--depth", "uniform:1-4", "--backprop-loops", "2", "--steps", "12")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("random-depth")
    assert main(arguments(directory, *RANDOM, "--out", str(directory / "run"))) == 0
    return directory / "run"


def test_rows_have_the_depth_of_their_step(whole):
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    depth = parse_depth("uniform:1-4", 3)
    assert [row["n_loops"] for row in rows] == [depth.at(42, step) for step in range(12)]
    assert len({row["n_loops"] for row in rows}) > 2
    for row in rows:
        n_untrained = max(0, row["n_loops"] - 2)
        for name in ("ce", "radial_fraction"):
            assert [value is None for value in row[name]] == [True] * n_untrained + [False] * min(2, row["n_loops"])
        assert len(row["state_norm"]) == row["n_loops"]
        assert all(value > 0 for value in row["state_norm"])


def test_evaluation_beyond_the_models_depth(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert [row["n_loops"] for row in summary["evaluation"]] == [1, 2, 3]
    assert [row["n_loops"] for row in summary["evaluation_beyond"]] == [6, 9, 12]
    assert all(row["tokens_per_second"] > 0 for row in summary["evaluation"])
    assert all(row["tokens_per_second"] is None and row["ce"] > 0 for row in summary["evaluation_beyond"])


@pytest.mark.parametrize(("graphs", "log_every"), [(False, "5"), (True, "1")])
def test_half_and_resumed_half_are_the_whole(tmp_path, monkeypatch, graphs, log_every):
    if graphs:
        install(monkeypatch)
        graphed(monkeypatch)
    options = (*RANDOM, "--log-every", log_every)
    assert main(arguments(tmp_path, *options, "--out", str(tmp_path / "whole"))) == 0
    assert main(arguments(tmp_path, *options, "--out", str(tmp_path / "halves"), "--steps", "7")) == 0
    assert main(["--resume", str(tmp_path / "halves"), "--steps", "12"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert len({parse_depth("uniform:1-4", 3).at(42, step) for step in range(7, 12)}) > 2


def test_what_is_trained_cannot_change_and_how_it_is_evaluated_can(whole, capsys):
    for option, value in (("--depth", "fixed"), ("--backprop-loops", "3")):
        assert main(["--resume", str(whole), "--steps", "20", option, value]) == 2
        name = option[2:].replace("-", "_")
        assert capsys.readouterr().err.startswith(f"error: {name} cannot change when a run is continued.")
    assert "eval_loops" in RESUMABLE
    assert not {"depth", "backprop_loops"} & {*RESUMABLE, *RETUNABLE}


def test_a_run_from_before_drawn_depth_can_be_read(whole, tmp_path):
    stored = json.loads((whole / "config.json").read_text())
    for name in ("depth", "backprop_loops", "eval_loops"):
        del stored["train"][name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = read_config(tmp_path)
    assert (config.depth, config.backprop_loops, config.eval_loops) == ("fixed", None, None)


def test_utilisation_counts_every_step_at_its_own_depth(monkeypatch):
    """Flops of each step on their own: 3 for a loop with gradient and its readout, 1 for a loop without."""
    monkeypatch.setattr(progress, "peak_flops", lambda device: 1e6)

    class Model:
        def flops_per_token(self, n_loops, *, n_readouts, seq_len, backprop_loops):
            assert (seq_len, backprop_loops) == (16, 2)
            read = min(n_loops, 2) if n_readouts is None else n_readouts
            return 100 * n_loops + read

    depth = parse_depth("uniform:1-4", 3)
    config = SimpleNamespace(seed=42, seq_len=16, backprop_loops=2, supervision="per-loop")
    run = SimpleNamespace(device=None, config=config, depth=depth, model=Model(), tokens_per_step=64)
    loops = [depth.at(42, step) for step in range(5, 15)]
    assert len(set(loops)) > 2
    flops = 64 * sum(100 * n + min(n, 2) for n in loops)
    assert progress.utilisation(run, range(5, 15), 2.0) == pytest.approx(flops / 2.0 / 1e6)
    config.supervision = "terminal"
    flops = 64 * sum(100 * n + 1 for n in loops)
    assert progress.utilisation(run, range(5, 15), 2.0) == pytest.approx(flops / 2.0 / 1e6)


def test_clock_rates_are_those_of_the_steps_since_the_last_call(monkeypatch):
    now = iter((10.0, 12.0, 17.0))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    seen = []
    monkeypatch.setattr(progress, "utilisation", lambda run, steps, seconds: seen.append((list(steps), seconds)) or 0.5)
    run = SimpleNamespace(step=3, tokens_per_step=64)
    clock = progress.Clock(run)
    run.step = 4
    assert clock.rates(run) == (32.0, 0.5)
    run.step = 9
    assert clock.rates(run) == (64.0, 0.5)
    assert seen == [([3], 2.0), ([4, 5, 6, 7, 8], 5.0)]


def test_graphs_are_captured_once_for_each_depth_measured_or_not(tmp_path, monkeypatch):
    tapes = install(monkeypatch)
    graphed(monkeypatch)
    eager: dict[tuple[int, bool], int] = {}
    take = trainer.training_step

    def counted(*args, n_loops, measure, **options):
        key = (n_loops, measure)
        eager[key] = eager.get(key, 0) + 1
        return take(*args, n_loops=n_loops, measure=measure, **options)

    monkeypatch.setattr(trainer, "training_step", counted)
    monkeypatch.setattr(trainer, "_evaluate", lambda run: [])
    options = ("--depth", "uniform:1-3", "--steps", "60", "--log-every", "2", "--dropout", "0", "--n-layers", "1")
    assert main(arguments(tmp_path, *options, "--out", str(tmp_path / "run"))) == 0
    assert eager == {(n, measure): WARM_UP + 1 for n in (1, 2, 3) for measure in (False, True)}
    assert len(tapes) == 6
    assert sum(tape.replays for tape in tapes) == 60 - 6 * WARM_UP


def test_compiled_once_for_each_depth_measured_or_not(tmp_path, monkeypatch):
    """On a stand-in that compiles nothing: as many graphs as depths, measured or not, and evaluations."""
    graphs = []
    compile_ = torch.nn.Module.compile

    def stand_in(module):
        compile_(module, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", stand_in)
    n_after_training = []
    evaluate = trainer._evaluate
    monkeypatch.setattr(trainer, "_evaluate", lambda run: n_after_training.append(len(graphs)) or evaluate(run))
    options = ("--depth", "uniform:1-2", "--backprop-loops", "1", "--steps", "12", "--log-every", "2", "--compile")
    model = ("--dropout", "0", "--n-layers", "1", "--n-loops", "2", "--eval-tokens", "400")
    argv = arguments(tmp_path, *options, *model, "--out", str(tmp_path / "run"))
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        assert main(argv) == 0
    depth = parse_depth("uniform:1-2", 2)
    expected = {(depth.at(42, number - 1), number == 1 or number % 2 == 0) for number in range(1, 13)}
    assert len(expected) > 3  # the limit, unless the trainer raises it
    assert n_after_training == [len(expected)]
    assert len(graphs) - n_after_training[0] <= 2 + 2
    torch._dynamo.reset()
