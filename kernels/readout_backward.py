"""From the gradient of the normed rows, which the readout's pass leaves, to those of the states and the norm.

    dh[k, t] = norm_backward(u * dy[k, t]) + (2/d) u' h[k, t],   dw = sum_{k, t} u * dy * xhat,   db = sum_{k, t} u * dy

with u the upstream gradient times the unit of dy, and u' the upstream gradient times the penalty's in a row's mean
square (kernels/row_norm.py has the equations of one row).  One launch a loop; dh is rounded once, to the states' dtype.
A state that is not read out has the penalty's gradient alone.

Shapes: states K x [N, d]; dy [A N, d] for the A active loops, in the dtype of the products; sums in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .device import accumulator
from .readout import loops_of, norm_arguments
from .row_norm import norm_backward, partial_sums


def differentiated_loops(states: list[Tensor], need_states: list[bool], active: list[int], penalty: float) -> list[int]:
    """The loops whose states' gradients are formed: of a stack all, of a sequence those that have one."""
    if states[0].dim() == 3:
        return list(range(len(states[0]))) if need_states[0] else []
    return [k for k, need in enumerate(need_states) if need and (penalty > 0 or k in active)]


def _any_norm(readout: str, n_loops: int, loops: Sequence[int]) -> bool:
    """Whether any of the loops is read out through a norm."""
    return any(norm_arguments(readout, loop, n_loops, None, None)[0] != "none" for loop in loops)


def needs_dy(readout: str, n_loops: int, active: list[int], differentiated: list[int], needs: list[bool]) -> bool:
    """Whether the gradient of the normed rows is needed: for a state that is read, or the norm's parameters."""
    read = not set(active).isdisjoint(differentiated)
    return read or (any(needs[1:3]) and _any_norm(readout, n_loops, active))


def radial_sums(
    dy: Tensor, loops: list[Tensor], differentiated: list[int], active: list[int], norm_weight: Tensor | None,
    norm_bias: Tensor | None, readout: str, eps: float, reference: Tensor,
) -> Tensor:  # fmt: skip
    """<g, h> and |g|^2 [2, K, N] of the cross-entropy's gradient g in every state; nan where it is not formed."""
    n_tokens = len(loops[0])
    radial = loops[0].new_full((2, len(loops), n_tokens), torch.nan, dtype=accumulator(dy.dtype))
    for row, loop in enumerate(active):
        if loop in differentiated:
            norm, weight, _ = norm_arguments(readout, loop, len(loops), norm_weight, norm_bias)
            norm_backward(
                dy[row * n_tokens : (row + 1) * n_tokens], loops[loop], weight, eps=eps, norm=norm, scale=reference,
                radial=radial[:, loop],
            )  # fmt: skip
    return radial


@torch.library.custom_op("looped::cross_entropy_backward", mutates_args=())
def states_and_norm_backward(
    states: list[Tensor], dy: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, factors: Tensor,
    active: list[int], need_states: list[bool], needs: list[bool], readout: str, eps: float, penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the norm's weight and bias, and of the states [S, N, d], from dy [A N, d].

    factors [3]: the scales' factors times the upstream gradient.
    """
    loops = loops_of(states)
    n_tokens, d = loops[0].shape
    weight = None if norm_weight is None else norm_weight.contiguous()
    differentiated = differentiated_loops(states, need_states, active, penalty)
    dstates = loops[0].new_empty((len(differentiated), n_tokens, d))
    sums = [partial_sums(loops[0]) if need and dy.numel() else None for need in needs[1:3]]
    added = False
    for loop, h in enumerate(loops):
        norm, loop_weight, _ = norm_arguments(readout, loop, len(loops), weight, None)
        dloop = dstates[differentiated.index(loop)] if loop in differentiated else None
        dy_loop = dy.view(len(active), n_tokens, d)[active.index(loop)] if dy.numel() and loop in active else None
        of_norm = [partial if dy_loop is not None and norm != "none" else None for partial in sums]
        if dloop is None and of_norm == [None, None]:
            continue
        norm_backward(
            dy_loop, h, loop_weight, eps=eps, norm=norm, scale=factors[0],
            dmean_square=factors[2].expand(n_tokens) if penalty > 0 else None,
            dh=dloop, dweight=of_norm[0], dbias=of_norm[1], add=added,
        )  # fmt: skip
        added = added or of_norm != [None, None]
    dweight, dbias = (
        loops[0].new_empty(0) if not need or like is None
        else like.new_zeros(like.shape) if partial is None or not added
        else partial.sum(0).to(like.dtype)
        for need, like, partial in zip(needs[1:3], (norm_weight, norm_bias), sums, strict=True)
    )  # fmt: skip
    return dweight, dbias, dstates


@states_and_norm_backward.register_fake
def _(states, dy, norm_weight, norm_bias, factors, active, need_states, needs, readout, eps, penalty):
    dweight, dbias = (
        like.new_empty(like.shape) if need and like is not None else dy.new_empty(0, dtype=states[0].dtype)
        for need, like in zip(needs[1:3], (norm_weight, norm_bias), strict=True)
    )
    n_differentiated = len(differentiated_loops(states, need_states, active, penalty))
    return dweight, dbias, states[0].new_empty((n_differentiated, *states[0].shape[-2:]))
