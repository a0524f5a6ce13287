"""What is diagnosed: a model with a repeated loop, described by four functions. A LoopedLM can be seen as one."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from looped.config import at_least
from looped.halting import wide
from looped.model import LoopedLM
from looped.recurrence import first_with_gradient

# Inputs and targets, int64 [B, T] each, every target in [0, V).
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoopedModel:
    """A recurrent-depth model: `H_0 = embed(tokens)`, `H_{k+1} = loop(H_k, H_0, k)`, logits = `head(norm(H_k))`.

    n_loops: K, the loops that it was trained with.
    embed: tokens [B, T] int64 -> H_0 [B, T, d].
    loop: (H_k, H_0, k) -> H_{k+1}, the state that would be read out. k = 0, 1, ... counts the loops done before. H_0 is
        for models that feed the embedding to every loop.
    head: a normalised state [B, T, d] -> logits [B, T, V].
    norm: the readout's norm, or None. For an nn.RMSNorm or nn.LayerNorm the exact radial gradient is known.
    norm_every_loop: False if training normalises the last loop's state only.
    unnormed: what else than the state the head sees where nothing is normalised, such as what a coda makes of it.
    between: the norm between loops: what a loop does to H_k, k >= 1, before anything else. None if a loop works on H_k
        itself. It is used only to measure what a loop adds to the scale that it starts from.
    weights: [K], of each loop's cross-entropy in the training loss, 0 for loops that are not read. None: 1/K each.
    penalty: lambda of `lambda * mean over loops, tokens and channels of H_k^2` in the training loss.
    backprop_loops: the last loops, which alone had a gradient in training and were penalised. None: all.
    decoder: the LoopedLM that this describes, or None. Halting is then measured with later loops left out, too.

    The functions must be in evaluation mode (no dropout) and in one dtype. Gradients flow through all but embed.
    Raises ValueError for n_loops or backprop_loops < 1, weights that are not K numbers >= 0 with a sum above 0, or a
    negative penalty.
    """

    n_loops: int
    embed: Callable[[Tensor], Tensor]
    loop: Callable[[Tensor, Tensor, int], Tensor]
    head: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None = None
    norm_every_loop: bool = True
    unnormed: Callable[[Tensor], Tensor] | None = None
    between: Callable[[Tensor], Tensor] | None = None
    weights: tuple[float, ...] | None = None
    penalty: float = 0.0
    backprop_loops: int | None = None
    decoder: LoopedLM | None = None

    def __post_init__(self) -> None:
        at_least(1, n_loops=self.n_loops)
        weights = self.loss_weights
        if len(weights) != self.n_loops or not all(weight >= 0 for weight in weights) or sum(weights) == 0:
            raise ValueError(
                f"weights must be n_loops={self.n_loops} numbers of at least 0, one of them above. Got {weights}."
            )
        first_with_gradient(self.n_loops, self.backprop_loops)  # raises for backprop_loops < 1
        at_least(0, penalty=self.penalty)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """[K], the weights of the loops' cross-entropies in the training loss."""
        return (1 / self.n_loops,) * self.n_loops if self.weights is None else tuple(self.weights)

    def states(self, tokens: Tensor, n_loops: int) -> list[Tensor]:
        """H_1..H_n, each [B, T, d], of tokens [B, T]."""
        return self.unroll(self.embed(tokens), n_loops)

    def unroll(self, embedded: Tensor, n_loops: int) -> list[Tensor]:
        """H_1..H_n of H_0 = `embedded`."""
        state = embedded
        states = []
        for done in range(n_loops):
            state = self.loop(state, embedded, done)
            states.append(state)
        return states

    def entered(self, embedded: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """The state that each loop of `states` began with: H_0 for the first, H_k or `between(H_k)` for the others."""
        later = states[:-1] if self.between is None else [self.between(state) for state in states[:-1]]
        return [embedded, *later]

    def normalised(self, state: Tensor, *, final: bool) -> Tensor:
        """The state as the head sees it. final: read it as the last loop's state is read."""
        if self.norm is not None and (final or self.norm_every_loop):
            return self.norm(state)
        return state if self.unnormed is None else self.unnormed(state)

    def cross_entropy(self, state: Tensor, targets: Tensor, *, final: bool) -> Tensor:
        """The cross-entropy of a state's predictions, [B, T] in nats, at least fp32."""
        return token_losses(self.head(self.normalised(state, final=final)), targets)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of every token, [B, T] in nats, at least fp32, of logits [B, T, V]."""
    return F.cross_entropy(wide(logits).flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def rms(x: Tensor) -> Tensor:
    """`sqrt(mean_c x_c^2)` of every row, at least fp32: [...] of [..., d]."""
    return wide(x).square().mean(-1).sqrt()


def from_decoder(
    decoder: LoopedLM,
    *,
    weights: tuple[float, ...] | None = None,
    penalty: float = 0.0,
    backprop_loops: int | None = None,
) -> LoopedModel:
    """A LoopedLM as a LoopedModel. weights, penalty, backprop_loops: of the loss that it was trained with.

    With an inter-loop norm, loop k+1 starts from RMSNorm(H_k). Its input and output are still the states that are read,
    so an update is `H_{k+1} - H_k` and includes what the norm takes away.

    With a coda, the norm is the coda and the readout's norm together, of which no exact radial gradient is known. With
    an injection, the "embedding" H_0 of the LoopedModel is E, also where the first loop starts from zero.

    Raises ValueError if the decoder is not in evaluation mode.
    """
    if decoder.training:
        raise ValueError("decoder must be in evaluation mode: dropout would be part of every number. Call .eval().")
    return LoopedModel(
        n_loops=decoder.config.n_loops,
        embed=decoder.embed,
        loop=lambda state, embedded, done: decoder.apply_loop(
            decoder.start(embedded) if done == 0 else state, done, embedded
        ),
        head=lambda state: F.linear(state, decoder.head_weight),
        norm=_readout_norm(decoder),
        norm_every_loop=decoder.config.readout != "final-only",
        unnormed=decoder.read if decoder.config.n_coda else None,
        between=decoder.loop_norm,
        weights=weights,
        penalty=penalty,
        backprop_loops=backprop_loops,
        decoder=decoder,
    )


def in_float64(model: LoopedModel) -> LoopedModel | None:
    """The same readout in float64. None where nothing is known of the model but functions."""
    if model.decoder is not None:
        decoder = copy.deepcopy(model.decoder).double()
        decoder.fused = False  # no kernel of a GPU takes float64
        return from_decoder(decoder)
    if not isinstance(model.norm, nn.Module) or not isinstance(model.head, nn.Module):
        return None
    head, norm = (copy.deepcopy(module).double() for module in (model.head, model.norm))
    return replace(model, head=head, norm=norm)


def _readout_norm(decoder: LoopedLM) -> Callable[[Tensor], Tensor] | None:
    """What a state goes through before the head."""
    norm = decoder.readout_norm
    if decoder.config.n_coda == 0:
        return norm
    return decoder.read if norm is None else lambda state: norm(decoder.read(state))
