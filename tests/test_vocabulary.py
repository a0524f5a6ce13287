"""A model whose vocabulary two processes share trains, is saved and is evaluated as a whole one in one process."""

import contextlib
import copy
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import N_RANKS, run_ranks
from tiny_decoder import V, model, uneven_batch
from tiny_run import arguments

from looped.model import LoopedLM
from looped.sharding import replicate
from looped.vocabulary import clip_grad_norm_, share_vocabulary, table_name, whole_vocabulary
from train import picture
from train.metrics import read_metrics
from train.run import main

KINDS = {"tied": {"tied": True}, "untied": {"tied": False, "readout": "layernorm", "exit_gate": True}}
CLIP = 0.05  # of gradients: less than their norm, so that all are scaled by it


def optimizer_of(decoder: LoopedLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decoder.parameters(), lr=1e-2, fused=True)


def train(
    decoder: LoopedLM, wrapped: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, n_ranks: int = 1
) -> torch.Tensor:
    """Losses of this process and gradient norms, [3, 2] of three steps."""
    rows = []
    for step in range(3):
        whole = uneven_batch(step)
        n_targets = (whole[1] != -100).sum() / n_ranks
        inputs, targets = (part.chunk(n_ranks)[rank] for part in whole)
        optimizer.zero_grad()
        loss = wrapped(inputs, targets, penalty=0.05, n_targets=n_targets).loss
        loss.backward()
        rows.append((loss.item(), clip_grad_norm_(decoder, CLIP).item()))
        optimizer.step()
    return torch.tensor(rows)


