"""What is compared: an implementation by its name, and whether it can run here."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from bench.shapes import DEVICE


class Implementation(NamedTuple):
    """`make()` gives the function; `missing` says why it cannot run here, or is None.

    slow_on_cpu: so slow on a CPU that one round must do, and none at the largest vocabulary.
    """

    name: str
    make: Callable[[], Any]
    missing: str | None = None
    slow_on_cpu: bool = False

    @property
    def is_fused(self) -> bool:
        return self.name == "fused"

    def __str__(self) -> str:
        return self.name


def freshly_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, by torch.compile for exactly the shapes that it will see.

    What was compiled before is forgotten: for a second shape PyTorch would make the sizes dynamic, which may be slower,
    and after eight of them it would stop compiling.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def with_fresh_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which calls torch.compile itself, as `freshly_compiled` treats ours."""
    torch.compiler.reset()
    return function


def why_missing(package: str, *, needs_gpu: bool = False) -> str | None:
    """Why what needs a package cannot run here, or None."""
    if needs_gpu and DEVICE.type != "cuda":
        return "needs a GPU"
    return None if find_spec(package) else f"{package} is not installed (make bench installs it)"
