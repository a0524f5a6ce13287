"""The per-loop readout of K states through one head: norm, logits, cross-entropy, and every gradient, in chunks.

For the state h[k, t] [d] of loop k and token t, the head W [V, d] and coefficients c[k, t]:

    total = sum_{k, t} c[k, t] * CE(W norm(h[k, t]), target_t) + penalty * mean_{k, t, channels} h^2
    dL/dh = norm_backward(c * W^T g) + (2 penalty / (K N d)) h,   dL/dW = sum c * g y^T,   dL/dc = CE

with y = norm(h) and g = dCE/dlogits.  The K states share the head, so the rows of all loops are taken together, a
chunk at a time: norm -> logits = y W^T -> softmax, CE and g in place -> dy = g W -> norm backward, radial sums ->
dW += g^T y.  The three products go to the vendor's library: 6 K N d V FLOPs, the same as readout by readout, while
memory holds one chunk of logits and one dW, whatever K.  The gradients are formed in the forward pass, where the
logits are at hand, and multiplied by the upstream gradient in the backward pass; where the caller wants the rows'
losses themselves (their upstream gradient is not known in advance) the backward pass runs this same pass again.

dW and the loss are summed in float32.  g is kept in units of the largest |c|, so neither a mean over many tokens
nor a float16 loss scale leaves the range of the dtype, and the common factor is applied in float32.

Chunked readouts: Liger-Kernel (arXiv 2410.10989), cut-cross-entropy (arXiv 2411.09009).  The norm penalty and the
per-loop supervision: arXiv 2606.24898.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.cross_entropy import LossOptions, RowResults, cross_entropy_
from kernels.device import accumulator, product_dtype, uses_triton
from kernels.row_norm import Norm, norm_backward, norm_forward
from kernels.weighted_loss import Scales

Readout = Literal["rmsnorm", "layernorm", "raw", "final-only"]
CUDA_CHUNK_ROWS = 4096
CPU_CHUNK_ROWS = {torch.bfloat16: 1376, torch.float16: 1376}  # oneDNN's g W is at half its rate below about 1340 rows
CPU_WIDE_CHUNK_ROWS = 512
HEAD_ROWS = 4096  # rows of the head in one product on a CPU: MKL and oneDNN keep a panel of 20,000 less well in cache


class Piece(NamedTuple):
    """Rows `start..stop` of one loop's state, which are rows `first..first + stop - start` of the chunk."""

    loop: int
    start: int
    stop: int
    first: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.stop - self.start)


def norm_of(readout: str, loop: int, n_loops: int) -> Norm:
    """The norm that reads out `loop` (0-based) of `n_loops`."""
    if readout == "final-only":
        return "rmsnorm" if loop == n_loops - 1 else "none"
    return {"raw": "none", "rmsnorm": "rmsnorm", "layernorm": "layernorm"}[readout]  # type: ignore[return-value]


def chunks(active: Sequence[int], n_tokens: int, chunk_rows: int) -> Iterator[list[Piece]]:
    """The rows of the active loops, loop after loop, in chunks of `chunk_rows`, each as pieces of single loops."""
    n_rows = len(active) * n_tokens
    for first in range(0, n_rows, chunk_rows):
        pieces = []
        row, last = first, min(first + chunk_rows, n_rows)
        while row < last:
            loop, start = divmod(row, n_tokens)
            stop = min(n_tokens, start + last - row)
            pieces.append(Piece(active[loop], start, stop, row - first))
            row += stop - start
        yield pieces


def default_chunk_rows(head: Tensor, compute_dtype: torch.dtype) -> int:
    """Rows of a chunk: as few as full-rate products need."""
    if head.device.type == "cuda":
        return CUDA_CHUNK_ROWS
    return CPU_CHUNK_ROWS.get(product_dtype(head, compute_dtype), CPU_WIDE_CHUNK_ROWS)


