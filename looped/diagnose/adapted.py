"""Recurrent models of others as LoopedModels: those that `looped.adapters` knows.

A loop is run by calling the model's own modules, each with what the model handed to it besides the state: masks,
positions. `embed` runs the whole model once to see that, so a batch must hold no padding.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from looped.adapters import Adapter, find_adapter
from looped.diagnose.model import LoopedModel
from looped.kernels import LoopedReadout
from looped.replay import Call, Calls, named_module


def from_model(model: nn.Module) -> LoopedModel:
    """A model that `looped.adapters` knows as a LoopedModel.

    weights: of the loops in the model's own loss: of the last loop alone; for Ouro 1/K each, whose prior over the exits
    is uniform. unnormed: what the readout's norm is given, for a readout without it, which no model here has.

    HRM-Text has two states. The LoopedModel's is both of them before their norms, side by side: [B, T, 2 d].
    Huginn's first state is random. It is drawn in the same way at every call.

    Raises ValueError for a model that is unknown or in training mode, and as LoopedReadout does.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode: dropout would be part of every number. Call .eval().")
    adapter = find_adapter(model)
    recurrence = RECURRENCES.get(adapter.kind, Recurrence)(model, adapter)
    head = named_module(model, "head", adapter.head)
    weights = None if adapter.gate is not None else (0.0,) * (adapter.n_loops - 1) + (1.0,)
    return LoopedModel(
        n_loops=adapter.n_loops,
        embed=recurrence.embed,
        loop=recurrence.loop,
        head=head,
        norm=recurrence.readout_norm(head),
        unnormed=recurrence.read,
        between=recurrence.between if adapter.feeds_back_norm else None,
        weights=weights,
    )


class Recurrence:
    """The loop of a model: a chain of modules, which begins with the readout's norm where the model feeds that back."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model: Any = model
        self.adapter = adapter
        self.norm = named_module(model, "norm", adapter.norm)
        self.calls = Calls(model, "loop", dict.fromkeys((*self.modules_of_loop(), *adapter.coda)))
        self.seen: dict[torch.Size, dict[str, Call]] = {}  # by the shape of the tokens

    def modules_of_loop(self) -> tuple[str, ...]:
        return self.adapter.loop

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a call of the model, beside its tokens."""
        return {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """H_0. What the modules are given besides the state is remembered for all tokens of this shape."""
        self.calls.clear()
        handles = self.calls.record()
        try:
            self.model(input_ids=tokens, **self.options())
        finally:
            for handle in handles:
                handle.remove()
        self.seen[tokens.shape] = dict(self.calls.last)
        return self.first_state()

    def first_state(self) -> Tensor:
        return self.calls.first_states[self.adapter.loop[0]]

    def through(self, names: tuple[str, ...], state: Tensor) -> Tensor:
        """The state [B, T, ...] after some modules, with the arguments that belong to its shape."""
        self.calls.last = self.seen[state.shape[:2]]
        return self.calls.through(names, state)

    def between(self, state: Tensor) -> Tensor:
        """What a loop k >= 1 does to H_k before anything else."""
        return self.norm(state)

    def loop(self, state: Tensor, embedded: Tensor, done: int) -> Tensor:
        """H_{k+1} of H_k."""
        entered = self.between(state) if done and self.adapter.feeds_back_norm else state
        return self.through(self.adapter.loop, entered)

    def read(self, state: Tensor) -> Tensor:
        """What the readout's norm is given."""
        return self.through(self.adapter.coda, state)

    def readout_norm(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        """What a state goes through before the head. A norm alone becomes PyTorch's own, whose gradient is known."""
        if self.adapter.coda:
            return lambda state: self.norm(self.read(state))
        return plain_norm(self.norm, head)


class HrmText(Recurrence):
    """Two states. In a loop the low stack changes z_L L_cycles times; then the high stack changes z_H once.

    Both stacks end in a norm. The LoopedModel's state is [z_H, z_L] before those norms. As in the model itself, only
    the last few low cycles have gradients.
    """

    def modules_of_loop(self) -> tuple[str, ...]:
        return (*self._layers("L_module"), *self._layers("H_module"))

    def _layers(self, stack: str) -> tuple[str, ...]:
        return tuple(f"model.{stack}.layers.{layer}" for layer in range(self.model.config.num_layers_per_stack))

    def first_state(self) -> Tensor:
        entered = self.calls.first_states["model.L_module.layers.0"]  # z_L + z_H
        low = self.model.model.z_L_init.to(entered.dtype).expand_as(entered)
        return torch.cat([entered - low, low], -1)

    def between(self, state: Tensor) -> Tensor:
        high, low = state.chunk(2, -1)
        return torch.cat([self.norm(high), self.model.model.L_module.final_norm(low)], -1)

    def loop(self, state: Tensor, embedded: Tensor, done: int) -> Tensor:
        inner = self.model.model
        n_cycles, with_gradient = self.model.config.L_cycles, inner.L_bp_cycles_padded
        n_with_gradient = with_gradient[done] if done < len(with_gradient) else 1
        high, low = (self.between(state) if done else state).chunk(2, -1)
        before_norm = low
        for cycle in range(n_cycles):
            with nullcontext() if cycle >= n_cycles - n_with_gradient else torch.no_grad():
                before_norm = self.through(self._layers("L_module"), low + high)
                low = inner.L_module.final_norm(before_norm)
        return torch.cat([self.through(self._layers("H_module"), high + low), before_norm], -1)

    def read(self, state: Tensor) -> Tensor:
        return state.chunk(2, -1)[0]

    def readout_norm(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda state: self.norm(self.read(state))


class Huginn(Recurrence):
    """The adapter joins the state to the prelude's output, H_0; the core block makes the next state of the two."""

    def options(self) -> dict[str, Any]:
        return super().options() | {"num_steps": 1}

    def first_state(self) -> Tensor:
        return self.calls.first_states["transformer.adapter"].chunk(2, -1)[1]

    def loop(self, state: Tensor, embedded: Tensor, done: int) -> Tensor:
        if done == 0:
            devices = [embedded.device] if embedded.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                state = self.model.initialize_state(embedded)
        return self.through(self.adapter.loop, torch.cat([state, embedded], -1))


RECURRENCES: dict[str, type[Recurrence]] = {"hrm_text": HrmText, "huginn_raven": Huginn}


def plain_norm(norm: nn.Module, head: nn.Module) -> nn.Module:
    """nn.RMSNorm or nn.LayerNorm, whichever computes what `norm` does, with its very parameters."""
    readout = LoopedReadout(head, norm)  # type: ignore[arg-type]  # it says what does not fit
    kind = nn.LayerNorm if readout.readout == "layernorm" else nn.RMSNorm
    eps: Any = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    plain = kind(readout.head.weight.shape[1], eps=eps, elementwise_affine=False)
    plain.weight = getattr(norm, "weight", None)  # type: ignore[assignment]
    if isinstance(plain, nn.LayerNorm):
        plain.bias = getattr(norm, "bias", None)  # type: ignore[assignment]
    return plain
