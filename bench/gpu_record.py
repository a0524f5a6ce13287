"""What a program did on a GPU that is not there: its calls, with the bytes and FLOPs of each, and its memory."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Call:
    """One kernel that the device would run.

    read_write_bytes: of the tensors it reads and of those it writes, each once.  Of a Triton kernel also: `arguments`
    by name (of a tensor its bytes) and `key`, under which the record holds the compiled kernel.  `op`: the custom op
    that made the launch; `sizes`: the dimensions of what an ATen op reads.
    """

    name: str
    read_write_bytes: int
    flops: int
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    key: tuple[str, str] | None = None
    op: str = ""
    sizes: frozenset[int] = frozenset()


@dataclass
class Record:
    """What a program did while it ran on the fake GPU."""

    calls: list[Call] = field(default_factory=list)
    host_copies: list[str] = field(default_factory=list)  # each makes the host wait for the device
    kernels: dict[tuple, Any] = field(default_factory=dict)  # compiled, by name, constants, types and target
    live_bytes: int = 0
    peak_bytes: int = 0

    def launches(self, prefix: str = "") -> int:
        return sum(call.name.startswith(prefix) for call in self.calls)

    def clear(self) -> None:
        """Forget calls, copies and the peak, but neither live memory nor compiled kernels."""
        self.calls.clear()
        self.host_copies.clear()
        self.peak_bytes = self.live_bytes


STAND_IN = ("fake_gpu", "fake_cuda", "gpu_record")  # modules, which call for the program


def caller() -> str:
    """Where in this project the op under way was called."""
    here = Path(__file__).parents[1]
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(here)]
    own = [f for f in frames if "site-packages" not in f.filename and Path(f.filename).stem not in STAND_IN]
    if not own:
        return "elsewhere"
    return f"{own[-1].name} ({Path(own[-1].filename).relative_to(here)}:{own[-1].lineno})"


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


def traffic(func: Any, args: Any, returned: list[Tensor]) -> int:
    """Bytes that an ATen op reads and writes, given the arguments that it does not only write."""
    name, read = func._overloadpacket.__name__, [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if name.startswith("new_") or name.endswith("_like"):  # filled: the argument says only where
        read = []
    elif name in GATHERS:
        return bytes_of(read[1:]) + 2 * bytes_of(returned)
    elif name in SCATTERS:
        return bytes_of(read[1:]) + 2 * bytes_of(read[-1:])
    return bytes_of(read) + bytes_of(returned)


def launch_bytes(kernel: str, tensors: dict[str, Tensor], twice: set[str]) -> int:
    """Bytes that a Triton launch reads or writes, those of `twice` both; of what it gathers from, the rows."""
    gathered = {name: GATHERED_FOR[at] for name in tensors if (at := f"{kernel}.{name}") in GATHERED_FOR}
    whole = [tensor for name, tensor in tensors.items() if name not in gathered]
    rows = sum(tensors[name][0].nbytes * len(tensors[like]) for name, like in gathered.items())
    return bytes_of(whole) + bytes_of([tensors[name] for name in twice]) + rows


def flops(func: Any, args: tuple, out: Any) -> int:
    in_place = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # which the registry does not know
    formula = flop_registry.get(in_place.get(func._overloadpacket, func._overloadpacket))
    return 0 if formula is None else formula(*(arg for arg in args if isinstance(arg, Tensor)), out_val=out)


# Arguments that a kernel reads and writes: by name, or by kernel and name.
IN_PLACE = {
    "logits_ptr",
    "liger_cross_entropy_kernel.X_ptr",
    "element_mul_kernel.X_ptr",
    "_rms_norm_backward_kernel.dY_ptr",
    "_cce_backward_kernel.dE",
    "_cce_backward_kernel.dC",
}

ADDED_TO = {"dweight_ptr", "dbias_ptr"}  # read and written where the launch says ADD

# Arguments of which a kernel reads one row for each row of another argument: by kernel and name.
GATHERED_FOR = {"_indexed_neg_dot_forward_kernel.C": "E"}

# FLOPs of the matrix products of a Triton kernel, from its arguments.
PRODUCTS: dict[str, Callable[[dict[str, Any]], int]] = {
    "stream_kernel": lambda a: 2 * a["n_rows"] * a["n_columns"] * a["d"],
    "_cce_lse_forward_kernel": lambda a: 2 * a["B"] * a["V"] * a["D"],
    "_cce_backward_kernel": lambda a: 6 * a["B"] * a["V"] * a["D"],  # the logits again, and two gradients
}
