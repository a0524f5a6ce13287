"""The conditions that are compared, and the numbers that the paper reports of them.

The paper is Sharma & Vu, *Dense Supervision Is Not Enough* (arXiv 2606.24898).
"""

from typing import Any, Literal, get_args

Condition = Literal[
    "terminal-rmsnorm", "terminal-raw", "per-loop-rmsnorm", "per-loop-raw", "per-loop-final-only",
    "terminal-rmsnorm-penalty", "per-loop-rmsnorm-penalty", "per-loop-layernorm", "per-loop-rmsnorm-loop-norm",
]  # fmt: skip
NAMES: tuple[Condition, ...] = get_args(Condition)
TERMINAL, TERMINAL_RAW, BLIND, RAW, FINAL_ONLY, TERMINAL_PENALISED, PENALISED, LAYER_NORM, LOOP_NORM = NAMES
SEEDS = (42, 101, 202)
N_LOOPS = 4
PENALTY = 0.01  # the paper's lambda


def _condition(supervision: str, readout: str, penalty: float = 0.0, inter_loop_norm: bool = False) -> dict[str, Any]:
    return dict(supervision=supervision, readout=readout, penalty=penalty, inter_loop_norm=inter_loop_norm)


# The fields of TrainConfig in which the conditions differ: the paper's two loss placements by two readouts, its
# remedies, and two controls, a second readout that is blind to scale and a recurrence that removes it.
CONDITIONS: dict[Condition, dict[str, Any]] = {
    TERMINAL: _condition("terminal", "rmsnorm"),
    TERMINAL_RAW: _condition("terminal", "raw"),
    BLIND: _condition("per-loop", "rmsnorm"),  # its loss cannot see the scale: what the others are compared with
    RAW: _condition("per-loop", "raw"),
    FINAL_ONLY: _condition("per-loop", "final-only"),
    TERMINAL_PENALISED: _condition("terminal", "rmsnorm", penalty=PENALTY),
    PENALISED: _condition("per-loop", "rmsnorm", penalty=PENALTY),
    LAYER_NORM: _condition("per-loop", "layernorm"),
    LOOP_NORM: _condition("per-loop", "rmsnorm", inter_loop_norm=True),
}

# By K = 1..4 at 129M: perplexity, and the speed of the paper's reference on a GPU that it does not name.
PAPER_PPL: dict[str, tuple[float, ...]] = {
    BLIND: (4.98, 4.95, 4.95, 4.97),
    RAW: (4.68, 4.55, 4.54, 4.55),
    FINAL_ONLY: (4.70, 4.57, 4.56, 4.55),
    PENALISED: (4.67, 4.52, 4.51, 4.53),
}
PAPER_RATES = (80_000, 41_000, 28_000, 21_000)  # tokens/s
PAPER_HALTING = {BLIND: 1.00, RAW: 2.16, FINAL_ONLY: 1.78, PENALISED: 2.60}  # mean loops
# The paper's table of conditions, 44M / 129M where it has both; CE(K=1) - CE(K=4), of the per-loop rows the logarithm
# of the quotient of two of the perplexities above.
PAPER_TABLE: dict[str, dict[str, str]] = {
    TERMINAL: {"ppl": "5.40 / 4.88", "exit_gap": "3.98"},
    BLIND: {"ppl": "6.04 / 5.35", "state_norm": "39,207 / 56,051", "exit_gap": "0.002"},
    RAW: {"ppl": "- / 4.55", "state_norm": "tens", "exit_gap": "0.028"},
    FINAL_ONLY: {"ppl": "- / 4.55", "exit_gap": "0.032"},
    PENALISED: {"ppl": "- / 4.53", "state_norm": "17-22", "exit_gap": "0.030"},
}