def contents(decoder: LoopedLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all weights and moments, by name."""
    named = dict(decoder.named_parameters())
    moments = {f"{name}.{key}": value for name, p in named.items() for key, value in optimizer.state[p].items()}
    return {name: value.detach().clone() for name, value in (*named.items(), *moments.items())}


def train_shared(kind: str, rank: int) -> dict[str, Any]:
    decoder = model(fused=True, **KINDS[kind])
    n_parameters, order = decoder.parameter_count(), list(dict(decoder.named_parameters()))
    share_vocabulary(decoder)
    assert decoder.parameter_count() == n_parameters
    assert list(dict(decoder.named_parameters())) == order
    optimizer, name = optimizer_of(decoder), table_name(decoder)
    assert dist.group.WORLD is not None
    wrapped = replicate(decoder, dist.group.WORLD, find_unused=decoder.exit_gate is not None)
    results: dict[str, Any] = {"rows": len(decoder.head_weight)}
    results["training"] = train(decoder, wrapped, optimizer, rank, N_RANKS)
    inputs, targets = (part.chunk(N_RANKS)[rank] for part in uneven_batch(7))
    with torch.no_grad():
        results["evaluated"] = decoder.evaluation_losses(decoder(inputs).states, targets)
    before = contents(decoder, optimizer)
    with whole_vocabulary(decoder, optimizer):
        results["whole"] = contents(decoder, optimizer)
        if rank == 0:  # alone, as nothing is exchanged inside
            decoder.zero_grad()
            decoder(inputs, targets).loss.backward()
            results["gradient"] = decoder.head_weight.grad
            decoder.zero_grad()
            decoder.eval()
            results["logits"] = decoder(inputs, logits=True).logits.detach()
            results["generated"] = decoder.generate([[1, 2, 3]], max_new_tokens=3, temperature=0.0).tokens
    after = contents(decoder, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    with whole_vocabulary(decoder, optimizer), torch.no_grad():  # as a checkpoint is loaded
        decoder.head_weight.mul_(2)
        optimizer.state[decoder.head_weight]["exp_avg"] = torch.arange(float(V)).unsqueeze(1).repeat(1, 24)
    results["loaded"] = decoder.head_weight.detach(), optimizer.state[decoder.head_weight]["exp_avg"]
    assert torch.equal(results["loaded"][0], 2 * before[name])
    for call in (lambda: decoder(inputs, logits=True), lambda: plain(decoder)(inputs, targets)):
        with pytest.raises(ValueError) as error:
            call()
        results.setdefault("refused", []).append(str(error.value))
    return results


def plain(decoder: LoopedLM) -> LoopedLM:
    decoder = copy.copy(decoder)
    decoder.fused = False
    return decoder


def run(directory: Path, out: str, *options: str) -> None:
    """A whole run of the trainer, with gradients in two parts; without its picture, which takes the longest."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(picture, "draw", lambda *_: None)
        parts = ["--dropout", "0", "--grad-accumulation", "2", "--steps", "6", "--save-every", "3"]
        assert main(arguments(directory, *parts, *options, "--out", str(directory / out))) == 0


def continued(directory: Path, *options: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["--resume", str(directory / "shared"), *options]) == 0


def refused_option(directory: Path, *options: str) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(arguments(directory, "--shard-head", *options, "--out", str(directory / "refused"))) == 2
    assert not (directory / "refused").exists()
    return said.getvalue().splitlines()[0] if said.getvalue() else ""


def save_all(rank: int, folder: str) -> None:
    os.environ["RANK"] = str(rank)
    picture.draw = lambda *_: None
    run(Path(folder), "shared", "--shard-head")
    continued(Path(folder), "--steps", "8")
    refusals = [refused_option(Path(folder), *options) for options in (["--no-fused"], ["--shard", "fsdp2"])]
    results: dict[str, Any] = {"refused": refusals}
    results |= {kind: train_shared(kind, rank) for kind in KINDS}
    dist.barrier()
    torch.save(results, Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    arguments(folder)  # writes the text
    return folder


@pytest.fixture(scope="module")
def shared(folder) -> list[dict[str, Any]]:
    run_ranks(save_all, folder, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_RANKS)]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def alone(kind) -> tuple[LoopedLM, torch.optim.Optimizer, torch.Tensor]:
    """The same model, optimiser and training in this process alone."""
    decoder = model(fused=True, **KINDS[kind])
    optimizer = optimizer_of(decoder)
    return decoder, optimizer, train(decoder, decoder, optimizer)


def test_losses_and_gradient_norms_are_those_of_one_process(shared, kind, alone):
    of_ranks = torch.stack([results[kind]["training"] for results in shared])
    torch.testing.assert_close(of_ranks.mean(0), alone[2])
    assert torch.equal(of_ranks[0, :, 1], of_ranks[1, :, 1])  # of the norm, all have the same
    assert alone[2][:, 1].min() > CLIP


def test_each_process_has_its_rows(shared, kind):
    assert [results[kind]["rows"] for results in shared] == [31, 30]


def test_weights_and_moments_are_those_of_one_process(shared, kind, alone):
    expected = contents(*alone[:2])
    for results in shared:
        assert results[kind]["whole"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(results[kind]["whole"][name], value, atol=2e-5, rtol=1e-3, msg=name)


def test_evaluation_is_that_of_one_process(shared, kind, alone):
    inputs, targets = uneven_batch(7)
    with torch.no_grad():
        expected = alone[0].evaluation_losses(alone[0](inputs).states, targets)
    actual = torch.cat([results[kind]["evaluated"] for results in shared], 1)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_one_process_alone_reads_and_generates_with_the_whole_vocabulary(shared, kind, alone):
    inputs = uneven_batch(7)[0].chunk(N_RANKS)[0]
    torch.testing.assert_close(shared[0][kind]["logits"], alone[0](inputs, logits=True).logits, atol=1e-3, rtol=1e-3)
    alone[0].zero_grad()
    alone[0](inputs, uneven_batch(7)[1].chunk(N_RANKS)[0]).loss.backward()
    torch.testing.assert_close(shared[0][kind]["gradient"], alone[0].head_weight.grad, atol=1e-3, rtol=1e-2)
    expected = alone[0].eval().generate([[1, 2, 3]], max_new_tokens=3, temperature=0.0).tokens
    assert shared[0][kind]["generated"] == expected


def test_what_is_loaded_into_the_whole_vocabulary_is_kept_by_rows(shared, kind):
    moments = torch.cat([results[kind]["loaded"][1] for results in shared])
    assert torch.equal(moments[:, 0], torch.arange(float(V)))


def test_what_needs_the_whole_vocabulary_is_refused(shared, kind):
    logits, not_fused = shared[1][kind]["refused"]
    assert logits == "logits need all of a shared vocabulary: call inside whole_vocabulary(model). Got a part."
    assert not_fused == "fused must be True for a shared vocabulary: the plain readout has the whole head. Got False."


def test_a_run_of_the_trainer_is_that_of_one_process_and_goes_on_in_one(shared, folder):
    run(folder, "alone")
    shared_rows, rows = (read_metrics(folder / out / "metrics.jsonl") for out in ("shared", "alone"))
    assert len(shared_rows) == 8
    for shared_row, row in zip(shared_rows, rows, strict=False):
        for name in ("loss", "ce", "grad_norm", "state_norm"):
            assert shared_row[name] == pytest.approx(row[name], rel=1e-4), name
    assert "evaluation" in (folder / "shared" / "summary.json").read_text()
    continued(folder, "--steps", "10", "--no-shard-head")
    assert len(read_metrics(folder / "shared" / "metrics.jsonl")) == 10


def test_what_does_not_go_with_a_shared_head_is_said_by_the_first_process(shared, folder):
    assert shared[1]["refused"] == ["", ""]
    not_fused, fsdp2 = shared[0]["refused"]
    assert not_fused.startswith("error: shard_head needs fused, as the plain readout forms all logits. Got shard_head=")
    assert fsdp2.startswith("error: shard_head needs shard=none, as fsdp2 gathers all weights. Got shard_head=True and")
    alone = refused_option(folder)
    assert alone.startswith("error: shard_head needs several processes, which torchrun starts. Got shard_head=True and")
