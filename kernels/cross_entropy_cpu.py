"""Softmax, cross-entropy and its gradient over one chunk of a CPU's logits, in place: as few passes as ATen allows.

The equations are those of kernels/cross_entropy.py.  Rows are taken in blocks that fit the caches, so that all passes
but the first find them there.
"""

import torch
from torch import Tensor

from .cross_entropy import LossOptions, RowResults
from .device import accumulator, cpu_blocks

RUN = 128  # columns of which the maximum is taken first


def top2(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of z [R, V]: the largest element, its index, the second largest (-inf where V = 1).

    From the maxima of short runs: ATen uses vector instructions for a maximum only where it need not give its index.
    """
    n_columns = z.shape[-1]
    whole = n_columns // RUN * RUN
    runs = z[:, :whole].unflatten(-1, (whole // RUN, RUN)).amax(-1)
    if whole < n_columns:
        runs = torch.cat([runs, z[:, whole:].amax(-1, keepdim=True)], -1)
    run = runs.argmax(-1, keepdim=True)
    column = run * RUN + torch.arange(RUN)
    values = z.gather(-1, column.clamp(max=n_columns - 1)).masked_fill_(column >= n_columns, -torch.inf)
    largest, place = values.max(-1, keepdim=True)
    others = values.scatter_(-1, place, -torch.inf).amax(-1), runs.scatter_(-1, run, -torch.inf).amax(-1)
    return largest.squeeze(-1), (run * RUN + place).squeeze(-1), torch.maximum(*others)


def _block(
    z: Tensor, targets: Tensor, counts: Tensor, options: LossOptions, results: RowResults, rows: slice, gradient: bool
) -> None:
    """Results of the float32 logits z [rows, V], which become dCE/dx, 0 in rows that do not count."""
    smoothing, softcap = options.label_smoothing, options.softcap
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z.square() if gradient else None
        z.mul_(softcap)
    ignored = targets == options.ignore_index
    target = targets.masked_fill(ignored, 0).unsqueeze(-1)
    z_target = z.gather(-1, target).squeeze(-1)
    best = None
    if results.statistics is not None and results.top1 is not None:
        maximum, best, second = top2(z)
        results.statistics[2, rows], results.top1[rows] = maximum - second, best
    else:
        maximum = z.amax(-1)
    mean_gap = (maximum.unsqueeze(-1) - z).mean(-1) if smoothing else None
    p = torch.softmax(z, -1, out=z if results.statistics is None else torch.empty_like(z))
    largest = p.amax(-1) if best is None else p.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    log_total = -largest.log()  # the largest probability is 1 / sum_j exp(z_j - maximum)
    lse = maximum + log_total
    # differences from the maximum, not from lse, which a large common offset would round
    loss = log_total + (1 - smoothing) * (maximum - z_target)
    if options.z_loss is not None:
        loss += options.z_loss * lse.square()
    if mean_gap is not None:
        loss += smoothing * mean_gap
    results.loss[rows] = loss.masked_fill_(ignored, 0.0)
    if results.statistics is not None:
        results.statistics[0, rows] = lse
        gaps = z.sub_(maximum.unsqueeze(-1)).mul_(p)
        mean = gaps.sum(-1)
        if bool(mean.isnan().any()):  # 0 * inf, from a logit of -inf
            mean = gaps.nan_to_num_(nan=0.0).sum(-1)
        results.statistics[1, rows] = log_total - mean
    if not gradient:
        return
    if options.z_loss is not None:
        torch.mul(p, (1 + 2 * options.z_loss * lse).unsqueeze(-1), out=z)
    elif p is not z:
        z.copy_(p)
    if smoothing:
        z.sub_(smoothing / z.shape[-1])
    z.scatter_add_(-1, target, torch.full_like(target, smoothing - 1, dtype=z.dtype))
    if slope is not None:
        z.mul_(slope)
    if not bool(counts.all()):
        z.masked_fill_(~counts.unsqueeze(-1), 0.0)


def _row_maximum(z: Tensor) -> Tensor:
    """max_j z[r, j] of bfloat16: as int16, four times faster and the same where it is not negative."""
    maximum = z.view(torch.int16).amax(-1)
    negative = (maximum < 0).nonzero().squeeze(-1)
    maximum = maximum.view(z.dtype).float()
    return maximum.index_copy_(0, negative, z[negative].amax(-1).float()) if len(negative) else maximum


def _bfloat16_rows(
    z: Tensor, targets: Tensor, counts: Tensor, ignore_index: int, results: RowResults, rows: slice
) -> None:
    """Losses of bfloat16 logits z [rows, V], which become dCE/dz: p = softmax(z) in one pass, rounded once.

    CE = -log p_t has the relative precision of p, 2^-9, where p_t <= 1/2.  A larger p_t is taken as the rest's
    complement, 1 - sum_{j != t} p_j, in float32; where p_t leaves the range, CE = max_j z_j - z_t - log max_j p_j.
    """
    ignored = targets == ignore_index
    target = targets.masked_fill(ignored, 0)
    row = torch.arange(len(z))
    maximum, z_target = _row_maximum(z), z[row, target].float()
    p = torch.softmax(z, -1, out=z)
    p_target = p[row, target].float()
    loss = -p_target.log()
    likely, tiny = ((outside).nonzero().squeeze(-1) for outside in (p_target > 0.5, ~(p_target > 1e-30)))
    if len(likely):
        loss[likely] = -torch.log1p(-(p[likely].float().sum(-1) - p_target[likely]).clamp_(min=0))
    if len(tiny):  # or nan
        loss[tiny] = (maximum - z_target - _row_maximum(p).log())[tiny]
    results.loss[rows] = loss.masked_fill(ignored, 0.0)
    p[row, target] = torch.expm1(-loss).to(p.dtype)
    if not bool(counts.all()):
        p[~counts] = 0.0


def cross_entropy(
    logits: Tensor, targets: Tensor, row_weight: Tensor | None, options: LossOptions, results: RowResults,
    first_row: int, gradient: bool,
) -> None:  # fmt: skip
    n_rows, n_columns = logits.shape
    token = torch.arange(first_row, first_row + n_rows).remainder_(targets.shape[0])
    targets = targets[token]
    counts = targets != options.ignore_index
    if row_weight is not None:
        counts &= row_weight[first_row : first_row + n_rows] != 0
    plain = options.bias is None and results.statistics is None and not options.label_smoothing
    plain = plain and options.softcap is None and options.z_loss is None
    if gradient and plain and logits.dtype == torch.bfloat16:
        rows = slice(first_row, first_row + n_rows)
        _bfloat16_rows(logits, targets, counts, options.ignore_index, results, rows)
        return
    wide = accumulator(logits.dtype)
    for block in cpu_blocks(n_rows, n_columns * wide.itemsize):
        z = logits[block].to(wide)  # the logits themselves where they are of that dtype
        if options.bias is not None:
            z.add_(options.bias)
        rows = slice(first_row + block.start, first_row + block.stop)
        _block(z, targets[block], counts[block], options, results, rows, gradient)
        if z.dtype != logits.dtype and gradient:
            logits[block] = z
