"""The host's part of a call on a GPU, on a machine that has none: everything runs but the device.

Inside `host_only()` every tensor is an ordinary CPU tensor, but Python is told that it is on a GPU.  So the operations
of `looped.kernels` take their CUDA path: the same checks, custom ops, allocations, and launches.  A launch goes
through Triton's own code (binder, specialisation, cache of compiled kernels) up to the launcher, which does nothing.
No fake tensor takes part, because its dispatch would cost more than what is to be measured.

ATen's own operations do run, on the CPU.  With tensors of a few thousand elements they take microseconds, as the
launch of a CUDA kernel would.  What a Triton kernel should have written is whatever memory held before: values mean
nothing here.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.driver import driver

from bench.offline.fake_gpu import TARGETS, StubDriver, Target

CREATORS = ("arange", "as_tensor", "empty", "empty_like", "empty_strided", "full", "ones", "tensor", "zeros")


def _no_launch(*_: Any) -> None:
    """Stands where Triton's launcher, compiled C, would hand the kernel to the CUDA driver."""


class HostDriver(StubDriver):
    """`StubDriver`, whose kernels can be launched: the binary is not loaded, and the launcher does nothing."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.utils.load_binary = lambda *_: (0, 0, 0, 0, 1024)  # module, function, registers, spills, most threads
        self.launcher_cls = lambda source, metadata: _no_launch

    def get_current_device(self) -> int:
        return 2000  # Triton keeps compiled kernels by device: not those that another stub driver made


def _one_operation(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """F.rms_norm, one operation each way on a GPU and several on a CPU, by one that is one on both."""
    return F.layer_norm(x, shape, weight, None, eps)


def _product(
    a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None, mm: Any = torch.mm
) -> Tensor:
    """torch.mm. A CPU has no product of low precision that gives float32: one in its own dtype is formed, and lost."""
    return mm(a, b) if out_dtype is not None and out_dtype != a.dtype else mm(a, b, out=out)


def _added_product(
    total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, addmm: Any = torch.addmm, **given: Any
) -> Tensor:
    """torch.addmm, likewise."""
    return _product(a, b, out_dtype=out_dtype) if out_dtype not in (None, a.dtype) else addmm(total, a, b, **given)


def _on_cpu(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of torch that makes a tensor where it is told: here always on the CPU."""

    def created(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return create(*args, **kwargs)

    return created


def _staying(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.to, which moves nothing here, as all tensors are on one device."""

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, (torch.dtype, Tensor)):
                return move(tensor, arg)
        return tensor

    return to


@contextlib.contextmanager
def host_only(target: Target = TARGETS["sm_90"]) -> Iterator[None]:
    """Calls on CPU tensors take the host's path of calls on the GPU `target` while this lasts."""
    device = torch.device("cuda", 0)
    properties = SimpleNamespace(
        name=target.name, multi_processor_count=target.multiprocessors, major=target.triton.arch // 10,
        minor=target.triton.arch % 10, L2_cache_size=50 << 20, total_memory=80 << 30,
    )  # fmt: skip
    of_tensor: dict[str, Any] = {
        "is_cuda": property(lambda _: True),
        "device": property(lambda _: device),
        "to": _staying(Tensor.to),
    }
    of_cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": lambda: False,
        "_exchange_device": lambda _: 0,  # what torch.cuda.device calls on the way in and out
        "_maybe_exchange_device": lambda _: 0,
    }
    of_c = {"_cuda_getDevice": lambda: 0, "_cuda_getCurrentRawStream": lambda _: 0}
    threads, previous = torch.get_num_threads(), driver._active
    with contextlib.ExitStack() as stack:
        for name, stand_in in of_tensor.items():
            stack.enter_context(patch.object(Tensor, name, stand_in))
        for name, stand_in in of_cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        for name, stand_in in of_c.items():
            stack.enter_context(patch.object(torch._C, name, stand_in, create=True))
        for name in CREATORS:
            stack.enter_context(patch.object(torch, name, _on_cpu(getattr(torch, name))))
        stack.enter_context(patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None))
        stack.enter_context(patch.object(F, "rms_norm", _one_operation))
        stack.enter_context(patch.object(torch, "mm", _product))
        stack.enter_context(patch.object(torch, "addmm", _added_product))
        stack.enter_context(patch.object(torch, "_assert_async", lambda condition, _: condition.logical_not()))
        stack.callback(setattr, driver, "_active", previous)
        driver.set_active(HostDriver(target))
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        yield
