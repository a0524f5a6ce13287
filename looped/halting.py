"""Calibrated halting: stop a token at the first loop whose prediction is clear enough.

The margin of a loop is its largest logit minus the second largest. A token leaves at the first loop k < K with
`m_k >= tau`, and at K otherwise. tau is the one that uses the fewest loops on a calibration slice among those whose
perplexity there is at most `tolerance` times that at K; it has to be reported on another slice (Sharma & Vu,
arXiv 2606.24898).

The margin is a token's own, and the logits of a token depend on no later one: the rule is causal. But later tokens
attend to the states of all loops of a token, so that those of a token that has left are computed all the same, and mean
loops are a measure of when predictions are ready, not of time saved.
"""

import math

import torch
from torch import Tensor


def exit_loops(margin: Tensor, tau: float) -> Tensor:
    """The loop, 1 to K, at which every token leaves: the first k < K with `margin[k] >= tau`, or else K.

    margin: [K, ...], of loops 1..K; that of loop K does not matter. tau: a logit difference, inf for K loops always.
    Returns [...] int64. Raises ValueError for a margin without loops or a tau that is nan.
    """
    if margin.dim() == 0 or len(margin) == 0:
        raise ValueError(f"margin must be of at least one loop, [K, ...]. Got shape {list(margin.shape)}.")
    if math.isnan(tau):
        raise ValueError(f"tau must be a number or inf. Got tau={tau}.")
    clear = margin >= tau
    clear[-1] = True
    return clear.int().argmax(0) + 1  # the first of several largest


def calibrate(loss: Tensor, margin: Tensor, tolerance: float = 1.01) -> float:
    """The tau of the fewest mean loops with `PPL(tau) <= tolerance * PPL at K`; inf, which always is, if no other is.

    loss: [K, ...] cross-entropy in nats of every loop and token. margin: the same shape, finite. The perplexity need
    not fall as tau rises, so that every tau at which some token's exit changes is looked at. Of the taus between two
    of those, which are alike on this slice, the largest is returned.

    Raises ValueError for shapes that differ, no token, a loss or margin that is not finite, or a tolerance below 1.
    """
    if loss.shape != margin.shape or loss.dim() < 2 or loss.numel() == 0:
        raise ValueError(
            "loss and margin must have one shape [K, ...] with at least one loop and token. "
            f"Got loss {list(loss.shape)}, margin {list(margin.shape)}."
        )
    if not (loss.isfinite().all() and margin.isfinite().all()):
        raise ValueError("loss and margin must be finite.")
    if not tolerance >= 1:
        raise ValueError(f"tolerance must be at least 1. Got tolerance={tolerance}.")
    loss, margin = loss.flatten(1).double(), margin.flatten(1)
    # As tau falls, a token steps back from loop k + 1 to k when tau reaches the largest of its first k margins.
    reached = margin[:-1].cummax(0).values.flatten()
    change = (loss[:-1] - loss[1:]).flatten()
    reached, order = reached.sort(descending=True)
    change_so_far = change[order].cumsum(0)
    # Tokens with equal margins step together: only after the last of them is there a tau.
    last = torch.ones_like(reached, dtype=torch.bool)
    last[:-1] = reached[:-1] != reached[1:]
    allowed = last & (change_so_far / loss.shape[1] <= math.log(tolerance))
    # Every step back saves one loop of one token, so that the lowest tau has the fewest loops.
    return float(reached[allowed][-1]) if bool(allowed.any()) else math.inf
