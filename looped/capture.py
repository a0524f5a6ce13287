"""`capture`: the states H_1..H_K of any recurrent model as it runs, and the fused loss of every loop.

    with looped.capture(model, norm="model.norm", head="lm_head") as captured:
        model(input_ids)
    result = captured.cross_entropy(targets, penalty=0.01)
    result.loss.backward()

The model's code, outputs and parameters stay as they are: forward hooks look at what its modules are given.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from looped.adapters import find_adapter
from looped.kernels import LoopedReadout
from looped.kernels.arguments import check_number
from looped.kernels.looped_cross_entropy import LoopedCrossEntropy, mean_square
from looped.replay import Calls, call_of, check_eager, named_module, tensor_of, uncompiled


@contextmanager
def capture(
    model: nn.Module,
    *,
    norm: str | None = None,
    head: str | None = None,
    states: str | None = None,
    coda: Sequence[str] = (),
) -> "Iterator[Captured]":
    """Record the states of every call of `model` in the block; those of the last call are kept, none if it failed.

    Without names the model must be one that `looped.adapters` knows.

    norm: the name of the readout's norm. Its inputs are the states, if the model calls it after every loop.
    states: the name of the module whose outputs are the states, where the norm is called once, after the last loop.
    head: the name of the output layer, for `cross_entropy`: an nn.Linear, or an nn.Embedding that is tied.
    coda: the names of the modules between a state and the norm, in order. They are called again for every state, as the
        model called them last, so without a cache of keys and values.

    Blocks replaced by torch.compile(block), autocast and activation checkpointing are fine; call `cross_entropy` under
    the same autocast. The modules named must be called from code that is not compiled, which does not run hooks, and
    under reentrant checkpointing none may be inside of a checkpoint, where states have no gradients. What a model does
    to the logits of its head, such as a softcap, is not part of the loss.

    Raises ValueError or TypeError, before the model runs, for a name that the model has not, a norm or a head that the
    fused readout would not reproduce, a compiled caller, an unknown model without names, or names of which none says
    where the states are.
    """
    least = 1 if states else 2
    if norm is None and states is None:
        if head is not None or coda:
            raise ValueError(f"norm or states must be named with head and coda. Got head={head!r}, coda={coda!r}.")
        adapter = find_adapter(model, ", or its modules named: norm, head, states")
        norm, head, states, coda, least = adapter.norm, adapter.head, adapter.states, adapter.coda, 1
    captured = Captured(model, norm=norm, head=head, states=states, coda=coda, least=least)
    handles = captured.attach()
    handles.append(model.register_forward_pre_hook(lambda *_: captured.begin()))
    handles.append(model.register_forward_hook(lambda *_: captured.end()))
    handles.append(model.register_forward_hook(lambda *_: captured.abandon(), always_call=True))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        captured.abandon()


class Captured:
    """What `capture` gives. readout: the model's norm and head as a LoopedReadout; None where no head was named."""

    def __init__(
        self, model: nn.Module, *, norm: str | None, head: str | None, states: str | None, coda: Sequence[str],
        least: int,
    ) -> None:  # fmt: skip
        self.model, self.norm, self.of_outputs, self.least = model, norm, states is not None, least
        self.argument, self.name = ("states", states) if states is not None else ("norm", str(norm))
        check_eager(model, self.argument, self.name)
        self.source = named_module(model, self.argument, self.name)
        self.coda, self.calls = tuple(coda), Calls(model, "coda", coda)
        for name in self.coda:
            check_eager(model, "coda", name)
        self.readout: LoopedReadout | None = None
        if head is not None:
            norm_module = None if norm is None else uncompiled(named_module(model, "norm", norm))
            self.readout = LoopedReadout(uncompiled(named_module(model, "head", head)), norm_module)  # type: ignore[arg-type]
        self._states: list[Tensor] = []
        self._versions: list[int] = []
        self._running = self._called = self._with_gradients = False

    # Recording --------------------------------------------------------------------------------------------------------

    def attach(self) -> list[RemovableHandle]:
        """Hook the modules. Only what happens between `begin` and `end` is recorded, not what a backward repeats."""
        handles = self.calls.record(lambda: self._running)
        if self.of_outputs:
            handles.append(self.source.register_forward_hook(lambda _, __, output: self._keep(tensor_of, output)))
        else:
            handles.append(
                self.source.register_forward_pre_hook(
                    lambda _, args, kwargs: self._keep(lambda given: call_of(*given).state, (args, kwargs)),
                    with_kwargs=True,
                )
            )
        return handles

    def begin(self) -> None:
        """The model starts to run: what an earlier call left is forgotten."""
        self.forget()
        self._running = True
        self._with_gradients = torch.is_grad_enabled()

    def end(self) -> None:
        """The model has run."""
        self._running, self._called = False, True

    def abandon(self) -> None:
        """The model will not run on. If it has not come to its end, what was recorded is not a whole call."""
        if self._running:
            self.forget()

    def forget(self) -> None:
        """Let go of the states and of what the coda was given, as if the model had not run."""
        self._running = self._called = False
        self._states, self._versions = [], []
        self.calls.clear()

    def _keep(self, state_of: Any, given: Any) -> None:
        if self._running:
            state = state_of(given)
            self._states.append(state)
            self._versions.append(_version(state))

    # What was recorded ------------------------------------------------------------------------------------------------

    @property
    def states(self) -> list[Tensor]:
        """K states [B, T, d], as the model computed them, attached to its graph.

        Raises RuntimeError where the model has not run or has failed, and ValueError where it has no such states or has
        changed them.
        """
        if not self._called:
            raise RuntimeError("the model must have run: call the very module that capture was given, to its end.")
        if len(self._states) < self.least:
            times = "once" if self._states else "not at all"
            advice = (
                "" if self.of_outputs else " For a norm after the loop name the module whose outputs they are: states."
            )
            raise ValueError(
                f"{self.argument} must be a module that the model calls once a loop, outside of compiled code. "
                f"{self.name!r} was called {times}: no recurrent states.{advice}"
            )
        if any(_version(state) != version for state, version in zip(self._states, self._versions, strict=True)):
            raise ValueError(
                f"states must not be changed in place after {self.name!r}. Got one that the model changed."
            )
        return list(self._states)

    def read(self, state: Tensor) -> Tensor:
        """What the norm is given for a state: the state after the coda."""
        return self.calls.through(self.coda, state)

    def cross_entropy(
        self,
        targets: Tensor,
        *,
        weights: Tensor | Sequence[float] | None = None,
        penalty: float | Tensor = 0.0,
        n_targets: float | Tensor | None = None,
        statistics: bool = False,
    ) -> LoopedCrossEntropy:
        """The fused loss of all loops: `sum_k w_k CE_k + penalty * mean over loops, tokens and channels of H_k^2`.

        targets: [B, T] int64, -100 where they do not count: what each token is to predict, shifted by the caller.
        weights: 1/K each unless given; a loop of weight 0 is not read. The rest is as for `looped_cross_entropy`.
        The penalty is on the states that are fed back, not on what a coda makes of them.
        Raises ValueError as `states` does, without a head, and for states that carry no gradients though they should.
        """
        if self.readout is None:
            raise ValueError("head must be named for a loss. Got None.")
        if not isinstance(penalty, Tensor):
            check_number("penalty", penalty, 0)
        states = self.states
        self._check_gradients(states)
        if not self.coda:
            return self.readout(
                states, targets, weights=weights, penalty=penalty, n_targets=n_targets, statistics=statistics
            )
        unread = (
            [] if weights is None or isinstance(weights, Tensor) else [loop for loop, w in enumerate(weights) if not w]
        )
        read = [None if loop in unread else self.read(state) for loop, state in enumerate(states)]
        like = next((state for state in read if state is not None), states[-1])
        result = self.readout(
            [like if state is None else state for state in read],
            targets, weights=weights, n_targets=n_targets, statistics=statistics,
        )  # fmt: skip
        if isinstance(penalty, Tensor) or penalty > 0:
            result = result._replace(loss=result.loss + penalty * mean_square(states))
        return result

    def _check_gradients(self, states: Sequence[Tensor]) -> None:
        if not (self._with_gradients and torch.is_grad_enabled() and self.model.training):
            return
        if not any(state.requires_grad for state in states) and self._trains_a_trunk():
            raise ValueError(
                "states must carry gradients while the model trains. Got none that does: reentrant checkpointing hides "
                "those inside of it (use_reentrant=False), and so does no_grad in the model."
            )

    def _trains_a_trunk(self) -> bool:
        assert self.readout is not None
        norm = self.readout.norm
        of_readout = {*self.readout.head.parameters(), *(() if norm is None else norm.parameters())}
        return any(parameter.requires_grad and parameter not in of_readout for parameter in self.model.parameters())


def _version(state: Tensor) -> int:
    return 0 if state.is_inference() else state._version
