"""The loss of a row of logits whose columns are shared out over the ranks of a group, its gradient and statistics.

The loss is that of kernels/cross_entropy.py.  kernels/vocabulary_shard.py says who has which columns.

Rank p has the logits z_j of a row in its V_p columns j.  It sends, the sums over its columns alone:

    m_p = max z_j     S_p = sum exp(z_j - m_p)     t_p = z_t where it has the target's column, else 0
    G_p = sum (m_p - z_j)                          for label smoothing
    E_p = sum exp(z_j - m_p) (z_j - m_p),   second largest z_j,   first j of the largest        for statistics

and from all ranks' each rank finds, with m = max_p m_p and f_p = exp(m_p - m), as an online softmax does:

    S = sum_p f_p S_p    lse = m + log S    z_t = sum_p t_p    mean_j (m - z_j) = sum_p (G_p + V_p (m - m_p)) / V
    entropy = log S - sum_p f_p (E_p + S_p (m_p - m)) / S
    margin = m - the largest of: the second of the first rank with m_p = m, the m_p of the others; nan unless S > 0

The gradient of its columns then needs m, S and the target alone.  One exchange of 4 floats a row and rank, with
statistics 7.  A rank whose columns are all -inf sends m_p = -1e38 and S_p = 0.

Shapes: logits [R, V_p], targets [R] in [0, V); parts [P, 4 or 7, R] float32 (float64 for float64).

Vocabulary-parallel cross-entropy: Megatron-LM, arXiv 1909.08053.  Online softmax: Milakov & Gimelshein, arXiv
1805.02867.
"""

import torch
from torch import Tensor

from .cross_entropy import LossOptions, RowResults, finished_logits
from .cross_entropy_cpu import top2
from .device import accumulator, cpu_blocks, implementation, uses_triton
from .vocabulary_shard import VocabularyShard

LOWEST = -1.0e38  # a maximum over nothing, of which differences are still finite


def n_parts(*, statistics: bool) -> int:
    """How many numbers a rank sends of a row."""
    return 7 if statistics else 4


def form_parts(logits: Tensor, targets: Tensor, options: LossOptions, shard: VocabularyShard, parts: Tensor) -> None:
    """Write what this rank sends of rows of its logits [R, V_p], parts [4 or 7, R].

    A row is stride(0) elements long in memory, as for `cross_entropy_`.
    """
    if uses_triton(logits):
        implementation("sharded_cross_entropy_triton").form_parts(logits, targets, options, shard, parts)
        return
    targets = targets - shard.rows.start
    for rows in cpu_blocks(len(logits), _row_bytes(logits)):
        _parts_of_block(finished_logits(logits[rows], options), targets[rows], options, parts[:, rows])


def finish_rows(
    logits: Tensor, targets: Tensor, row_weight: Tensor | None, options: LossOptions, shard: VocabularyShard,
    parts: Tensor, results: RowResults, *, gradient: bool,
) -> None:  # fmt: skip
    """Write the results of rows from all ranks' parts [P, 4 or 7, R]; with a gradient, dCE/dlogits over the logits.

    row_weight [R], or None: of rows with a weight of exactly 0 the gradient is 0, as of those that are ignored.
    """
    if uses_triton(logits):
        implementation("sharded_cross_entropy_triton").finish_rows(
            logits, targets, row_weight, options, shard, parts, results, gradient
        )
        return
    counts = targets != options.ignore_index
    maximum, total, lse = _combined(parts, targets, counts, options, shard, results)
    if not gradient:
        return
    if row_weight is not None:
        counts = counts & (row_weight != 0)
    scale = 1 / total if options.z_loss is None else (1 + 2 * options.z_loss * lse) / total
    targets = targets - shard.rows.start
    for rows in cpu_blocks(len(logits), _row_bytes(logits)):
        z = finished_logits(logits[rows], options)
        of_rows = maximum[rows], scale[rows], targets[rows], counts[rows]
        logits[rows] = _gradient_of_block(z, *of_rows, options, shard.n_words)


