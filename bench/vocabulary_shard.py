"""Peak memory and time of one loss and its gradients where the processes of a group share out the head's rows.

    python -m bench.vocabulary_shard [--processes 2] [--vocabulary 50257] [--channels 512] [--tokens 2048] [--loops 4]

Two variants of the same data-parallel step, each in as many gloo processes on this machine, in float32: every process
has the whole head and its own tokens (whole), or its rows of the head (shared).  Losses and gradients are compared
before anything is measured.  Peak: the highest point of PyTorch's allocations in one call of forward and backward,
what the call leaves behind included (the gradients); weights and states, which were there before, are not in it, and
the whole head's average over the processes is not formed.  Time: the median of the rounds, in which the variants take
turns; a process has one thread.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from itertools import accumulate
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from bench.measure.memory import allocations
from looped.command_line import Parser, count
from looped.kernels import VocabularyShard, looped_cross_entropy

ROUNDS = 3


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    n_ranks, n_words, d = options.processes, options.vocabulary, options.channels
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n_ranks)
    shard = VocabularyShard.of(n_words)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn((n_words, d), generator=generator) / d**0.5
    generator.manual_seed(rank + 1)
    states = [torch.randn((options.tokens, d), generator=generator).requires_grad_() for _ in range(options.loops)]
    targets = torch.randint(n_words, (options.tokens,), generator=generator)
    heads = {"whole": head.clone().requires_grad_(), "shared": head[shard.rows].clone().requires_grad_()}

    def step(name: str) -> Tensor:
        for tensor in (heads[name], *states):
            tensor.grad = None
        loss = looped_cross_entropy(states, heads[name], targets, shard=shard if name == "shared" else None).loss
        loss.backward()
        return loss.detach()

    def seconds(name: str) -> float:
        dist.barrier()
        start = time.perf_counter()
        step(name)
        return time.perf_counter() - start

    results = {name: [step(name), *(state.grad for state in states)] for name in heads}
    torch.testing.assert_close(results["shared"], results["whole"])
    mean = heads["whole"].grad.clone() / n_ranks
    dist.all_reduce(mean)
    torch.testing.assert_close(heads["shared"].grad, mean[shard.rows])
    del mean, results
    peaks = {}
    for name in heads:
        for tensor in (heads[name], *states):
            tensor.grad = None  # or a free of what was there before would count
        dist.barrier()
        peaks[name] = max(accumulate(allocations(partial(step, name))[0]))
    times = [{name: seconds(name) for name in heads} for _ in range(ROUNDS)]
    if rank == 0:
        print(f"{n_ranks} processes, V = {n_words:,}, d = {d}, {options.loops} loops of {options.tokens:,} tokens each")
        for name, head_rows in heads.items():
            print(
                f"{name:7} head {head_rows.nbytes / 2**20:6.1f} MiB, peak {peaks[name] / 2**20:6.1f} MiB beyond it, "
                f"{median(round_[name] for round_ in times):.2f} s"
            )
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = Parser(description=__doc__)
    for name, default in (("processes", 2), ("vocabulary", 50_257), ("channels", 512), ("tokens", 2048), ("loops", 4)):
        parser.add_argument(f"--{name}", type=count, default=default)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, options), nprocs=options.processes)


if __name__ == "__main__":
    main()
