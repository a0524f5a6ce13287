"""The radial fraction `|<g, h>| / (|g| |h|)` of the gradients g that reach a state h: what they can do to its scale.

For the immediate gradient of the cross-entropy the product is known exactly (Sharma & Vu, arXiv 2606.24898). With an
RMSNorm readout, `y = w h rstd` and `rstd = (mean_c h_c^2 + eps)^(-1/2)`, it is `<dL/dh, h> = eps rstd^3 <w dL/dy, h>`.
With a LayerNorm it is `<dL/dh, h> = eps rstd^3 <w dL/dy, h - mean_c h_c>`, with the variance in rstd. What fp32
arithmetic measures above that is rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from looped.diagnose.model import Batch, LoopedModel, token_losses
from looped.halting import wide
from looped.kernels import radial_gradient
from looped.kernels.radial import radial_gradient_reference
from looped.recurrence import first_with_gradient


@dataclass(frozen=True)
class RadialFractions:
    """Radial fractions of gradients with respect to H_k, k = 1..K. Each is [K], a mean over tokens.

    immediate: of dCE_k/dH_k, through the readout of loop k alone, which is read as training reads it.
    immediate_float64: the same with the readout in float64; nan without a float64 model.
    exact: what eps makes of it, by the equation; nan where the readout has no nn.RMSNorm or nn.LayerNorm.
    total: of the gradient of `sum_j w_j CE_j`, through the readout of H_k and all later loops.
    training: of the same gradient with the norm penalty added to the loss.
    """

    immediate: list[float]
    immediate_float64: list[float]
    exact: list[float]
    total: list[float]
    training: list[float]


def measure_radial(model: LoopedModel, batches: Sequence[Batch], double: LoopedModel | None = None) -> RadialFractions:
    """Radial fractions at the trained depth. double: the same model in float64, of which only the readout is used."""
    measured = [_measure_batch(model, double, *batch) for batch in batches]
    names = [field.name for field in fields(RadialFractions)]
    return RadialFractions(
        **{name: torch.cat([batch[name] for batch in measured], dim=1).mean(1).tolist() for name in names}
    )


@torch.enable_grad()
def _measure_batch(
    model: LoopedModel, double: LoopedModel | None, tokens: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """The fields of RadialFractions for every token, [K, B * T] float64 each."""
    states = model.unroll(model.embed(tokens).detach().requires_grad_(), model.n_loops)
    total, training = _whole_gradients(model, states, targets)
    per_loop = []
    for loop, attached in enumerate(states):
        final, state = loop == model.n_loops - 1, attached.detach()
        immediate, exact = _immediate(model, state, targets, final=final)
        immediate_float64 = torch.full_like(immediate, torch.nan)
        if double is not None:
            immediate_float64, exact = _immediate(double, state.double(), targets, final=final)
        per_loop.append(
            {
                "immediate": immediate,
                "immediate_float64": immediate_float64,
                "exact": exact,
                "total": radial_gradient(state, total[loop]).fraction,
                "training": radial_gradient(state, training[loop]).fraction,
            }
        )
    return {
        name: torch.stack([fractions[name].flatten().double().cpu() for fractions in per_loop]) for name in per_loop[0]
    }


def _whole_gradients(
    model: LoopedModel, states: list[Tensor], targets: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The gradients of the loss summed over tokens, [K][B, T, d], without the penalty and with it.

    Those of a loop without gradient, and of one after the last that is read, are zeros.
    """
    losses = [
        weight * model.cross_entropy(state, targets, final=loop == model.n_loops - 1).sum()
        for loop, (state, weight) in enumerate(zip(states, model.loss_weights, strict=True))
        if weight > 0
    ]
    first = first_with_gradient(model.n_loops, model.backprop_loops)
    trained, zeros = states[first:], [torch.zeros_like(state) for state in states[:first]]
    total = [*zeros, *torch.autograd.grad(sum(losses), trained, retain_graph=True, materialize_grads=True)]  # type: ignore[arg-type]
    if model.penalty == 0:
        return total, total
    mean_squares = torch.stack([state.square().mean(-1).sum() for state in trained])
    of_penalty = [*zeros, *torch.autograd.grad(model.penalty * mean_squares.mean(), trained)]
    return total, [ce + penalty for ce, penalty in zip(total, of_penalty, strict=True)]


def _immediate(model: LoopedModel, state: Tensor, targets: Tensor, *, final: bool) -> tuple[Tensor, Tensor]:
    """The radial fraction of the gradient of one loop's cross-entropy: measured, and by the equation. [B, T] each."""
    state = state.detach().requires_grad_()
    normalised = model.normalised(state, final=final)
    loss = token_losses(model.head(normalised), targets).sum()
    state_grad, normalised_grad = torch.autograd.grad(loss, (state, normalised))
    radial = radial_gradient_reference if state.dtype == torch.float64 else radial_gradient  # no kernel for float64
    measured = radial(state.detach(), state_grad)
    norm = model.norm if final or model.norm_every_loop else None
    if not isinstance(norm, nn.RMSNorm | nn.LayerNorm):
        return measured.fraction, torch.full_like(measured.fraction, torch.nan)
    dot = _dot_from_eps(norm, state.detach(), normalised_grad)
    product_of_lengths = (measured.grad_square * measured.state_square).sqrt()
    return measured.fraction, torch.where(product_of_lengths > 0, dot.abs() / product_of_lengths, 0.0)


def _dot_from_eps(norm: nn.RMSNorm | nn.LayerNorm, state: Tensor, normalised_grad: Tensor) -> Tensor:
    """`<dL/dh, h>` of every row by the equation, eps rstd^3 <w dL/dy, h>. A LayerNorm centres h first."""
    eps = torch.finfo(state.dtype).eps if norm.eps is None else norm.eps
    state, normalised_grad = wide(state), wide(normalised_grad)
    if isinstance(norm, nn.LayerNorm):
        state = state - state.mean(-1, keepdim=True)
    rstd = (state.square().mean(-1) + eps).rsqrt()
    weighted = normalised_grad if norm.weight is None else normalised_grad * norm.weight
    return eps * rstd**3 * (weighted * state).sum(-1)
