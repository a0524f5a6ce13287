"""How to generate: every option once, checked when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from looped.generate.decoder import Exit
from looped.generate.sampling import Sampling
from looped.halting import check_tau


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """How to generate. Raises TypeError or ValueError if a value breaks a rule, naming the option, the rule and the
    value.

    max_new_tokens: of every row, unless a stop token comes first. n_loops: K, by default the trained number.
    temperature, top_k, top_p: as in `Sampling`. seed: row b draws as a batch of one with seed + b
    does (with draft_loops in distribution only).
    stop_tokens: end a row, and are its last token. exit: leave loops early. shared_cache: one set of keys and values
    for all loops, which is another function than the model's own (looped/cache.py).
    draft_loops: loops that draft, at least 1 and fewer than n_loops; None for no speculation. draft_tokens: how many
    tokens are drafted at a time.
    """

    max_new_tokens: int = 64
    n_loops: int | None = None
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    exit: Exit | None = None
    shared_cache: bool = False
    draft_loops: int | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "n_loops", "top_k", "seed", "draft_loops", "draft_tokens"):
            value = getattr(self, name)
            if value is None and name in ("n_loops", "top_k", "draft_loops"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer. Got {name}={value!r}.")
            if name != "seed" and value < 1:
                raise ValueError(f"{name} must be at least 1. Got {name}={value}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63. Got seed={self.seed}.")
        if self.exit is not None:
            if not isinstance(self.exit, Exit):
                raise TypeError(f"exit must be an Exit(policy, tau). Got exit={self.exit!r}.")
            check_tau(self.exit.tau)
        for name, value in (("exit", self.exit), ("shared_cache", self.shared_cache)):
            if self.draft_loops is not None and value:
                raise ValueError(f"draft_loops must not be given with {name}: it would not be exact. Got both.")
