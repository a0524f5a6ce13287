"""What a program did on a GPU that is not there: its calls, with the bytes and FLOPs of each, and its memory."""

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Call:
    """One kernel that the device would run.

    read_write_bytes: of the tensors it reads and of those it writes, each once.
    Of a Triton kernel also its grid and its arguments by name (of a tensor its bytes).
    """

    name: str
    read_write_bytes: int
    flops: int
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """A Triton kernel in one specialisation: Triton's own object, its constants, its grids.

    dtypes: of the tensors that it is given, by name; one that is not there is not in it.
    """

    kernel: Any
    constants: dict[str, Any]
    dtypes: dict[str, str]
    grids: set[tuple[int, ...]] = field(default_factory=set)


@dataclass
class Record:
    """What a program did while it ran on the fake GPU."""

    calls: list[Call] = field(default_factory=list)
    host_copies: list[str] = field(default_factory=list)  # each makes the host wait for the device
    kernels: dict[tuple[str, str], Compiled] = field(default_factory=dict)  # by name and hash
    live_bytes: int = 0
    peak_bytes: int = 0

    def clear(self) -> None:
        """Forget calls, copies and the peak, but neither live memory nor compiled kernels."""
        self.calls.clear()
        self.host_copies.clear()
        self.peak_bytes = self.live_bytes


STAND_IN = ("fake_gpu", "fake_cuda", "record")  # modules of this folder, which call for the program


def caller() -> str:
    """Where in this project the op under way was called."""
    folder = Path(__file__).parent
    project, stand_in = folder.parents[1], {folder / f"{name}.py" for name in STAND_IN}
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(project) and "site-packages" not in path.parts and path not in stand_in:
            return f"{frame.name} ({path.relative_to(project)}:{frame.lineno})"
    return "elsewhere"


def tensors_of(*values: Any) -> list[Tensor]:
    """The tensors among an op's operands or results, those in lists too."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_of(*value)
    return found


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of distinct tensors; an expanded dimension counts once."""
    distinct = {}
    for tensor in tensors:
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride or size == 0 else 1
        distinct[(id(tensor.untyped_storage()), tensor.storage_offset(), elements)] = elements * tensor.element_size()
    return sum(distinct.values())


GATHERS = {"embedding", "gather", "index", "index_select", "nll_loss_forward"}  # read of the first what they write
SCATTERS = {"index_add_", "scatter_add_"}  # read and write of the first what the last holds


def traffic(func: Any, read: list[Tensor], returned: list[Tensor]) -> int:
    """Bytes that an ATen op reads and writes, given the operands that it does not only write."""
    name = func._overloadpacket.__name__
    if name.startswith("new_") or name.endswith("_like"):  # filled: the argument says only where
        read = []
    elif name in GATHERS:
        return bytes_of(read[1:]) + 2 * bytes_of(returned)
    elif name in SCATTERS:
        return bytes_of(read[1:]) + 2 * bytes_of(read[-1:])
    return bytes_of(read) + bytes_of(returned)


def launch_bytes(tensors: dict[str, Tensor], launch: dict[str, Any]) -> int:
    """Bytes of the tensors that a Triton launch is given; those that it reads and writes count twice."""
    twice = {"logits_ptr"} if launch.get("GRADIENT") else set()
    twice |= {"dweight_ptr", "dbias_ptr"} if launch.get("ADD") else set()
    return bytes_of(list(tensors.values())) + bytes_of([tensors[name] for name in twice & tensors.keys()])


def flops(func: Any, args: tuple, out: Any) -> int:
    in_place = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # which the registry does not know
    formula = flop_registry.get(in_place.get(func._overloadpacket, func._overloadpacket))
    return 0 if formula is None else formula(*(arg for arg in args if isinstance(arg, Tensor)), out_val=out)
