"""`patch`: a known recurrent model whose loss is the fused one, until it is undone.

    with looped.patch(model):
        loss = model(input_ids, labels=labels).loss

For training loops that call a model with labels and use `output.loss`, as transformers' Trainer does.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, NoReturn, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from looped.adapters import find_adapter
from looped.capture import Captured
from looped.kernels import LoopedReadout
from looped.kernels.arguments import check_number
from looped.kernels.looped_cross_entropy import mean_square
from looped.replay import named_module, tensor_of
from looped.supervision import IGNORE_INDEX

PatchedLoss = Literal["own", "per-loop"]
OF_THE_LOSS = ("labels", "num_items_in_batch", "shift_labels", "ignore_index")  # arguments, as transformers names them

COPIED = "a patched model must not be copied: the copy would run the original. Undo the patch first."


def patch(model: nn.Module, *, loss: PatchedLoss = "own", penalty: float = 0.0) -> "Patched":
    """Let `model(..., labels=...)` form its loss by the fused readout, which never has the logits in memory.

    loss: `own` is the model's own: of the last loop, and for Ouro that of the logits expected under its exit gate.
        `per-loop` is the mean over loops of the cross-entropy.
    penalty: lambda of `lambda * mean over loops, tokens and channels of H_k^2`, which is added.

    With labels the output has no logits; without, the model does what it did. `num_items_in_batch`, `shift_labels` and
    `ignore_index` mean what they mean in transformers. What is returned undoes it all, by `undo()` or as a context
    manager, and also where something else, such as accelerate, has wrapped the model's forward since.

    Raises ValueError for a model that `looped.adapters` does not know, that takes no labels or that is patched
    already, for an option out of range, and as `looped.capture` does.
    """
    if loss not in get_args(PatchedLoss):
        raise ValueError(f"loss must be one of {', '.join(get_args(PatchedLoss))}. Got {loss!r}.")
    check_number("penalty", penalty, 0)
    if "forward" in vars(model):
        got = type(model).__name__
        raise ValueError(f"model must have the forward of its class, not a patch or a wrapper. Got {got} with another.")
    patched = Patched(model, loss, penalty)
    model.forward = patched
    return patched


class Patched:
    """The forward of a patched model, and the way back: `undo()`, or the end of a with block."""

    def __init__(self, model: nn.Module, loss: PatchedLoss, penalty: float) -> None:
        adapter = find_adapter(model)
        self.model, self.adapter, self.penalty = model, adapter, penalty
        self.terminal = loss == "own"
        self.captured = Captured(
            model, norm=adapter.norm, head=adapter.head, states=adapter.states, coda=adapter.coda, least=1
        )
        self.expected = ExpectedState(model, adapter.norm, adapter.gate) if self.terminal and adapter.gate else None
        self.head = named_module(model, "head", adapter.head)
        if hasattr(self.head, "_orig_mod") or self.head._compiled_call_impl or "forward" in vars(self.head):
            got = type(self.head).__name__
            raise ValueError(f"head must have the forward of its class, not compiled. Got a {got} with another.")
        self.unnormed_readout = LoopedReadout(self.head, None)  # type: ignore[arg-type]  # Captured has checked it
        self.own_forward: Callable[..., Any] = type(model).forward  # of a model and its arguments
        self.call = torch.compiler.disable(self._call)  # marked here, not in the class: it imports the compiler
        functools.update_wrapper(self, model.forward)
        self.signature, self.undone = inspect.signature(model.forward), False
        kinds = {parameter.kind for parameter in self.signature.parameters.values()}
        if "labels" not in self.signature.parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(f"model must take labels. Got {type(model).__name__}, which does not.")

    def undo(self) -> None:
        """Give the model its own forward back. A second time nothing happens."""
        self.undone = True
        if vars(self.model).get("forward") is self:
            del self.model.forward

    def __enter__(self) -> nn.Module:
        if self.undone:
            raise ValueError("a patch that was undone must not be used again. Call looped.patch for another.")
        return self.model

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        if not self.undone:
            raise ValueError(COPIED)
        # What has wrapped the patched forward still holds it: in a copy of the model it is the copy's own forward.
        return MethodType(self.own_forward, copy.deepcopy(self.model, memo))

    def __reduce__(self) -> NoReturn:
        raise ValueError("a patched model must not be pickled. Undo the patch first.")

    # A call -----------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.model, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function that a method has. accelerate wraps that one, and binds the result to the model again."""

        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call(model, *args, **kwargs)

        forward.__signature__ = inspect.signature(self.own_forward)  # type: ignore[attr-defined]
        return forward

    def _call(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of the model's own forward; with labels its loss is the fused one and its logits None."""
        if self.undone:
            return self.own_forward(model, *args, **kwargs)
        if model is not self.model:
            raise ValueError(COPIED)
        loss_options = {name: kwargs[name] for name in OF_THE_LOSS if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in OF_THE_LOSS}
        given = self.signature.bind_partial(*args, **others)
        labels = given.arguments.pop("labels", loss_options.pop("labels", None))
        if labels is None:
            return self.own_forward(model, *args, **kwargs)
        with self._captured_run():
            output = self.own_forward(model, *given.args, **given.kwargs)
            self.captured.end()
            loss = self._loss(labels, **loss_options)
        names = {field.name for field in dataclasses.fields(output)} if dataclasses.is_dataclass(output) else set()
        if isinstance(output, type) or not {"loss", "logits"} <= names:
            got = type(output).__name__
            raise ValueError(f"a patched model must return an output with loss and logits (return_dict). Got a {got}.")
        perplexity = {"log_ppl": loss.detach().exp()} if "log_ppl" in names else {}  # as Huginn calls it
        return dataclasses.replace(output, loss=loss, logits=None, **perplexity)

    @contextmanager
    def _captured_run(self) -> Iterator[None]:
        """The model's states are recorded, and its head forms no logits."""
        handles = self.captured.attach() + ([] if self.expected is None else self.expected.attach())
        self.head.forward = self._no_logits
        self.captured.begin()
        try:
            yield
        finally:
            del self.head.forward
            for handle in handles:
                handle.remove()
            self.captured.forget()
            if self.expected is not None:
                self.expected.forget()

    def _no_logits(self, y: Tensor) -> Tensor:
        """Logits in name only: one zero, of the shape that the model's code may look at."""
        return torch.zeros((), device=y.device).expand(*y.shape[:-1], len(self.head.weight))  # type: ignore[arg-type]

    def _loss(
        self,
        labels: Tensor,
        num_items_in_batch: float | Tensor | None = None,
        shift_labels: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> Tensor:
        states = self.captured.states
        device = states[0].device
        targets = labels if shift_labels is None else shift_labels
        if shift_labels is None and self.adapter.shifts:
            targets = F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
        targets = targets.to(device)
        targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
        n_targets = num_items_in_batch
        if isinstance(n_targets, Tensor):
            n_targets = n_targets.to(device)
        penalty: float | Tensor = self.penalty
        if n_targets is not None and self.penalty:  # a batch of several that are added up has its share of the penalty
            penalty = self.penalty * (targets != IGNORE_INDEX).sum() / n_targets
        if self.expected is not None:
            loss = self.unnormed_readout([self.expected.state()], targets, n_targets=n_targets).loss
            return loss + penalty * mean_square(states) if self.penalty else loss
        weights = [0.0] * (len(states) - 1) + [1.0] if self.terminal else None
        return self.captured.cross_entropy(targets, weights=weights, penalty=penalty, n_targets=n_targets).loss


class ExpectedState:
    """Of Ouro (arXiv 2510.25741): the state whose logits are those expected under the exit gate's distribution.

    `p_k = sigmoid(g_k) prod_{j<k} (1 - sigmoid(g_j))`, and p_K what is left. The head is linear and has no bias, so
    that `sum_k p_k head(y_k) = head(sum_k p_k y_k)`, with y_k the norm's outputs and g_k the gate's.
    """

    def __init__(self, model: nn.Module, norm: str, gate: str) -> None:
        self.modules = (named_module(model, "norm", norm), named_module(model, "gate", gate))
        self.outputs: tuple[list[Tensor], list[Tensor]] = ([], [])

    def attach(self) -> list[RemovableHandle]:
        """Record from now until the handles are removed."""
        return [
            module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(tensor_of(output)))
            for module, kept in zip(self.modules, self.outputs, strict=True)
        ]

    def forget(self) -> None:
        """Let go of what was recorded."""
        for kept in self.outputs:
            kept.clear()

    def state(self) -> Tensor:
        """`sum_k p_k y_k`, [B, T, d]."""
        normed, gates = self.outputs
        left, expected = torch.ones_like(gates[0]), torch.zeros_like(normed[0])
        for y, gate in zip(normed[:-1], gates, strict=False):
            expected = expected + left * torch.sigmoid(gate) * y
            left = left * (1 - torch.sigmoid(gate))
        return expected + left * normed[-1]
