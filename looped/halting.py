"""Halting: stop a token at the first loop after which it is ready, by a calibrated threshold on a score.

A policy gives every token a score after every loop; larger is readier. A token leaves at the first loop k < K whose
score is at least tau, and at K otherwise. tau is calibrated on one slice of the text: among the taus whose perplexity
there is at most `tolerance` times that at K, it is the one that uses the fewest loops. What it gives has to be reported
on another slice (Sharma & Vu, arXiv 2606.24898).

    policy            score after loop k                                source
    margin            largest logit minus the second largest            Sharma & Vu, arXiv 2606.24898
    top-probability   max_v p_v, p = softmax of the logits              MSDNet, arXiv 1703.09844
    entropy           -H(p) = sum_v p_v log p_v, nats                   BranchyNet, arXiv 1709.01686
    state-change      -|H_k - H_{k-1}| / |H_k|                          Huginn, arXiv 2502.05171: its code's latent-diff
    gate              sum_{j <= k} p_j, the gate's exit distribution    Ouro, arXiv 2510.25741

The first three need the logits after every loop, the gate what the coda makes of the state (R_k), if there is a coda,
and the state's change neither. Every policy is causal: a token's score comes from its own state, which depends on no
later token. This file reads states that were computed for all tokens at all loops, which says when predictions are
ready and saves no time; looped/early_exit.py leaves later loops out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from looped.config import at_least
from looped.kernels.device import accumulator


class Seen(NamedTuple):
    """What a policy may look at: tokens [...] after loop k.

    before, state: H_{k-1} and H_k, [..., d]. logits: [..., V] after loop k; None for policies that need none.
    score: [...], the policy's own score after loop k-1; None after the first loop.
    read: R_k [..., d], what the readout makes the logits of; None for policies that do not need it.
    """

    before: Tensor
    state: Tensor
    logits: Tensor | None = None
    score: Tensor | None = None
    read: Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """score: what is seen of tokens [...] -> their scores [...]. reads_logits, reads: whether it needs logits, R_k."""

    name: str
    reads_logits: bool
    score: Callable[[Seen], Tensor]
    reads: bool = False


def _margin(seen: Seen) -> Tensor:
    best, second = _logits(seen).topk(2).values.unbind(-1)
    return best - second


def _top_probability(seen: Seen) -> Tensor:
    logits = _logits(seen)
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def _negative_entropy(seen: Seen) -> Tensor:
    log_p = _logits(seen).log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


def _negative_change(seen: Seen) -> Tensor:
    before, state = wide(seen.before), wide(seen.state)
    length = state.norm(dim=-1).clamp(min=torch.finfo(state.dtype).eps)  # a state of zero has a finite score too
    return -(state - before).norm(dim=-1) / length


def _logits(seen: Seen) -> Tensor:
    assert seen.logits is not None  # as `reads_logits` says
    return wide(seen.logits)


def wide(x: Tensor) -> Tensor:
    """x, at least fp32."""
    return x.to(accumulator(x.dtype))


MARGIN = Policy("margin", True, _margin)
TOP_PROBABILITY = Policy("top-probability", True, _top_probability)
ENTROPY = Policy("entropy", True, _negative_entropy)
STATE_CHANGE = Policy("state-change", False, _negative_change)
WITHOUT_A_GATE = (MARGIN, TOP_PROBABILITY, ENTROPY, STATE_CHANGE)  # what every model has


def gate_policy(exit_logit: Callable[[Tensor], Tensor]) -> Policy:
    """The policy of a gate: how probable it is that a token has stopped by loop k, `1 - prod_{j <= k} (1 - lambda_j)`.

    exit_logit: R_k [..., d] -> g_k [...], lambda_k = sigmoid(g_k), as `LoopedLM.exit_logit` gives it.
    """

    def score(seen: Seen) -> Tensor:
        assert seen.read is not None  # as `reads` says
        going_on = torch.sigmoid(-wide(exit_logit(seen.read)))
        return 1 - (going_on if seen.score is None else going_on * (1 - seen.score))

    return Policy("gate", False, score, reads=True)


def policy_named(name: str, exit_logit: Callable[[Tensor], Tensor] | None = None) -> Policy:
    """The policy of that name. exit_logit: as `gate_policy` takes it, of a model that has a gate.

    Raises ValueError for an unknown policy, and for `gate` without a gate.
    """
    known = {policy.name: policy for policy in WITHOUT_A_GATE}
    if exit_logit is not None:
        known["gate"] = gate_policy(exit_logit)
    elif name == "gate":
        raise ValueError("policy gate needs a model with an exit gate. Got policy='gate'.")
    if name not in known:
        raise ValueError(f"policy must be one of {', '.join(known)}. Got policy={name!r}.")
    return known[name]


def exit_loops(score: Tensor, tau: float) -> Tensor:
    """The loop, 1 to K, at which every token leaves: the first k < K with `score_k >= tau`, or else K.

    score: [K, ...], of loops 1..K; the last one does not matter. tau: in the score's unit; inf means K loops always.
    Returns [...] int64. Raises ValueError for a score without loops or a tau that is nan.
    """
    if score.dim() == 0 or len(score) == 0:
        raise ValueError(f"score must be of at least one loop, [K, ...]. Got shape {list(score.shape)}.")
    check_tau(tau)
    ready = score >= tau
    ready[-1] = True
    return ready.int().argmax(0) + 1  # the first of several largest


def calibrate(loss: Tensor, score: Tensor, tolerance: float = 1.01) -> float:
    """The tau with the fewest mean loops among those with `PPL(tau) <= tolerance * PPL at K`.

    inf always qualifies (no token leaves early), and is returned if no other tau does.

    loss: [K, ...], cross-entropy in nats of every loop and token. score: [K, ...]. The perplexity need not fall as tau
    rises, so every tau at which some token's exit changes is looked at. All taus between two of those give the same
    exits on this slice: the largest of them is returned.

    Raises ValueError for shapes that differ, no token, a loss or score that is not finite, or a tolerance below 1.
    """
    if loss.shape != score.shape or loss.dim() < 2 or loss.numel() == 0:
        raise ValueError(
            "loss and score must have one shape [K, ...] with at least one loop and token. "
            f"Got loss {list(loss.shape)}, score {list(score.shape)}."
        )
    if not (loss.isfinite().all() and score.isfinite().all()):
        raise ValueError("loss and score must be finite.")
    at_least(1, tolerance=tolerance)
    loss, score = loss.flatten(1).double(), score.flatten(1)
    # Let tau fall from inf. A token steps back from loop k + 1 to loop k when tau reaches the largest of s_1..s_k.
    step_tau = score[:-1].cummax(0).values.flatten()
    step_loss = (loss[:-1] - loss[1:]).flatten()  # what the step adds to the token's loss
    step_tau, order = step_tau.sort(descending=True)
    added_loss = step_loss[order].cumsum(0)
    # Steps at the same tau happen together, so the loss counts only after the last of them.
    last_at_tau = torch.ones_like(step_tau, dtype=torch.bool)
    last_at_tau[:-1] = step_tau[:-1] != step_tau[1:]
    allowed = last_at_tau & (added_loss / loss.shape[1] <= math.log(tolerance))
    # Every step saves one loop of one token, so the lowest tau has the fewest loops.
    return float(step_tau[allowed][-1]) if bool(allowed.any()) else math.inf


def check_tau(tau: float) -> None:
    """Raises ValueError for nan."""
    if math.isnan(tau):
        raise ValueError(f"tau must be a number or inf. Got tau={tau}.")
