"""The radial share `|<g, h>| / (|g| |h|)` of the gradients that reach a state: what the loss can do to its scale.

Under an RMSNorm readout `y = w h rstd`, `rstd = (mean_c h_c^2 + eps)^(-1/2)`, the immediate cross-entropy gradient has
exactly `<dL/dh, h> = eps rstd^3 <w dL/dy, h>`; under LayerNorm `<dL/dh, h> = eps rstd^3 <w dL/dy, h - mean_c h_c>`
with the variance in rstd (Sharma & Vu, arXiv 2606.24898). What fp32 arithmetic measures beyond that is rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from looped.diagnose.model import Batch, LoopedModel, wide
from looped.kernels import radial_gradient
from looped.kernels.radial import radial_gradient_reference


@dataclass(frozen=True)
class RadialFractions:
    """Means over tokens, k = 1..K, each [K], nan where there is nothing to measure.

    immediate: of dCE_k/dH_k, through the readout of loop k alone, read as training reads it. immediate_float64: of
    the same states, the readout in float64; nan without such a model. exact: what eps makes it, by the equation; nan
    where the readout has no nn.RMSNorm or nn.LayerNorm. total: of the gradient of `sum_j w_j CE_j` with respect to
    H_k, through its own readout and all later loops. training: the same with the norm penalty added to the loss.
    """

    immediate: list[float]
    immediate_float64: list[float]
    exact: list[float]
    total: list[float]
    training: list[float]


def measure_radial(model: LoopedModel, batches: Sequence[Batch], double: LoopedModel | None = None) -> RadialFractions:
    """Radial fractions at the trained depth. `double`: the same model in float64, of which only the readout is used."""
    fractions = torch.cat([_measure_batch(model, double, *batch) for batch in batches], dim=2)  # [5, K, tokens]
    return RadialFractions(*fractions.mean(2).tolist())


@torch.enable_grad()
def _measure_batch(model: LoopedModel, double: LoopedModel | None, tokens: Tensor, targets: Tensor) -> Tensor:
    """The five fields of RadialFractions for every token, [5, K, B * T] float64."""
    states = model.unroll(model.embed(tokens).detach().requires_grad_(), model.n_loops)
    total, training = _whole_gradients(model, states, targets)
    per_loop = []
    for loop, state in enumerate(states):
        final = loop == model.n_loops - 1
        immediate, exact = _immediate(model, state.detach(), targets, final=final)
        in_float64 = torch.full_like(immediate, torch.nan)
        if double is not None:
            in_float64, exact = _immediate(double, state.detach().double(), targets, final=final)
        rest = [radial_gradient(state.detach(), gradient[loop]).fraction for gradient in (total, training)]
        rows = [immediate, in_float64, exact, *rest]
        per_loop.append(torch.stack([row.flatten().double().cpu() for row in rows]))
    return torch.stack(per_loop, dim=1)


def _whole_gradients(
    model: LoopedModel, states: list[Tensor], targets: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Gradients of all states [K][B, T, d], without and with the penalty. The loss is the sum over tokens."""
    losses = [
        weight * model.cross_entropy(state, targets, final=loop == model.n_loops - 1).sum()
        for loop, (state, weight) in enumerate(zip(states, model.loss_weights, strict=True))
        if weight > 0
    ]
    # A state that only unread loops follow has no gradient.
    total = torch.autograd.grad(sum(losses), states, retain_graph=True, materialize_grads=True)  # type: ignore[arg-type]
    if model.penalty == 0:
        return total, total
    squares = torch.stack([state.square().mean(-1).sum() for state in states])
    pull = torch.autograd.grad(model.penalty * squares.mean(), states)
    return total, [ce + norm for ce, norm in zip(total, pull, strict=True)]


def _immediate(model: LoopedModel, state: Tensor, targets: Tensor, *, final: bool) -> tuple[Tensor, Tensor]:
    """Radial fraction of the gradient of one loop's cross-entropy, as measured and as eps makes it, [B, T] each."""
    state = state.detach().requires_grad_()
    normalised = model.normalised(state, final=final)
    loss = model.head_loss(normalised, targets).sum()
    to_state, to_normalised = torch.autograd.grad(loss, (state, normalised))
    radial = radial_gradient_reference if state.dtype == torch.float64 else radial_gradient  # no kernel for float64
    measured = radial(state.detach(), to_state)
    norm = model.norm if final or model.norm_every_loop else None
    if not isinstance(norm, nn.RMSNorm | nn.LayerNorm):
        return measured.fraction, torch.full_like(measured.fraction, torch.nan)
    dot = _dot_from_eps(norm, state.detach(), to_normalised)
    lengths = (measured.grad_square * measured.state_square).sqrt()
    return measured.fraction, torch.where(lengths > 0, dot.abs() / lengths, 0.0)


def _dot_from_eps(norm: nn.RMSNorm | nn.LayerNorm, state: Tensor, to_normalised: Tensor) -> Tensor:
    """`<dL/dh, h>` of every row: eps rstd^3 <w dL/dy, h>, with LayerNorm of the centred h."""
    eps = torch.finfo(state.dtype).eps if norm.eps is None else norm.eps
    state, to_normalised = wide(state), wide(to_normalised)
    if isinstance(norm, nn.LayerNorm):
        state = state - state.mean(-1, keepdim=True)
    rstd = (state.square().mean(-1) + eps).rsqrt()
    weighted = to_normalised if norm.weight is None else to_normalised * norm.weight
    return eps * rstd**3 * (weighted * state).sum(-1)