class Gradients(NamedTuple):
    """Accumulators of the gradients that somebody needs; None for the others.

    Those of head, norm_weight, norm_bias and bias stay in units of the scales' reference.  The first chunk writes over
    head and bias; norm_weight and norm_bias, partial sums, are added to.
    """

    loops: list[Tensor | None]
    head: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    bias: Tensor | None

    @property
    def any(self) -> bool:
        """Whether the logits' gradient is needed at all."""
        others = (self.head, self.norm_weight, self.norm_bias, self.bias)
        return any(gradient is not None for gradient in (*self.loops, *others))


def head_accumulator(head: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Space [V, d] for dW's sum over the chunks; transposed in memory where AMX forms y^T g faster than g^T y."""
    dtype = accumulator(head.dtype)
    if head.is_cuda or product_dtype(head, compute_dtype) == dtype:
        return head.new_empty(head.shape, dtype=dtype)
    return head.new_empty(head.shape[::-1], dtype=dtype).t()


def _head_blocks(n_columns: int) -> Iterator[slice]:
    """The rows of the head that enter one product."""
    for first in range(0, n_columns, HEAD_ROWS):
        yield slice(first, min(first + HEAD_ROWS, n_columns))


def _form_logits(y: Tensor, head: Tensor, logits: Tensor) -> Tensor:
    """logits [R, V] = y W^T for y [R, d], W [V, d]."""
    if y.is_cuda:
        return torch.mm(y, head.t(), out=logits)
    for block in _head_blocks(len(head)):
        torch.mm(y, head[block].t(), out=logits[:, block])
    return logits


def _accumulate(total: Tensor, g: Tensor, y: Tensor, first: bool) -> None:
    """total [V, d] += g^T y for g [R, V], y [R, d], summed in total's float32; the first product is written over it."""
    if total.is_cuda and total.dtype == y.dtype:
        torch.mm(g.t(), y, out=total) if first else total.addmm_(g.t(), y)
    elif total.is_cuda and torch.version.hip is None:  # a float32 result of low-precision operands: CUDA only
        if first:
            torch.mm(g.t(), y, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, g.t(), y, out_dtype=total.dtype, out=total)
    else:
        _accumulate_blocks(total, g, y, first)


def _accumulate_blocks(total: Tensor, g: Tensor, y: Tensor, first: bool) -> None:
    """`_accumulate` where no product of low precision gives float32: block by block of the head, each rounded once."""
    y = y.float() if y.dtype == torch.float16 else y  # a sum may leave float16's range
    if not total.is_contiguous():  # see head_accumulator
        transposed = y.t().contiguous()
        low, wide = (like.new_empty(y.shape[1] * HEAD_ROWS) for like in (transposed, total))
    for block in _head_blocks(len(total)):
        rows, g_block = total[block], g[:, block].to(y.dtype)
        if not total.is_contiguous():
            rows = rows.t()
            product = torch.mm(transposed, g_block, out=low[: rows.numel()].view(rows.shape))
            rows.copy_(product) if first else rows.add_(wide[: rows.numel()].view(rows.shape).copy_(product))
        elif total.dtype == y.dtype:
            torch.mm(g_block.t(), y, out=rows) if first else rows.addmm_(g_block.t(), y)
        else:
            product = torch.mm(g_block.t(), y)
            rows.copy_(product) if first else rows.add_(product)


class ReadoutPass:
    """One pass over the rows of K states: fills the row results and, given scales, adds up the gradients."""

    def __init__(
        self,
        loops: list[Tensor],
        head: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        *,
        readout: str,
        eps: float,
        compute_dtype: torch.dtype,
    ) -> None:
        self.compute_dtype = product_dtype(head, compute_dtype)
        self.loops, self.head = loops, head.to(self.compute_dtype)
        self.norm_weight, self.norm_bias, self.readout, self.eps = norm_weight, norm_bias, readout, eps

    def norm_arguments(self, loop: int) -> tuple[Norm, Tensor | None, Tensor | None]:
        norm = norm_of(self.readout, loop, len(self.loops))
        return (norm, None, None) if norm == "none" else (norm, self.norm_weight, self.norm_bias)

    def forward(self, pieces: list[Piece], work: Tensor, mean_square: Tensor | None) -> Tensor:
        """The normed rows y [R, d] of a chunk in the compute dtype; mean_square [K, N] is filled where given."""
        n_rows = pieces[-1].rows.stop
        h = self.loops[pieces[0].loop][pieces[0].tokens]
        norms = {self.norm_arguments(piece.loop)[0] for piece in pieces}
        in_place = len(pieces) == 1 and norms == {"none"} and h.dtype == self.compute_dtype
        for piece in pieces:
            norm, weight, norm_bias = self.norm_arguments(piece.loop)
            square = None if mean_square is None else mean_square[piece.loop, piece.tokens]
            if in_place and square is None:
                continue
            norm_forward(
                self.loops[piece.loop][piece.tokens], weight, norm_bias, eps=self.eps, norm=norm,
                y=None if in_place else work[piece.rows], mean_square=square,
            )  # fmt: skip
        return h if in_place else work[:n_rows]

    def backward(
        self, pieces: list[Piece], g: Tensor, y: Tensor, dy: Tensor, gradients: Gradients, scales: Scales,
        penalised: bool, radial: Tensor | None, first: bool,
    ) -> None:  # fmt: skip
        """Add the gradients of one chunk, given g = omega * dCE/dlogits [R, V]; dy [R, d] is work space."""
        if gradients.head is not None:
            _accumulate(gradients.head, g, y, first)
        if gradients.bias is not None:
            dbias = g.sum(0, dtype=gradients.bias.dtype)
            gradients.bias.copy_(dbias) if first else gradients.bias.add_(dbias)
        norm_parameters = gradients.norm_weight is not None or gradients.norm_bias is not None
        normed = norm_parameters and any(self.norm_arguments(piece.loop)[0] != "none" for piece in pieces)
        if not normed and all(gradients.loops[piece.loop] is None for piece in pieces):
            return
        torch.mm(g, self.head, out=dy)
        for piece in pieces:
            norm, weight, _ = self.norm_arguments(piece.loop)
            dh = gradients.loops[piece.loop]
            norm_backward(
                dy[piece.rows], self.loops[piece.loop][piece.tokens], weight, eps=self.eps, norm=norm,
                scale=scales.reference,
                dmean_square=scales.dmean_square.expand(piece.stop - piece.start) if penalised else None,
                dh=None if dh is None else dh[piece.tokens],
                dweight=None if norm == "none" else gradients.norm_weight,
                dbias=None if norm == "none" else gradients.norm_bias, add=True,
                radial=None if radial is None or dh is None else radial[:, piece.loop, piece.tokens],
            )  # fmt: skip

    def run(
        self, active: Sequence[int], targets: Tensor, bias: Tensor | None, options: LossOptions, chunk_rows: int,
        results: RowResults, *, mean_square: Tensor | None = None, gradients: Gradients | None = None,
        scales: Scales | None = None, penalised: bool = False, radial: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Read out the active loops; results are [len(active) * N], mean_square and radial [K, N] of all loops.

        Gradients are added up where `gradients` and `scales` are given, with the penalty's where `penalised`.
        """
        n_tokens, d = self.loops[0].shape
        rows = min(chunk_rows, max(1, len(active) * n_tokens))
        work = self.head.new_empty((rows, d))
        n_columns = self.head.shape[0]
        row_length = triton.cdiv(n_columns, 16) * 16 if uses_triton(self.head) else n_columns  # for 16-byte accesses
        logits = self.head.new_empty((rows, row_length))[:, :n_columns]
        dy = self.head.new_empty((rows, d)) if scales is not None else work
        for index, pieces in enumerate(chunks(active, n_tokens, chunk_rows)):
            n_rows = pieces[-1].rows.stop
            y = self.forward(pieces, work, mean_square)
            g = _form_logits(y, self.head, logits[:n_rows])
            omega = None if scales is None else scales.omega
            cross_entropy_(g, targets, omega, bias, options, results, index * chunk_rows)
            if scales is not None and gradients is not None:
                self.backward(pieces, g, y, dy[:n_rows], gradients, scales, penalised, radial, index == 0)
