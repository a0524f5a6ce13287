"""Calls of a model's modules, recorded as the model makes them, and made again with another state.

A module of someone else's model may need more than the state: positions, a mask, rotary tables. The model knows them
and hands them over. So its own call is recorded, and repeated with the state in another's place.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Call:
    """One call of a module. args and kwargs: without the state. keyword: under which name the state was given."""

    state: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None

    def repeat(self, module: nn.Module, state: Tensor) -> Tensor:
        """What the module makes of another state."""
        if self.keyword is None:
            return tensor_of(module(state, *self.args, **self.kwargs))
        return tensor_of(module(*self.args, **self.kwargs, **{self.keyword: state}))


def call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """A call, by what the module was given. The state is the first tensor. Raises TypeError where there is none."""
    if args and isinstance(args[0], Tensor):
        return Call(args[0], args[1:], kwargs, None)
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return Call(value, args, {key: other for key, other in kwargs.items() if key != name}, name)
    got = ", ".join([*(type(arg).__name__ for arg in args), *kwargs]) or "no argument"
    raise TypeError(f"a module that states go through must be given a tensor. Got {got}.")


def tensor_of(output: Any) -> Tensor:
    """The state that a module returns: its output, or the first of several. Raises TypeError for no tensor."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(
            f"a module that states come from must return a tensor, or one first. Got {type(first).__name__}."
        )
    return first


def named_module(model: nn.Module, argument: str, name: str) -> nn.Module:
    """The module of that name. Raises ValueError, naming the argument and the nearest name that there is."""
    modules = dict(model.named_modules())
    if name not in modules or not name:
        nearest = get_close_matches(name, modules, n=1, cutoff=0.0)
        hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
        raise ValueError(f"{argument} must be the name of a module of {type(model).__name__}. Got {name!r}{hint}.")
    return modules[name]


class Calls:
    """The last call of each of some modules of a model, by their names, and the state of the first.

    Nothing is recorded until `record`, and nothing while `wanted()` is false.
    """

    def __init__(self, model: nn.Module, argument: str, names: Iterable[str]) -> None:
        self.modules = {name: named_module(model, argument, name) for name in names}
        self.last: dict[str, Call] = {}
        self.first_states: dict[str, Tensor] = {}

    def record(self, wanted: Callable[[], bool] = lambda: True) -> list[RemovableHandle]:
        """Record from now until the handles are removed."""

        def hook(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if wanted():
                    self.last[name] = call_of(args, kwargs)
                    self.first_states.setdefault(name, self.last[name].state)

            return keep

        return [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in self.modules.items()]

    def through(self, names: Iterable[str], state: Tensor) -> Tensor:
        """The state after the modules `names`, one after the other, each called as the model called it last."""
        for name in names:
            state = self.last[name].repeat(self.modules[name], state)
        return state

    def clear(self) -> None:
        """Forget all calls, and the tensors that they hold."""
        self.last.clear()
        self.first_states.clear()


def check_eager(model: nn.Module, argument: str, name: str) -> None:
    """Raise ValueError where the module is called from compiled code, which does not run hooks added later."""
    parts = name.split(".")
    modules = dict(model.named_modules())
    for place in ("", *(".".join(parts[: length + 1]) for length in range(len(parts)))):
        module = modules.get(place)
        if module is None:
            return
        replaced = hasattr(module, "_orig_mod") and place != name  # a compiled module's own hooks run outside of it
        if replaced or module._compiled_call_impl is not None:
            what = repr(place) if place else "the whole model"
            raise ValueError(
                f"{argument} must be called from code that is not compiled: replace blocks by torch.compile(block). "
                f"Got {name!r}, with {what} compiled."
            )


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the module itself."""
    return getattr(module, "_orig_mod", module)
