"""A CPU's stand-in for CUDA graphs: what a capture runs is put on a tape, op by op, and a replay runs the tape.

It shares what makes a capture hard. Python runs once, so whatever is a number then stays that number; tensors are read
and written where they were. Capturing has no effect: weights, buffers and random generator are put back. Results are
overwritten by the next replay. Reads of values are allowed, as the CPU's own code checks tokens by them.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """A graph: the ops of a capture, with the very tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Callable, tuple, dict, Any]] = []
        self.replays = 0
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # of storages that an op is about to change
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:
            for tensor in given:
                where = tensor.untyped_storage().data_ptr()
                if where not in self._made and where not in self._before:
                    self._before[where] = (tensor, tensor.clone())
        out = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)} - known
        self._made |= made
        if made or func._schema.is_mutable:  # anything else is a view, and follows by itself
            self.ops.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for tensor, before in self._before.values():
            tensor.data.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.ops:
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old is not value and not func._schema.is_mutable:
                    old.data.copy_(value)


@contextlib.contextmanager
def capture(tape: Tape, pool: object = None) -> Iterator[None]:
    """After an error the random generator is not as it was: a GPU's would go on believing that it is captured."""
    state = torch.get_rng_state()
    try:
        with tape:
            yield
        torch.set_rng_state(state)
    finally:
        tape.undo()


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


def install(monkeypatch: Any) -> list[Tape]:
    """Have torch.cuda's graphs be tapes; returns those that are made."""
    tapes: list[Tape] = []

    def make() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    generator = SimpleNamespace(clone_state=torch.get_rng_state, graphsafe_set_state=torch.set_rng_state)
    stand_ins = {
        "CUDAGraph": make,
        "graph": capture,
        "graph_pool_handle": object,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "device": lambda device: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "default_generators": [generator],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("looped.block.is_plain", lambda *_: True)  # a tape is a dispatch mode, a GPU's capture is none
    return tapes
