"""The exit gate: how probable it is that a token stops at a loop, and how a frozen model's gate is trained.

    g_k = w . norm(H_k) + b,   lambda_k = sigmoid(g_k)
    p_k = lambda_k * prod_{j < k} (1 - lambda_j) for k < K,   p_K = prod_{j < K} (1 - lambda_j)

lambda_k is the probability to stop at loop k if no loop before it was the last. p is a distribution over the loops; its
last loop takes what remains, so that lambda_K counts nowhere. All in logarithms, in float32 (float64 in float64).

The gate is Ouro's (arXiv 2510.25741), which sees the normalised state as its readout does. It is trained together with
the model by `Gated` supervision (looped/supervision.py), or alone, for any trained model, by `continuation_loss`.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped.kernels.device import accumulator

# Ouro's: how steep the wanted probability to go on is in the improvement, and the nats from which going on pays.
SLOPE, THRESHOLD = 50.0, 0.005


class ExitGate(nn.Module):
    """g of states: one linear function [d] -> 1 for all loops.

    The weight starts at 0 and the bias at log(2 / n_loops), so that lambda = 2 / (K + 2) for every loop and token. That
    is near the uniform distribution, whose entropy it has at K = 2, and 95% of it at K = 8: every loop is trained from
    the first step on, and no token prefers a loop before the gate has learned which. It draws no random number.
    """

    def __init__(self, d_model: int, n_loops: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, d_model))
        self.bias = nn.Parameter(torch.full((1,), math.log(2 / n_loops)))

    def forward(self, state: Tensor) -> Tensor:
        """g [...] of one normalised state [..., d]."""
        wide = accumulator(state.dtype)
        return F.linear(state.to(wide), self.weight.to(wide), self.bias.to(wide)).squeeze(-1)


def log_exit_probabilities(logits: Tensor) -> Tensor:
    """log p [K, ...] of the gate's g [K, ...]. Finite for every finite g, so that p log p is 0 where p is."""
    stay, certain = F.logsigmoid(-logits[:-1]), torch.zeros_like(logits[0])
    # log prod_{j < k} (1 - lambda_j); not by cumsum, which CUDA refuses where algorithms are to be deterministic.
    reached = torch.stack(list(itertools.accumulate(stay.unbind(0), initial=certain)))
    return reached + torch.cat([F.logsigmoid(logits[:-1]), certain.unsqueeze(0)])


def mean_exit_loop(log_p: Tensor) -> Tensor:
    """sum_k k p_k [...] of log p [K, ...]; 1 to K."""
    loops = torch.arange(1, len(log_p) + 1, device=log_p.device, dtype=log_p.dtype)
    return (loops.view(-1, *[1] * (log_p.dim() - 1)) * log_p.exp()).sum(0)


def exit_entropy(log_p: Tensor) -> Tensor:
    """H(p) [...] in nats of log p [K, ...]."""
    return -(log_p.exp() * log_p).sum(0)


def continuation_loss(logits: Tensor, losses: Tensor, counted: Tensor) -> Tensor:
    """The second stage of Ouro (arXiv 2510.25741, section 3.4): trains a gate on what loops of a frozen model gain.

        I_k = max(0, L_{k-1} - L_k),   w_k = sigmoid(50 (I_k - 0.005))
        loss = mean over loops 2..K and tokens of BCE(1 - lambda_k, w_k)

    So a token goes on where the loop that it has just done still improved its loss, and stops where it did not. The
    first loop has nothing before it: the gate's value there follows from the weights that all loops share.

    logits: g [K, ...], K >= 2. losses: L [K, ...], each loop's cross-entropy in nats, taken as constant. counted: [...]
    bool, the tokens that the mean is over. Returns [], 0 where no token counts. Raises ValueError for K < 2.
    """
    if len(logits) < 2:
        raise ValueError(f"a gate is trained on the difference of loops, of at least 2. Got {len(logits)}.")
    improvement = (losses[:-1] - losses[1:]).clamp(min=0)
    wanted = torch.sigmoid(SLOPE * (improvement - THRESHOLD)).detach()
    # The logit of 1 - lambda is -g.
    loss = F.binary_cross_entropy_with_logits(-logits[1:], wanted.to(logits.dtype), reduction="none")
    return torch.where(counted, loss, 0.0).sum() / (len(loss) * counted.sum().clamp(min=1))
