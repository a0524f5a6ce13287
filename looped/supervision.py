"""Which loops' predictions are trained, and with what weight."""

from typing import Literal, get_args

Supervision = Literal["per-loop", "terminal"]
IGNORE_INDEX = -100  # targets that count nowhere


def supervision_weights(supervision: Supervision, n_loops: int) -> list[float]:
    """[K], the weight of each loop's cross-entropy in the training loss. A loop of weight 0 is not read out.

    per-loop: 1/K each. terminal: 1 for the last loop, 0 for the others (Sharma & Vu, arXiv 2606.24898).
    Raises ValueError for another supervision.
    """
    if supervision == "per-loop":
        return [1 / n_loops] * n_loops
    if supervision == "terminal":
        return [0.0] * (n_loops - 1) + [1.0]
    raise ValueError(f"supervision must be one of {', '.join(get_args(Supervision))}. Got {supervision!r}.")
