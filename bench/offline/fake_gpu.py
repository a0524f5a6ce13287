"""A GPU that is not there: CUDA programs run on fake tensors, their Triton kernels are compiled, and calls recorded.

Inside `fake_gpu(target)` tensors created with device="cuda" have shapes, dtypes and strides but no memory.  The ops of
`kernels` run their real CUDA path on them: dispatch, allocations, launch configurations.  A Triton launch is compiled
for the target, with the specialisation that the real call would have, and not launched.  Everything that would reach
the device is recorded: kernels, bytes, FLOPs, live memory, and whatever would make the host wait.  The host's own
tensors are real, and have values.

Code that is not this project's runs the same way: its launches by position and, where it reads values of tensors (the
host then waits), answers that the caller gives.  A custom op that another package registers is asked only for its
fake implementation: its body may need a library that a machine without a GPU cannot load.

What a CPU build of PyTorch lacks is imitated, here and in bench/offline/fake_cuda.py:

- C++ is told that the tensors are meta tensors (it has no device guards or streams for CUDA), Python that they are on
  the GPU.  Hence autocast, which C++ decides by the device, is applied to F.linear and to attention in Python.
- scaled_dot_product_attention is the flash kernel that a CUDA build picks for half precision and head sizes to 256.
  It serves whether or not flash-attn is installed, so that a record does not depend on that.
- rms_norm is one kernel, and its gradient two, as in a CUDA build.
- Modules are moved and cast by new parameters, pinned memory is a mark on a tensor, and an event is the host's time.
- Device properties come from `TARGETS`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.offline.fake_cuda import Autocast, Event, apply, copied, graph_patches, lock_pages, numbered
from bench.offline.record import Call, Compiled, Record, bytes_of, caller, flops, launch_bytes, tensors_of, traffic
from looped.kernels.registration import BODIES


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
        return 1000 + list(TARGETS.values()).index(self.target)  # Triton keeps kernels by device: one a target

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu


class FakeCUDA(FakeTensorMode):
    """Fake tensors; what C++ makes "on the device of" one of them is made on the GPU."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": torch.device("cuda")}
        return super().dispatch(func, types, args, kwargs or {})


def body_of(func: Any) -> Callable[..., Any] | None:
    """What a custom op runs on a device; None for PyTorch's own ops."""
    package, _, name = func._schema.name.partition("::")
    if package == "looped":
        return BODIES.get(name)
    return OPDEFS[func._schema.name]._init_fn if func._schema.name in OPDEFS else None


# Packages whose custom ops are Python and Triton.  Another's body may load a library that was made for the device.
OPENED = ("looped", "torch", "liger_kernel", "cut_cross_entropy")

Answers = dict[Any, Callable[..., Any]]  # by op: what a read of values returns, given the op's arguments


def is_page_locked(x: Tensor) -> bool:
    return getattr(x, "is_page_locked", False)


