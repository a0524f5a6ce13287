"""What is compared: an implementation by its name, whether it can run here, and whose fault it is if it fails."""

import traceback
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler

from bench.shapes import DEVICE

THIRD_PARTIES = {"cut_cross_entropy", "liger_kernel", "quack", "cutlass"}


def is_ours(name: str) -> bool:
    """Ours must run and be right, and is nobody's competitor."""
    return name.startswith("fused")


class Implementation(NamedTuple):
    """function: what is called, None where a model is made by the name. missing: why it cannot run here, or None.

    compiles: whether its first call compiles, so that neither its time nor its memory says anything: "inside", because
    the function says so itself, or "whole", by torch.compile, for exactly the shapes that it will see.
    """

    name: str
    function: Callable[..., Any] | None = None
    missing: str | None = None
    compiles: Literal["", "inside", "whole"] = ""

    def fresh(self) -> Callable[..., Any]:
        """The function, ready to be called. If it compiles, what was compiled before is forgotten: for a second shape
        PyTorch would make the sizes dynamic, which may be slower, and after eight of them it would stop compiling."""
        if self.compiles:
            torch.compiler.reset()
        assert self.function is not None
        return torch.compile(self.function, dynamic=False) if self.compiles == "whole" else self.function


def by_name(implementations: Iterable[Implementation]) -> dict[str, Implementation]:
    """Tests are parametrised by the names, which pytest-benchmark can group by and write."""
    return {implementation.name: implementation for implementation in implementations}


def fused_plain_compiled(fused: Callable[..., Any], plain: Callable[..., Any]) -> list[Implementation]:
    """What every operation is compared in: ours, plain PyTorch, and torch.compile of it."""
    compiled = Implementation("compiled", plain, compiles="whole")
    return [Implementation("fused", fused), Implementation("plain", plain), compiled]


def why_missing(package: str, *, needs_gpu: bool = False, extra: str = "bench") -> str | None:
    """Why what needs a package, which an extra of ours has, cannot run here, or None."""
    if needs_gpu and DEVICE.type != "cuda":
        return "needs a GPU"
    return None if find_spec(package) else f"{package} is not installed (the {extra} extra has it)"


def cannot_run_here(error: Exception) -> bool:
    """Whether an exception says that a competitor cannot run here: raised inside a third party's code, by a compiler
    that is missing or gives up, or for want of memory.  Any other is a fault of ours."""
    if isinstance(error, (BackendCompilerFailed, InvalidCxxCompiler, torch.OutOfMemoryError)):
        return True
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in THIRD_PARTIES:
        return True  # a version without what is asked of it
    frames = traceback.extract_tb(error.__traceback__)
    return any(THIRD_PARTIES.intersection(Path(frame.filename).parts) for frame in frames)
