"""Calibrated halting: stop a token at the first loop whose prediction is clear enough.

The margin m_k of loop k is its largest logit minus the second largest. A token leaves at the first loop k < K with
`m_k >= tau`, and at K otherwise. tau is calibrated on one slice of the text: among the taus whose perplexity there is
at most `tolerance` times that at K, it is the one that uses the fewest loops. What it gives has to be reported on
another slice (Sharma & Vu, arXiv 2606.24898).

The rule is causal: a token's margin comes from its own logits, which depend on no later token. It saves no time, since
later tokens attend to the states of all loops of a token, which have to be computed after it has left too. The mean
number of loops says when predictions are ready.
"""

import math

import torch
from torch import Tensor


def exit_loops(margin: Tensor, tau: float) -> Tensor:
    """The loop, 1 to K, at which every token leaves: the first k < K with `m_k >= tau`, or else K.

    margin: [K, ...], m_1..m_K; the last one does not matter. tau: a difference of logits; inf means K loops always.
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
    """The tau with the fewest mean loops among those with `PPL(tau) <= tolerance * PPL at K`.

    inf always qualifies (no token leaves early), and is returned if no other tau does.

    loss: [K, ...], cross-entropy in nats of every loop and token. margin: [K, ...]. The perplexity need not fall as tau
    rises, so every tau at which some token's exit changes is looked at. All taus between two of those give the same
    exits on this slice: the largest of them is returned.

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
    # Let tau fall from inf. A token steps back from loop k + 1 to loop k when tau reaches the largest of m_1..m_k.
    step_tau = margin[:-1].cummax(0).values.flatten()
    step_loss = (loss[:-1] - loss[1:]).flatten()  # what the step adds to the token's loss
    step_tau, order = step_tau.sort(descending=True)
    added_loss = step_loss[order].cumsum(0)
    # Steps at the same tau happen together, so the loss counts only after the last of them.
    last_at_tau = torch.ones_like(step_tau, dtype=torch.bool)
    last_at_tau[:-1] = step_tau[:-1] != step_tau[1:]
    allowed = last_at_tau & (added_loss / loss.shape[1] <= math.log(tolerance))
    # Every step saves one loop of one token, so the lowest tau has the fewest loops.
    return float(step_tau[allowed][-1]) if bool(allowed.any()) else math.inf
