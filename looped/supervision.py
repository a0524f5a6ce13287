"""Which loops' predictions are trained, and with what weight."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Supervision = Literal["per-loop", "terminal", "gated"]
IGNORE_INDEX = -100  # targets that count nowhere


@dataclass(frozen=True)
class Gated:
    """Supervision by the model's exit gate, with its options: the word ``gated`` stands for ``Gated()``.

        loss = mean over tokens of sum_k p_k CE_k + beta * sum_k p_k (log p_k - log q_k)

    p: the exit probabilities of a token, which weigh its cross-entropies. q: the prior that they are held close to.

    prior ``uniform``: Ouro's (arXiv 2510.25741). Its second term is ``-beta H(p)``. That is beta KL(p || q) without the
    constant beta log K, which changes no gradient; q is 1 here.
    prior ``geometric:P``: PonderNet's (arXiv 2107.05407), beta KL(p || q) with q_k proportional to (1 - P)^(k - 1),
    k = 1..K. P is the probability to stop at a loop; 1/P loops would be the mean without a last one.

    Raises ValueError for a beta that is negative or not finite, and for another prior.
    """

    beta: float = 0.1
    prior: str = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta of the gate must be finite and at least 0. Got {self.beta}.")
        if self.prior != "uniform" and not 0 < self.stop_probability < 1:
            raise ValueError(f"prior of the gate must be uniform or geometric:P with 0 < P < 1. Got {self.prior!r}.")

    @property
    def stop_probability(self) -> float:
        """P of the geometric prior, nan for what is none."""
        name, _, value = self.prior.partition(":")
        try:
            return float(value) if name == "geometric" else math.nan
        except ValueError:
            return math.nan

    def log_prior(self, n_loops: int, like: Tensor) -> Tensor:
        """log q [K], on the device and in the dtype of ``like``; for the uniform prior without its constant: 0."""
        loops = torch.arange(n_loops, device=like.device, dtype=like.dtype)
        if self.prior == "uniform":
            return 0 * loops
        go_on = 1 - self.stop_probability
        return loops * math.log(go_on) - math.log(sum(go_on**loop for loop in range(n_loops)))

    def divergence(self, log_p: Tensor, counted: Tensor, n_targets: int | Tensor | None) -> Tensor:
        """The second term of the loss, [], of log p [K, ...]; differentiable.

        counted: [...] bool, the tokens that it is over. n_targets: by what their sum is divided; None: their number.
        """
        log_q = self.log_prior(len(log_p), log_p).view(-1, *[1] * counted.dim())
        of_token = (log_p.exp() * (log_p - log_q)).sum(0)
        n = counted.sum() if n_targets is None else n_targets
        n = torch.where(n > 0, n, 1) if isinstance(n, Tensor) else n or 1
        return self.beta * torch.where(counted, of_token, 0.0).sum() / n


def gated(supervision: Supervision | Gated) -> Gated | None:
    """The options of gated supervision, None for another."""
    if isinstance(supervision, Gated):
        return supervision
    return Gated() if supervision == "gated" else None


def supervision_weights(supervision: Supervision | Gated, n_loops: int) -> list[float]:
    """[K], the weight of each loop's cross-entropy in the training loss. A loop of weight 0 is not read out.

    per-loop: 1/K each. terminal: 1 for the last loop, 0 for the others (Sharma & Vu, arXiv 2606.24898). Those of gated
    supervision are the gate's, for every token its own.
    Raises ValueError for another supervision.
    """
    if supervision == "per-loop":
        return [1 / n_loops] * n_loops
    if supervision == "terminal":
        return [0.0] * (n_loops - 1) + [1.0]
    raise ValueError(f"supervision must be one of {', '.join(get_args(Supervision))}. Got {supervision!r}.")
