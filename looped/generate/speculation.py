"""Self-speculative decoding: the first loops of a model draft tokens, its other loops verify them in one pass."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from looped.generate.decoder import Decoder
from looped.generate.options import Options
from looped.generate.rows import Rows, Step
from looped.generate.sampling import Draws, draw


def speculate(decoder: Decoder, tokens: Tensor, draws: Draws, rows: Rows, options: Options) -> Iterator[Step]:
    """tokens: [B], the last of every row, which have not been fed."""
    assert options.draft_loops is not None
    loops = [decoder.n_loops] * len(tokens)
    while rows.remaining > 0:
        n = min(options.draft_tokens, rows.remaining - 1)
        start = decoder.end
        drafted, distributions, states, embedded = [tokens], [], [], []
        uniforms = draws.uniforms(2 * n + 1)
        for i in range(n + 1):  # the last token is fed and its successor not drafted
            logits, *fed = decoder.first_loops(drafted[-1], options.draft_loops)
            states.append(fed[0])
            embedded.append(fed[1])
            if i < n:
                distributions.append(options.probabilities(logits))
                drafted.append(draw(distributions[-1], uniforms[:, i]))
        logits = decoder.other_loops(options.draft_loops, torch.cat(states, dim=1), torch.cat(embedded, dim=1))
        target = options.probabilities(logits)
        kept = 0
        if n == 0:
            tokens = draw(target[:, 0], uniforms[:, -1])
        else:
            draft = torch.stack(distributions, dim=1)
            kept, tokens = verify(
                torch.stack(drafted[1:], dim=1), draft, target, uniforms[:, n:-1], uniforms[:, -1], rows.finished
            )
        decoder.end = start + 1 + kept
        yield rows.take(torch.stack([*drafted[1 : kept + 1], tokens], dim=1), loops, drafted=n, kept=kept)


def verify(
    drafted: Tensor, draft: Tensor, target: Tensor, accepting: Tensor, drawing: Tensor, finished: Sequence[bool]
) -> tuple[int, Tensor]:
    """How many drafted tokens m stay in all rows, and the token [B] that comes after them.

    Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318): token x from a draft's q stays
    with probability min(1, p(x) / q(x)). In place of the first that does not stay, one is drawn from
    max(p - q, 0), normalised; after n that stay, one from p. All m + 1 tokens are then distributed as p has it.

    m is the smallest number in a row, so that rows stay aligned. A row that could have kept more keeps token m + 1 as
    the one that comes after: cutting a row short for another one's sake does not look at its own tokens.

    drafted: [B, n]. draft: q [B, n, V]. target: p [B, n + 1, V]. accepting [B, n], drawing [B]: uniform numbers.
    finished: rows whose tokens do not matter.
    """
    n = drafted.shape[1]
    chosen = drafted.unsqueeze(-1)
    p, q = (each.gather(-1, chosen).squeeze(-1).double() for each in (target[:, :n], draft))
    stays = (accepting * q < p).long().cumprod(1).sum(1)  # [B], of each row
    stays = stays.masked_fill(torch.tensor(finished, device=stays.device), n)
    m = int(stays.min())
    if m == n:
        return n, draw(target[:, n], drawing)
    rest = (target[:, m] - draft[:, m]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target[:, m])  # p and q equal but for their rounding
    return m, torch.where(stays == m, draw(rest, drawing), drafted[:, m])
