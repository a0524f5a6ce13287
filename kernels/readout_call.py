"""A call of the readout: its tensors, what it is apart from their values, and its results.

All is decided once, in a public function, and then carried.
"""

import ast
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .row_norm import Norm
from .vocabulary_shard import VocabularyShard

PARAMETERS = ("head", "norm_weight", "norm_bias", "bias")  # of the tensors, those that may have a gradient


class ReadoutCall(NamedTuple):
    """One readout of K states [N, d].  Public functions make it; `flat` and `of` take it through the op's border.

    readout, eps: the norm before the head.  n_loops: K.  active: the loops that are read out, 0-based.
    differentiated: the loops whose states' gradients are formed.  needs: which of "head", "norm_weight", "norm_bias"
    and "bias" need a gradient.  penalised: whether there is a norm penalty.
    weight: of every row, where there is no tensor of weights.  mean: whether the loss is divided by n.
    ignore_index, label_smoothing, softcap: of the loss of a row (kernels/cross_entropy.py).
    statistics: whether they are wanted.  chunk_rows: rows whose logits are in memory at once.
    dtype: in which the products' operands are, by name.
    shard: the rank's part of the head, or None where the head is whole.
    """

    readout: str
    eps: float
    n_loops: int
    active: tuple[int, ...]
    differentiated: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()
    penalised: bool = False
    weight: float = 1.0
    mean: bool = False
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    statistics: bool = False
    chunk_rows: int = 1
    dtype: str = "float32"
    shard: VocabularyShard | None = None

    def flat(self) -> tuple[str, list[float]]:
        """The call as arguments of an op: its numbers, which torch.compile may trace, and the rest as a string."""
        rest = self._replace(eps=0.0, weight=0.0, label_smoothing=0.0, softcap=None if self.softcap is None else 0.0)
        *fields, shard = rest
        text = repr((*fields, None if shard is None else tuple(shard)))
        return text, [self.eps, self.weight, self.label_smoothing, self.softcap or 0.0]

    @staticmethod
    def of(rest: str, numbers: list[float]) -> "ReadoutCall":
        """The call that `flat` gave as (rest, numbers)."""
        call = _read(rest)
        eps, weight, label_smoothing, softcap = numbers
        return call._replace(
            eps=eps, weight=weight, label_smoothing=label_smoothing, softcap=None if call.softcap is None else softcap
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch's."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def norm(self, loop: int) -> Norm:
        """The norm before the head at `loop`."""
        if self.readout == "raw" or (self.readout == "final-only" and loop < self.n_loops - 1):
            return "none"
        return "layernorm" if self.readout == "layernorm" else "rmsnorm"

    @property
    def needs_dy(self) -> bool:
        """Whether the gradient of the normed rows is needed: for a state that is read, or the norm's parameters."""
        if not set(self.active).isdisjoint(self.differentiated):
            return True
        of_norm = "norm_weight" in self.needs or "norm_bias" in self.needs
        return of_norm and any(self.norm(loop) != "none" for loop in self.active)

    @property
    def needs_dlogits(self) -> bool:
        """Whether the gradient of the logits is formed at all."""
        return self.needs_dy or "head" in self.needs or "bias" in self.needs


@functools.cache
def _read(rest: str) -> ReadoutCall:
    *fields, shard = ast.literal_eval(rest)
    return ReadoutCall._make((*fields, None if shard is None else VocabularyShard(*shard)))


class ReadoutTensors(NamedTuple):
    """The op's tensors after the states, in the order of its schema: head [V, d], targets [N], weights [A, 1 or N],
    norm_weight and norm_bias [d], bias [V], and the numbers penalty, z_loss and n_targets []."""

    head: Tensor
    targets: Tensor
    weights: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    bias: Tensor | None = None
    penalty: Tensor | None = None
    z_loss: Tensor | None = None
    n_targets: Tensor | None = None


class ReadoutResults(NamedTuple):
    """The results of the op, for A loops that are read and N tokens; what is not asked for is an empty vector.

    total: []; per_loop: [A]; ce: [A, N], the rows' losses.
    factors: [3], row_weight: [A * N]: the fields of LossScales.
    dhead: [V, d], dbias: [V]: sums over the rows that wait for the unit and the upstream gradient.
    statistics: [6, A, N]: lse, entropy, margin, mean square, radial dot, radial fraction; top1: [A, N].
    dy: [A * N, d], the gradient of the normed rows, which waits for the row's coefficient and the upstream gradient.
    """

    total: Tensor
    per_loop: Tensor
    ce: Tensor
    factors: Tensor
    row_weight: Tensor
    dhead: Tensor
    dbias: Tensor
    statistics: Tensor
    top1: Tensor
    dy: Tensor
