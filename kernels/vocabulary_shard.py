"""`VocabularyShard`: which rows of a head this process holds, and what its process group tells each other.

The P processes (ranks) of a group hold the rows of a head W [V, d] and of its bias in turn, ceil(V / P) each and the
last one what remains, as DTensor's `Shard(0)` has it.  Each forms its columns of all logits.  What a row needs of all
columns is exchanged once for each chunk of rows (kernels/sharded_cross_entropy.py); W, dW and the logits never are.

Each rank has its own tokens, as in data-parallel training.  Then the normed rows of a chunk are gathered from all
ranks, and the parts of their gradient are summed and go back to the rank whose rows they are.  With `same_states` all
ranks have the same tokens and states, as in tensor-parallel models; then nothing is gathered and the sum goes to all.

Splitting the vocabulary of the loss: Megatron-LM, arXiv 1909.08053, section 3.
"""

from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .arguments import gathered

MAX_ROWS = 1 << 24  # of a rank: a column's number is exchanged as a float32
Rows = TypeVar("Rows", Tensor, Tensor | None)


class VocabularyShard(NamedTuple):
    """This rank's part of a head of `n_words` rows; `VocabularyShard.of` makes it.

    group: the name of the process group.  rank, n_ranks: of this process in it.
    same_states: whether all ranks have the same tokens and states.
    """

    n_words: int
    group: str
    rank: int
    n_ranks: int
    same_states: bool = False

    @staticmethod
    def of(n_words: int, group: "dist.ProcessGroup | None" = None, *, same_states: bool = False) -> "VocabularyShard":
        """This process's part of `n_words` rows that a group shares, by default the group of all processes.

        Raises ValueError where no process group has been initialised, this process is not in `group`, or n_words < 1.
        """
        if not dist.is_initialized():
            raise ValueError("a vocabulary is sharded over a process group, which must be initialised first. Got none.")
        if isinstance(n_words, bool) or not isinstance(n_words, int) or n_words < 1:
            raise ValueError(f"n_words must be an integer >= 1. Got {n_words!r}.")
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if group is None or rank < 0:
            raise ValueError(f"group must hold this process. Got a group without rank {dist.get_rank()}.")
        shard = VocabularyShard(n_words, group.group_name, rank, dist.get_world_size(group), same_states)
        if shard.most_rows > MAX_ROWS or shard.first_row(shard.n_ranks - 1) == n_words:
            rule = f"at most {MAX_ROWS} rows for each rank, and one for the last"
            raise ValueError(f"n_words must give {rule}. Got n_words={n_words} for {shard.n_ranks} ranks.")
        return shard

    # Which rows -------------------------------------------------------------------------------------------------------

    @property
    def most_rows(self) -> int:
        """Rows of the first rank; no rank has more."""
        return -(-self.n_words // self.n_ranks)

    def first_row(self, rank: int) -> int:
        """The first row of a rank."""
        return min(rank * self.most_rows, self.n_words)

    @property
    def rows(self) -> slice:
        """Those of this rank."""
        return slice(self.first_row(self.rank), self.first_row(self.rank + 1))

    @property
    def n_blocks(self) -> int:
        """How many ranks have tokens of their own; 1 where all ranks have the same tokens."""
        return 1 if self.same_states else self.n_ranks

    @property
    def block(self) -> int:
        """Which of these blocks of tokens is this rank's."""
        return 0 if self.same_states else self.rank

    def local(self, name: str, tensor: Rows) -> Rows:
        """This rank's rows of a head or its bias, which may be a DTensor sharded by rows, and else are these already.

        Raises ValueError where they are not as many as this rank has, or the DTensor is sharded otherwise.
        """
        if tensor is None or not isinstance(tensor, Tensor):
            return tensor
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            from torch.distributed.tensor import DTensor, Shard  # slow to import, and who has one has imported it

            if isinstance(tensor, DTensor):
                if tensor.placements != (Shard(0),):
                    raise ValueError(f"{name} must be sharded by rows, [Shard(0)]. Got {list(tensor.placements)}.")
                tensor = tensor.to_local()
        n_rows = self.rows.stop - self.rows.start
        if tensor.dim() == 0 or tensor.shape[0] != n_rows:
            raise ValueError(
                f"{name} must have this rank's {n_rows} rows, [{self.rows.start}, {self.rows.stop}) of {self.n_words}. "
                f"Got {tuple(tensor.shape)}."
            )
        return tensor

    # What is exchanged ------------------------------------------------------------------------------------------------

    @property
    def _group(self) -> "dist.ProcessGroup":
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]  # a str by a name

    def gathered(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """[P, ...] of each rank's [...], in the order of the ranks."""
        out = tensor.new_empty((self.n_ranks, *tensor.shape)) if out is None else out
        # by its name before PyTorch 2.13 where it is older
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(out.view(-1), tensor.contiguous().view(-1), group=self._group)
        return out

    def blocks(self, tensor: Tensor) -> Tensor:
        """[n_blocks, ...] of a tensor [...] that depends on the tokens."""
        return tensor.unsqueeze(0) if self.same_states else self.gathered(tensor)

    def sum_of_blocks(self, parts: Tensor, out: Tensor) -> None:
        """out [...]: the sum over the ranks of this rank's block of `parts` [n_blocks, ...]."""
        if self.same_states:
            if parts.data_ptr() != out.data_ptr():
                out.copy_(parts[0])
            dist.all_reduce(out, group=self._group)
        else:
            reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            reduce_scatter(out.view(-1), parts.view(-1), group=self._group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        result = tensor.detach().clone()
        dist.all_reduce(result, group=self._group)
        return result

    @torch.no_grad()
    def whole(self, rows: Tensor) -> Tensor:
        """The tensor [V, ...] of which every rank has its `rows`: all ranks must call."""
        padded = rows.new_zeros((self.most_rows, *rows.shape[1:]))
        padded[: len(rows)] = rows
        return self.gathered(padded).flatten(0, 1)[: self.n_words]

    @property
    def share(self) -> float:
        """The share of a rank in the gradient of the head: the mean over ranks, each with the loss of its tokens."""
        return 1.0 / self.n_blocks


def rows_here(name: str, tensor: Rows, shard: VocabularyShard | None) -> Rows:
    """This rank's rows of a head or its bias; without a shard the whole, gathered where it is a sharded parameter."""
    if shard is None:
        return gathered(tensor)
    if not isinstance(shard, VocabularyShard):
        raise TypeError(f"shard must be a VocabularyShard or None. Got {type(shard).__name__}.")
    return shard.local(name, tensor)