class Recorder(TorchDispatchMode):
    """Runs the custom ops of `OPENED` as the device would, and records every other op."""

    def __init__(self, record: Record, answers: Answers) -> None:
        super().__init__()
        self.record, self.answers, self.seen = record, answers, weakref.WeakSet()  # type: ignore[var-annotated]

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
        self.record.host_copies.append(f"tensor {tuple(x.shape)} made from numbers, {caller()}")
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    def free(self, n_bytes: int) -> None:
        self.record.live_bytes -= n_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if (body := body_of(func)) is not None:
            is_open = body.__module__.partition(".")[0] in OPENED
            return self.run_op(func, body, args, kwargs) if is_open else self.trust_op(func, args, kwargs)
        if func.namespace != "aten":  # questions to a tensor
            return func(*args, **kwargs)
        if self.is_of_host(args, kwargs):
            return self.run_on_host(func, args, kwargs)
        args, kwargs = tree_map(self.arrive, (args, kwargs))
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        if func in self.answers:
            self.record.host_copies.append(f"{func}, {caller()}")
            out = self.answers[func](*args, **kwargs)
        elif func is torch.ops.aten._fused_adamw_.tensor_lr:
            out = None  # PyTorch has no fake implementation; it works in place
        else:
            out = func(*args, **kwargs)
        operands, returned = tensors_of(*args, *kwargs.values()), tensors_of(out)
        for tensor in returned:
            self.watch(tensor)
        copies = "copy" in str(func)  # other ops take a number on the host along as an argument
        placed = [t for t in operands if copies or t.dim() > 0 or t.device.type == "cuda"]
        devices = {t.device.type for t in (*placed, *returned)}
        unwaited = func is torch.ops.aten.copy_.default and args[2:] == (True,) and is_page_locked(args[0])
        if "cuda" in devices and "cpu" in devices and not unwaited:
            self.record.host_copies.append(f"{func}, {caller()}")
        known = {id(t.untyped_storage()) for t in operands}
        views = returned and all(id(t.untyped_storage()) in known for t in returned) and not func._schema.is_mutable
        if "cuda" in devices and not views and "empty" not in str(func) and "detach" not in str(func):
            read = tensors_of(*args, *(value for name, value in kwargs.items() if name != "out"))
            self.record.calls.append(Call(str(func), traffic(func, read, returned), flops(func, args, out)))
        return out

    def is_of_host(self, args: tuple, kwargs: dict) -> bool:
        """Whether an op has no operand on the GPU; one without operands makes a tensor where it is told."""
        if tensors := tensors_of(*args, *kwargs.values()):
            return all(not isinstance(t, FakeTensor) and t.device.type == "cpu" for t in tensors)
        return torch.device(kwargs.get("device") or "cpu").type == "cpu"

    def run_on_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An op on the host's own tensors, which have values; or their copy to the GPU."""
        if torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with fake_tensor.unset_fake_temporarily():
                return func(*args, **kwargs)
        source = args[0]
        out = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=kwargs["device"])
        if not (kwargs.get("non_blocking") and is_page_locked(source)):
            self.record.host_copies.append(f"{func}, {caller()}")
        self.watch(out)
        self.record.calls.append(Call(str(func), out.nbytes, 0))
        return out

    def trust_op(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What the op's fake implementation says, recorded as one call that reads and writes its tensors once."""
        out = func(*args, **kwargs)
        operands, returned = tensors_of(*args, *kwargs.values()), tensors_of(out)
        for tensor in returned:
            self.watch(tensor)
        self.record.calls.append(Call(func._schema.name, bytes_of([*operands, *returned]), 0))
        return out

    def run_op(self, func: Any, body: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The op's real body, whose results must look as its fake implementation says."""
        expected = tensors_of(func(*args, **kwargs))
        with self:
            out = body(*args, **kwargs)
        for actual, fake in zip(tensors_of(out), expected, strict=True):
            told = [(t.shape, t.dtype, t.device) for t in (actual, fake)]
            assert told[0] == told[1], f"{func}: returns {told[0]}, its fake implementation {told[1]}"
        return out


def _compile_launch(record: Record, original: Callable) -> Callable:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel_name, arguments = self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            here = torch.device("cuda", torch.cuda.current_device())  # where Triton launches
            assert value.device == here, f"{name} is on {value.device}, and {kernel_name} launched on {here}"
        pointers = {name: Pointer(tensor) for name, tensor in tensors.items()}
        kernel = original(self, grid=grid, warmup=True, **arguments | pointers)
        constants = {k: v for k, v in arguments.items() if k.isupper() or k in ("num_warps", "num_stages")}
        dtypes = {name.removesuffix("_ptr"): str(t.dtype) for name, t in tensors.items()}
        found = Compiled(kernel, constants, dtypes)
        programs = tuple(grid(arguments) if callable(grid) else grid)
        record.kernels.setdefault((kernel_name, kernel.hash), found).grids.add(programs)
        numbers = arguments | {name: bytes_of([tensor]) for name, tensor in tensors.items()}
        record.calls.append(Call(kernel_name, launch_bytes(tensors, arguments), 0, programs, numbers))
        return kernel

    return run


def _stand_ins(target: Target, record: Record, autocast: Autocast) -> dict[str, Any]:
    """What PyTorch, Triton and this project ask of a GPU, by name, with `target`'s answers."""
    current = [0]

    @contextlib.contextmanager
    def on_device(device: torch.device | int) -> Iterator[None]:
        index = torch.device("cuda", device).index if isinstance(device, int) else device.index
        current.append(current[-1] if index is None else index)
        try:
            yield
        finally:
            current.pop()

    capability = (9, 4) if target.is_amd else divmod(target.triton.arch, 10)
    device = SimpleNamespace(
        name=target.name, multi_processor_count=target.multiprocessors, major=capability[0], minor=capability[1],
        L2_cache_size=4 << 20, total_memory=1 << 40,
    )  # fmt: skip
    return {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.is_bf16_supported": lambda **_: True,
        "torch.cuda.get_rng_state": lambda *_: torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.cuda.current_device": lambda: current[-1],
        "torch.cuda.device": on_device,
        "torch.cuda.get_device_properties": lambda *_: device,
        "torch.cuda.get_device_name": lambda *_: target.name,
        "torch.cuda.memory_allocated": lambda *_: record.live_bytes,
        "torch.cuda.max_memory_allocated": lambda *_: record.peak_bytes,
        "torch.cuda.reset_peak_memory_stats": lambda *_: setattr(record, "peak_bytes", record.live_bytes),
        "torch.accelerator.current_accelerator": lambda *_, **__: None,  # a build with CUDA asks the driver here
        "torch.cuda.Event": Event,
        **graph_patches(record),
        "torch.cuda.synchronize": lambda *_: record.host_copies.append(f"synchronize, {caller()}"),
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.version.hip": "6.4" if target.is_amd else None,
        "torch.Tensor.pin_memory": lock_pages,
        "torch.Tensor.to": numbered(torch.Tensor.to),
        "torch.Tensor.get_device": lambda tensor: tensor.device.index if tensor.device.type == "cuda" else -1,
        "torch.nn.Module._apply": apply,
        "torch.tensor": copied(torch.tensor),
        "torch.clear_autocast_cache": autocast.casts.clear,
        "torch.nn.functional.linear": autocast.linear,
        "torch.nn.functional.rms_norm": autocast.rms_norm,
        "torch.nn.functional.scaled_dot_product_attention": autocast.attention,
        "looped.block.is_plain": lambda _: True,  # fake tensors take the way of plain ones
        "looped.flash_attention.flash_2_serves": lambda _: False,
        "looped.flash_attention.flash_4_head_dim": lambda _: 0,
        "triton.runtime.jit.JITFunction.run": _compile_launch(record, JITFunction.run),
    }


@contextlib.contextmanager
def fake_gpu(target: Target, answers: Answers | None = None) -> Iterator[Record]:
    """Tensors on device "cuda" are fake ones on `target` while this lasts; yields the record of what runs there.

    A read of a tensor's values is an error, or, for an op in `answers`, answered by it and recorded as a host copy.
    """
    record = Record()
    with contextlib.ExitStack() as stack:
        for name, stand_in in _stand_ins(target, record, Autocast(record)).items():
            stack.enter_context(patch(name, stand_in))
        on_gpu = property(lambda tensor: tensor.fake_device.type == "cuda")
        stack.enter_context(patch.object(FakeTensor, "is_cuda", on_gpu, create=True))
        asked_by_c = {torch.ops.prim.device.default: lambda _: torch.device("meta")}
        stack.enter_context(patch.dict(fake_tensor._DISPATCH_META_HANDLERS, asked_by_c))
        previous = driver._active
        stack.callback(setattr, driver, "_active", previous)
        driver.set_active(StubDriver(target))
        stack.enter_context(FakeCUDA(allow_non_fake_inputs=True))
        stack.enter_context(Recorder(record, answers or {}))
        yield record
