"""Functions and training steps as graphs, on the stand-in of tests/graph_tape.py."""

import pytest
import torch
from graph_tape import install
from test_step import adamw, batch, make
from test_trainer import assert_same_run, rows_of
from tiny_run import arguments
from torch.utils._python_dispatch import _get_current_dispatch_mode

from looped.graph import WARM_UP, CudaGraphs, eagerly
from looped.supervision import Gated
from train import prepare
from train.config import preset_config
from train.run import main
from train.step import training_step

CPU = torch.device("cpu")


@pytest.fixture
def tapes(monkeypatch):
    return install(monkeypatch)


def test_a_function_is_captured_once_for_each_shape_and_number(tapes):
    graphs, total, calls = CudaGraphs(CPU), torch.zeros(()), []

    def add(factor, x):
        calls.append((factor, len(x)))
        total.add_(factor * x.sum())
        return x * factor

    expected = 0.0
    for round_ in range(WARM_UP + 3):
        for factor, n in ((2.0, 3), (2.0, 5), (-1.0, 3)):
            x = torch.full((n,), 1.0 + round_)
            assert torch.equal(graphs(add, factor, x), factor * x)
            expected += factor * float(x.sum())
            assert total.item() == expected
    assert len(tapes) == 3
    assert all(tape.replays == 3 for tape in tapes)
    assert len(calls) == 3 * (WARM_UP + 1)  # then Python is not run any more


def test_random_numbers_differ_from_replay_to_replay(tapes):
    graphs, given = CudaGraphs(CPU), torch.zeros(4)
    torch.manual_seed(3)
    expected = [torch.rand(4) for _ in range(WARM_UP + 4)]
    torch.manual_seed(3)
    found = [graphs(random_like, given).clone() for _ in range(WARM_UP + 4)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def random_like(like):
    return torch.rand_like(like)


def test_what_cannot_be_captured_runs_eagerly_and_says_why(tapes, capsys):
    graphs, total = CudaGraphs(CPU), torch.zeros(())

    def waits(x):
        torch.rand(2)
        total.add_(x.sum())
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("operation not permitted\n  when stream is capturing")
        return x.sum().item()

    torch.manual_seed(0)
    assert [graphs(waits, torch.full((2,), 1.0 + n)) for n in range(WARM_UP + 3)] == [2, 4, 6, 8, 10, 12]
    after = torch.rand(1)
    assert total == 42
    line = "no CUDA graph: operation not permitted when stream is capturing; kernels are launched one by one\n"
    assert capsys.readouterr().out == line
    assert graphs.refusal is not None
    torch.manual_seed(0)
    for _ in range(WARM_UP + 3):
        torch.rand(2)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"grad_accumulation": 2}, {"measure": True}, {"measure": True, "supervision": Gated(0.2, "geometric:0.4")}],
)
def test_graphed_steps_are_eager_steps(tapes, fused, options):
    """Twenty steps with changing batch, learning rate, penalty and dropout, one of them bad: bit for bit the same."""

    def steps(launch) -> list[list[float]]:
        model = make(fused=fused, dropout=0.1, exit_gate="supervision" in options).train()
        optimizer = adamw(model)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros(())

        def step(inputs, targets, penalty):
            return training_step(
                model, optimizer, inputs, targets,
                penalty=penalty, dtype=torch.float32, **{"supervision": "per-loop", **options},
            )  # fmt: skip

        torch.manual_seed(7)
        found = []
        for number in range(20):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (number + 1))
            penalty = torch.tensor(float("nan") if number == 11 else 0.01 * number)
            result = launch(step, *batch(number), penalty)
            found.append([x.clone() for x in result if x is not None])
        weights = [value.detach().clone() for value in model.parameters()]
        return [*found, weights, [state["step"] for state in optimizer.state.values()]]

    eager, graphed = steps(eagerly), steps(CudaGraphs(CPU))
    assert [tape.replays for tape in tapes] == [20 - WARM_UP]
    assert [bool(values[3]) for values in eager[:20]] == [number == 11 for number in range(20)]
    assert set(map(float, eager[-1])) == {19.0}
    for a, b in zip(eager, graphed, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.nan_to_num(nan=-1.0), y.nan_to_num(nan=-1.0))
    assert len({float(values[0]) for values in eager[:20] if values[0].isfinite()}) == 19


def graphed(monkeypatch) -> None:
    """Have runs on the CPU use graphs."""
    monkeypatch.setattr(prepare, "launcher", lambda config, device: CudaGraphs(device))


def test_a_graphed_run_is_an_eager_one(tmp_path, monkeypatch, tapes):
    """From the first step to the evaluation; two shapes of evaluation batches; stopped and continued, too."""
    options = ("--steps", "14", "--log-every", "2", "--schedule", "warmup-cosine", "--eval-tokens", "400")
    for name in ("eager", "whole", "halves"):
        if name == "whole":
            assert tapes == []
            graphed(monkeypatch)
            # A learning rate on the device is a float32.
        n_first = "8" if name == "halves" else "14"
        argv = [*arguments(tmp_path, *options, "--out", str(tmp_path / name)), "--steps", n_first]
        assert main([*argv, "--schedule-steps", "14"]) == 0
    assert main(["--resume", str(tmp_path / "halves"), "--steps", "14"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert sum(tape.replays for tape in tapes) > 20
    for eager, whole in zip(rows_of(tmp_path / "eager"), rows_of(tmp_path / "whole"), strict=True):
        assert whole["loss"] == pytest.approx(eager["loss"], rel=1e-5)


def test_dropout_in_recomputed_loops_is_not_captured(tmp_path, monkeypatch, tapes, capsys):
    graphed(monkeypatch)
    assert main(arguments(tmp_path, "--checkpoint-loops", "--out", str(tmp_path / "run"))) == 0
    n_of_steps = len(tapes)
    assert main(arguments(tmp_path, "--checkpoint-loops", "--dropout", "0", "--out", str(tmp_path / "other"))) == 0
    assert len(tapes) == 2 * n_of_steps + 1  # the evaluation's, and the step's


def test_cuda_graph_by_name_without_a_gpu(tmp_path, capsys):
    for options in (["--device", "cpu"], ["--device", "cpu", "--dropout", "0"]):
        assert main([*arguments(tmp_path, "--out", str(tmp_path / "run"), *options), "--cuda-graph"]) == 2
        assert capsys.readouterr().err == "error: cuda_graph needs a CUDA device. Got --cuda-graph on device=cpu.\n"
    assert not (tmp_path / "run").exists()
    assert main([*arguments(tmp_path, "--out", str(tmp_path / "run")), "--no-cuda-graph"]) == 0
    assert main(["--resume", str(tmp_path / "run"), "--steps", "9", "--cuda-graph"]) == 2
    assert preset_config("demo").cuda_graph  # elsewhere it is what one gets
