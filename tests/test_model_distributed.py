"""LoopedLM as data-parallel training wraps it: one call forms the loss, and its gradients are those of one process."""

from pathlib import Path

import torch
from ranks import N_RANKS, run_ranks
from tiny_decoder import assert_same_gradients, model, uneven_batch
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {"penalty": 0.05, "supervision": "per-loop"}


def save_gradients(rank: int, folder: str, fused: bool) -> None:
    """The gradients of this process's rows, averaged with the other's, into a file."""
    tokens, targets = (rows.chunk(N_RANKS)[rank] for rows in uneven_batch())
    # The mean over processes of sums over n / 2 is the sum over n.
    n_targets = (uneven_batch()[1] != -100).sum() / N_RANKS
    wrapped = DistributedDataParallel(model(fused=fused, tied=False))
    loss = wrapped(tokens, targets, n_targets=n_targets, **OPTIONS).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in wrapped.module.named_parameters()}
    torch.save((loss.detach(), gradients), Path(folder, f"{fused}-{rank}.pt"))


def save_all(rank: int, folder: str) -> None:
    for fused in (True, False):
        save_gradients(rank, folder, fused)


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    run_ranks(save_all, tmp_path, str(tmp_path))
    for fused in (True, False):
        alone = model(fused=fused, tied=False)
        loss = alone(*uneven_batch(), **OPTIONS).loss
        loss.backward()
        expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
        results = [torch.load(tmp_path / f"{fused}-{rank}.pt") for rank in range(N_RANKS)]
        torch.testing.assert_close(torch.stack([part for part, _ in results]).mean(), loss)
        for _, gradients in results:
            assert_same_gradients(gradients, expected)
