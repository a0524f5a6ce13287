"""How to generate: every option once, checked when it is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from looped.config import at_least
from looped.generate.decoder import Exit
from looped.halting import check_tau


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate: tokens are drawn from `softmax(logits / temperature)` of the top_k most probable ones, and of
    those the fewest that hold top_p.

    Raises TypeError or ValueError if a value breaks a rule, naming the option, the rule and the value.

    max_new_tokens: of every row, unless a stop token comes first. n_loops: K, by default the trained number.
    temperature: 0 is the most probable token alone. top_k: None for all tokens. top_p: the share of the probability,
    after temperature and top_k, that is kept at least (Holtzman et al., arXiv 1904.09751).
    seed: row b draws as a batch of one with seed + b does (with draft_loops in distribution only).
    stop_tokens: end a row, and are its last token. exit: leave loops early. shared_cache: one set of keys and values
    for all loops, which is another function than the model's own (looped/cache.py).
    draft_loops: loops that draft, at least 1 and fewer than n_loops; None for no speculation. draft_tokens: how many
    tokens are drafted at a time.
    """

    max_new_tokens: int = 64
    n_loops: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    exit: Exit | None = None
    shared_cache: bool = False
    draft_loops: int | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0. Got temperature={self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1. Got top_p={self.top_p}.")
        for name in ("max_new_tokens", "n_loops", "top_k", "seed", "draft_loops", "draft_tokens"):
            value = getattr(self, name)
            if value is None and name in ("n_loops", "top_k", "draft_loops"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer. Got {name}={value!r}.")
            if name != "seed":
                at_least(1, **{name: value})
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63. Got seed={self.seed}.")
        if self.exit is not None:
            if not isinstance(self.exit, Exit):
                raise TypeError(f"exit must be an Exit(policy, tau). Got exit={self.exit!r}.")
            check_tau(self.exit.tau)
        for name, value in (("exit", self.exit), ("shared_cache", self.shared_cache)):
            if self.draft_loops is not None and value:
                raise ValueError(f"draft_loops must not be given with {name}: it would not be exact. Got both.")

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] fp32 of logits [..., V]. Of equal logits the smaller token counts as the more probable."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        # Largest first: the quotients by a tiny temperature must not overflow.
        logits = logits.float()
        scaled = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is None and self.top_p == 1:
            return scaled.softmax(-1)
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            scaled[..., self.top_k :] = -math.inf
        sorted_ = scaled.softmax(-1)
        above = sorted_.cumsum(-1) - sorted_  # held by the tokens that are more probable
        sorted_ = sorted_.masked_fill(above >= self.top_p, 0.0)
        kept = torch.zeros_like(sorted_).scatter(-1, order, sorted_)
        return kept / kept.sum(-1, keepdim=True)
