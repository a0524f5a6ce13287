"""A GPU that is not there: CUDA programs run on fake tensors, their Triton kernels are compiled, and calls recorded.

Inside `FakeGPU(target)` tensors created with device="cuda" have shapes, dtypes and strides but no memory.  The ops of
`kernels` run their real CUDA path on them: dispatch, allocations, launch configurations.  A Triton launch is compiled
for the target, with the specialisation that the real call would have, and not launched.  Everything that would reach
the device is recorded: kernels, bytes, FLOPs, live memory, and whatever would make the host wait.

Three things are imitated, because a CPU build of PyTorch has no CUDA behind the device's name:

- C++ is told that the tensors are meta tensors (it has no device guards or streams for CUDA), Python that they are on
  the GPU.  Hence autocast, which C++ decides by the device, is applied here to F.linear and to attention.
- scaled_dot_product_attention is the flash kernel that a CUDA build picks for half precision and head sizes to 256.
- Device properties come from `TARGETS`.
"""

import contextlib
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Target:
    """A GPU: its name, Triton's target, multiprocessors, bytes of shared memory that one program may use."""

    name: str
    triton: GPUTarget
    multiprocessors: int
    shared_bytes: int

    @property
    def is_amd(self) -> bool:
        return self.triton.backend == "hip"


TARGETS = {
    "sm_80": Target("A100", GPUTarget("cuda", 80, 32), 108, 163 * 1024),
    "sm_90": Target("H100", GPUTarget("cuda", 90, 32), 132, 227 * 1024),
    "sm_100": Target("B200", GPUTarget("cuda", 100, 32), 148, 227 * 1024),
    "gfx942": Target("MI300X", GPUTarget("hip", "gfx942", 64), 304, 64 * 1024),
}


@dataclass(frozen=True)
class Call:
    """One kernel that the device would run.

    read_write_bytes: of the tensors it reads and of those it writes, each once.
    """

    name: str
    read_write_bytes: int
    flops: int
    grid: tuple[int, ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()


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


class Pointer:
    """What Triton specialises on in a tensor argument: dtype, alignment, reach.  Allocations are aligned to 512."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset_bytes = int(tensor.storage_offset()) * tensor.element_size()
        self.storage_bytes = int(tensor.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        return 512 + self.offset_bytes

    def ptr_range(self) -> int:
        return self.storage_bytes


class StubDriver:
    """Answers what Triton's compiler asks of a driver."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {
                "max_shared_mem": target.shared_bytes,
                "multiprocessor_count": target.multiprocessors,
            }
        )

    def get_current_target(self) -> GPUTarget:
        return self.target.triton

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu


def _bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of distinct tensors; an expanded dimension counts once."""
    distinct = {}
    for tensor in tensors:
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride or size == 0 else 1
        distinct[(id(tensor.untyped_storage()), tensor.storage_offset(), elements)] = elements * tensor.element_size()
    return sum(distinct.values())


def _flops(func: Any, args: tuple, out: Any) -> int:
    in_place = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # which the registry does not know
    formula = flop_registry.get(in_place.get(func._overloadpacket, func._overloadpacket))
    return 0 if formula is None else formula(*(arg for arg in args if isinstance(arg, Tensor)), out_val=out)


def _caller() -> str:
    """Where in this project the op under way was called."""
    here = Path(__file__).parents[1]
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(here)]
    own = [frame for frame in frames if frame.filename != __file__ and "site-packages" not in frame.filename]
    return f"{Path(own[-1].filename).relative_to(here)}:{own[-1].lineno}" if own else "elsewhere"


class Autocast:
    """Autocast and kernel choice of a CUDA build for the products that Python calls: F.linear and attention."""

    def __init__(self) -> None:
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}  # of leaves, as autocast keeps them
        self.plain_linear, self.plain_attention = F.linear, F.scaled_dot_product_attention

    def cast(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda")
        if not torch.is_autocast_enabled("cuda") or x.dtype == dtype or not x.is_cuda:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.casts:
            self.casts[id(x)] = (x, x.to(dtype))
        return self.casts[id(x)][1]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.plain_linear(self.cast(x), self.cast(weight), None if bias is None else self.cast(bias))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
        q, k, v = self.cast(q), self.cast(k), self.cast(v)
        if q.dtype == torch.float32 or q.shape[-1] > 256:
            return self.plain_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


class FakeCUDA(FakeTensorMode):
    """Fake tensors; what C++ makes "on the device of" one of them is made on the GPU."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": torch.device("cuda")}
        return super().dispatch(func, types, args, kwargs or {})