def _row_bytes(logits: Tensor) -> int:
    return logits.shape[1] * accumulator(logits.dtype).itemsize


def _hits(targets: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    """Of which rows this rank has the target's column, and that column (0 elsewhere); targets count from its first."""
    here = (targets >= 0) & (targets < n_columns)
    return here, torch.where(here, targets, 0)


def _parts_of_block(z: Tensor, targets: Tensor, options: LossOptions, parts: Tensor) -> None:
    if len(parts) > 4:
        largest, best, second = top2(z)
        parts[5], parts[6] = second, best
    else:
        largest = z.amax(-1)
    torch.clamp(largest, min=LOWEST, out=parts[0])
    here, column = _hits(targets, z.shape[1])
    parts[2] = torch.where(here, z.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)
    below = z - parts[0].unsqueeze(-1)
    parts[3] = -below.sum(-1) if options.label_smoothing else 0.0
    e = below.exp()
    torch.sum(e, -1, out=parts[1])
    if len(parts) > 4:
        parts[4] = torch.where(e > 0, e * below, 0.0).sum(-1)  # not 0 * inf, of a logit of -inf


def _combined(
    parts: Tensor, targets: Tensor, counts: Tensor, options: LossOptions, shard: VocabularyShard, results: RowResults
) -> tuple[Tensor, Tensor, Tensor]:
    """m, S and lse [R] of all ranks' parts; the results of the rows."""
    largest, sums, of_target, gaps = parts.unbind(1)[:4]  # each [P, R]
    maximum = largest.amax(0)
    below = largest - maximum
    factors = below.exp()
    total = (factors * sums).sum(0)
    log_total = total.log()
    lse = maximum + log_total
    # differences from the maximum, not from lse, which a large common offset would round
    loss = log_total + (1 - options.label_smoothing) * (maximum - of_target.sum(0))
    if options.label_smoothing:
        n_columns = [shard.first_row(rank + 1) - shard.first_row(rank) for rank in range(shard.n_ranks)]
        mean_gap = (gaps - torch.tensor(n_columns).unsqueeze(1) * below).sum(0) / shard.n_words
        loss += options.label_smoothing * mean_gap
    if options.z_loss is not None:
        loss += options.z_loss * lse.square()
    results.loss.copy_(loss.masked_fill_(~counts, 0.0))
    if results.statistics is not None and results.top1 is not None:
        moments, seconds, best = parts.unbind(1)[4:]
        results.statistics[0] = lse
        results.statistics[1] = log_total - (factors * (moments + sums * below)).sum(0) / total
        winner = (largest == maximum).byte().argmax(0, keepdim=True)  # the first
        others = torch.where(sums == 0, -torch.inf, largest).scatter(0, winner, seconds.gather(0, winner))
        results.statistics[2] = torch.where(total > 0, maximum - others.amax(0), torch.nan)
        results.top1.copy_(best.gather(0, winner).squeeze(0).long() + winner.squeeze(0) * shard.most_rows)
    return maximum, total, lse


def _gradient_of_block(
    z: Tensor, maximum: Tensor, scale: Tensor, targets: Tensor, counts: Tensor, options: LossOptions, n_words: int
) -> Tensor:
    """dCE/dx [R, V_p] of z; scale: of exp(z - maximum)."""
    smoothing = options.label_smoothing
    g = (z - maximum.unsqueeze(-1)).exp_().mul_(scale.unsqueeze(-1))
    if smoothing:
        g.sub_(smoothing / n_words)
    here, column = _hits(targets, g.shape[1])
    hit = torch.where(here, smoothing - 1, 0.0).to(g.dtype)
    g.scatter_add_(-1, column.unsqueeze(-1), hit.unsqueeze(-1))
    if options.softcap is not None:
        g.mul_(1 - (z / options.softcap).square())
    return g.masked_fill_(~counts.unsqueeze(-1), 0.0)
