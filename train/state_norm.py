"""A warning when a state has grown so large that what the blocks add to it counts for little beside it.

A readout behind a norm does not see that scale, so that nothing in the loss holds it (Sharma & Vu, arXiv 2606.24898).
"""

import math
from collections.abc import Sequence

LIMIT = 10_000.0  # the paper's conditions at demo scale end near 22 with a penalty, and at 823 without


class StateNorms:
    """Watches the norms of a run's logged steps, and says once that a loop's is past `LIMIT`."""

    def __init__(self, penalty: float) -> None:
        self.penalty, self.has_warned = penalty, False

    def warning(self, step: int, norms: Sequence[float]) -> str | None:
        """One line, or None. norms: of the loops, mean ||H_k||. What is not finite makes a bad step, not a warning."""
        known = [(norm, loop) for loop, norm in enumerate(norms, start=1) if math.isfinite(norm)]
        norm, loop = max(known, default=(0.0, 0))
        if self.has_warned or norm <= LIMIT:
            return None
        self.has_warned = True
        penalty = f"--penalty {10 * self.penalty or 0.01:g}"
        return (
            f"warning: the state's norm is {norm:,.0f} at loop {loop}, step {step}, above {LIMIT:,.0f}: what a block "
            f"adds counts for little beside it. Begin a run with {penalty} or --inter-loop-norm."
        )