class Recorder(TorchDispatchMode):
    """Runs the ops of `kernels` as the device would, and records every other op."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record, self.seen = record, weakref.WeakSet()  # type: ignore[var-annotated]

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage in self.seen:
            return
        self.seen.add(storage)
        n_bytes = storage.nbytes()
        self.record.live_bytes += n_bytes
        self.record.peak_bytes = max(self.record.peak_bytes, self.record.live_bytes)
        weakref.finalize(storage, self.free, n_bytes)

    def arrive(self, x: Any) -> Any:
        """A tensor that C++ made from Python numbers (an index, say): on a GPU, a copy that the host waits for."""
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor) or x.device.type != "meta":
            return x
        self.record.host_copies.append(f"tensor {tuple(x.shape)} made from numbers, {_caller()}")
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    def free(self, n_bytes: int) -> None:
        self.record.live_bytes -= n_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "looped":
            return self.run_op(func, args, kwargs)
        if func.namespace != "aten":  # questions to a tensor
            return func(*args, **kwargs)
        args, kwargs = tree_map(self.arrive, (args, kwargs))
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        returned = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in returned:
            self.watch(tensor)
        copies = "copy" in str(func)  # other ops take a number on the host along as an argument
        placed = [t for t in given if copies or t.dim() > 0 or t.device.type == "cuda"]
        devices = {t.device.type for t in (*placed, *returned)}
        if "cuda" in devices and "cpu" in devices:
            self.record.host_copies.append(f"{func}, {_caller()}")
        known = {id(t.untyped_storage()) for t in given}
        views = returned and all(id(t.untyped_storage()) in known for t in returned) and not func._schema.is_mutable
        if "cuda" in devices and not views and "empty" not in str(func) and "detach" not in str(func):
            inputs = (args, {name: value for name, value in kwargs.items() if name != "out"})
            read = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            self.record.calls.append(Call(str(func), _bytes_of(read) + _bytes_of(returned), _flops(func, args, out)))
        return out

    def run_op(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The op's real body, whose results must look as its fake implementation says."""
        expected = tree_leaves(func(*args, **kwargs))
        with self:
            out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        for actual, fake in zip(tree_leaves(out), expected, strict=True):
            told = [(t.shape, t.dtype, t.device) for t in (actual, fake)]
            assert told[0] == told[1], f"{func}: returns {told[0]}, its fake implementation {told[1]}"
        return out


IN_PLACE = ("logits_ptr", "dweight_ptr", "dbias_ptr")  # arguments that a kernel reads and writes


def _dot_flops(arguments: dict[str, Any]) -> int:
    return 2 * arguments["n_rows"] * arguments["n_columns"] * arguments["d"]


def _compile_launch(record: Record, target: Target, original: Callable) -> Callable:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
        for name, value in kwargs.items():
            assert not isinstance(value, Tensor) or value.device.type == "cuda", f"{name} is on {value.device}"
        given = {k: Pointer(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        kernel = original(self, *args, grid=grid, warmup=True, **given)
        constants = tuple((k, v) for k, v in kwargs.items() if k.isupper() or k in ("num_warps", "num_stages"))
        name = self.fn.__name__
        record.kernels.setdefault((name, kernel.hash), (kernel, constants, tuple(str(t.dtype) for t in tensors)))
        twice = [kwargs[name] for name in IN_PLACE if kwargs.get(name) is not None and kwargs.get("HAS_GRADIENT", True)]
        flops = _dot_flops(kwargs) if name == "stream_kernel" else 0
        record.calls.append(Call(name, _bytes_of(tensors) + _bytes_of(twice), flops, tuple(grid), constants))
        return kernel

    return run


@contextlib.contextmanager
def fake_gpu(target: Target) -> Iterator[Record]:
    """Tensors on device "cuda" are fake ones on `target` while this lasts; yields the record of what runs there."""
    record, autocast = Record(), Autocast()
    device = SimpleNamespace(multi_processor_count=target.multiprocessors, name=target.name)
    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda *_: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda *_: device,
        "torch.cuda.get_device_capability": lambda *_: (9, 4) if target.is_amd else divmod(target.triton.arch, 10),
        "torch.version.hip": "6.4" if target.is_amd else None,
        "torch.clear_autocast_cache": autocast.casts.clear,
        "torch.nn.functional.linear": autocast.linear,
        "torch.nn.functional.scaled_dot_product_attention": autocast.attention,
        "triton.runtime.jit.JITFunction.run": _compile_launch(record, target, JITFunction.run),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch(name, answer))
        on_gpu = property(lambda tensor: tensor.fake_device.type == "cuda")
        stack.enter_context(patch.object(FakeTensor, "is_cuda", on_gpu, create=True))
        asked_by_c = {torch.ops.prim.device.default: lambda _: torch.device("meta")}
        stack.enter_context(patch.dict(fake_tensor._DISPATCH_META_HANDLERS, asked_by_c))
        previous = driver._active
        stack.callback(setattr, driver, "_active", previous)
        driver.set_active(StubDriver(target))
        stack.enter_context(FakeCUDA())
        stack.enter_context(Recorder(record))
        yield record
