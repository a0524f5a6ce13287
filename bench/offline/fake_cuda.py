"""What a CUDA build of PyTorch has and a CPU build has not, imitated for fake_gpu.py, which puts it in place."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.offline.record import Call, Record, bytes_of, caller


class Autocast:
    """Autocast and kernel choice of a CUDA build for what Python calls: F.linear, F.rms_norm and attention."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}  # of leaves, as autocast keeps them
        self.plain_linear, self.plain_attention = F.linear, F.scaled_dot_product_attention
        self.plain_rms_norm = F.rms_norm

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

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        q, k, v = self.cast(q), self.cast(k), self.cast(v)
        if attn_mask is not None:
            return self.plain_attention(q, k, v, attn_mask, dropout_p, is_causal)
        if q.dtype == torch.float32 or q.shape[-1] > 256:
            return self.plain_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

    def rms_norm(self, x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not x.is_cuda:  # the host's own tensors have values
            return self.plain_rms_norm(x, shape, weight, eps)
        y: Tensor = FusedRMSNorm.apply(x, weight, self.record)  # type: ignore[no-untyped-call]
        return y


class FusedRMSNorm(torch.autograd.Function):
    """The launches of a CUDA build's RMSNorm of the last dimension: y and rstd; dx; dweight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, record: Record) -> Tensor:
        y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], device=x.device)
        vectors = [rstd] if weight is None else [rstd, weight]
        record.calls.append(Call("_fused_rms_norm", bytes_of([x, y, *vectors]), 0))
        ctx.record = record
        ctx.save_for_backward(x, *vectors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, rstd, *weight = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight[0]) if weight else None
        ctx.record.calls.append(Call("_fused_rms_norm_backward dx", bytes_of([dy, x, rstd, *weight, dx]), 0))
        if dweight is not None:
            ctx.record.calls.append(Call("_fused_rms_norm_backward dweight", bytes_of([dy, x, rstd, dweight]), 0))
        return dx, dweight, None


class Event:
    """torch.cuda.Event: when the host recorded it, as nothing runs on the device."""

    def __init__(self, **_: Any) -> None:
        self.milliseconds = 0.0

    def record(self) -> None:
        self.milliseconds = time.perf_counter() * 1e3

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return later.milliseconds - self.milliseconds


class Graph:
    """torch.cuda.CUDAGraph: the calls of its capture, which a replay records again."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.calls: list[Call] = []

    @contextlib.contextmanager
    def capture(self, pool: Any = None, stream: Any = None) -> Iterator[None]:
        """torch.cuda.graph: it waits for the device once, and what is captured must not."""
        self.record.host_copies.append(f"capture, {caller()}")
        n_calls, n_waits = len(self.record.calls), len(self.record.host_copies)
        yield
        if self.record.host_copies[n_waits:]:
            raise RuntimeError(f"operation not permitted when stream is capturing: {self.record.host_copies[n_waits]}")
        self.calls = self.record.calls[n_calls:]
        del self.record.calls[n_calls:]

    def replay(self) -> None:
        self.record.calls += self.calls


class Stream:
    """torch.cuda.Stream: there is one order of everything."""

    def wait_stream(self, other: "Stream") -> None:
        pass


def graph_patches(record: Record) -> dict[str, Any]:
    """What the capture of a CUDA graph calls."""
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)

    class RecordingGraph(Graph):  # a class, as libraries annotate with it
        def __init__(self) -> None:
            super().__init__(record)

    return {
        "torch.cuda.CUDAGraph": RecordingGraph,
        "torch.cuda.graph": Graph.capture,
        "torch.cuda.graph_pool_handle": object,
        "torch.cuda.Stream": Stream,
        "torch.cuda.current_stream": Stream,
        "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
        "torch.cuda.default_generators": [generator],
    }


def lock_pages(tensor: Tensor) -> Tensor:
    """Tensor.pin_memory, which a build without CUDA refuses."""
    tensor.is_page_locked = True  # type: ignore[attr-defined]
    return tensor


def numbered(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.to, which asks a build without CUDA for the number of the current GPU where none is given."""

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def number(x: Any) -> Any:
            return torch.device("cuda", torch.cuda.current_device()) if x in ("cuda", torch.device("cuda")) else x

        return original(tensor, *map(number, args), **{name: number(x) for name, x in kwargs.items()})

    return to


def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, by which modules are moved and cast: with new parameters, as fake ones cannot be exchanged."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(change(parameter.detach()), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, change(buffer))
    return module


def copied(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, whose own copy to a device is made below Python."""

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        copy = original(data, **kwargs)
        return copy if device is None else copy.to(device)

    return tensor
