"""CUDA graphs: the kernels of a call, captured once, are launched together, without the host's time for each of them.

``launch(function, *arguments)`` is either `eagerly`, which calls the function, or a `CudaGraphs`. Whoever launches
takes either; both do the same to the device.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

WARM_UP = 3  # eager calls before a capture, in which kernels are compiled and libraries set up

Result = TypeVar("Result")


class Launch(Protocol):
    """Calls a function that works on the device, or has the device do what it did before."""

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result: ...


def eagerly(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)


@dataclass(frozen=True)
class _Captured:
    """A graph, the buffers that it reads its tensors from, and what it writes its result to."""

    graph: torch.cuda.CUDAGraph
    buffers: list[Tensor]
    result: Any


class CudaGraphs:
    """One graph for each function, shapes of its tensors and values of its other arguments, such as a step's depth.

    The first `WARM_UP` calls of each run eagerly, on a side stream, as a capture needs it. The next one is captured,
    and every call from then on is a replay. A capture computes nothing, so that each call has its effect exactly once.
    What is not an argument, such as weights, is read and written where it was when captured.

    A result is overwritten by the next call of any function. All graphs share one pool of memory: no two run at a time.

    After an error while capturing, functions run eagerly; `refusal` says why.
    """

    def __init__(self, device: torch.device) -> None:
        self.refusal: str | None = None
        self._device = device
        self._calls: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured] = {}
        with torch.cuda.device(device):
            self._aside = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result:
        if self.refusal is not None:
            return function(*arguments)
        key = (function, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in arguments))
        with torch.cuda.device(self._device):
            if key not in self._captured:
                self._calls[key] += 1
                if self._calls[key] <= WARM_UP or not self._capture(key, function, arguments):
                    return self._run_aside(function, arguments)
            captured = self._captured[key]
            tensors = (x for x in arguments if isinstance(x, Tensor))
            for buffer, tensor in zip(captured.buffers, tensors, strict=True):
                buffer.copy_(tensor)
            captured.graph.replay()
            return captured.result

    def _run_aside(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        current = torch.cuda.current_stream()
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside):
            result = function(*arguments)
        current.wait_stream(self._aside)
        return result

    def _capture(self, key: Hashable, function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
        """Whether the call could be captured. If not, the random generator is as it was, and no longer captured."""
        copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        try:
            # An error leaves torch.cuda.graph on its own stream; the outer context comes back from it.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
                result = function(*copies)
        except RuntimeError as error:
            generator.graphsafe_set_state(state)
            self.refusal = re.sub(r"\s+", " ", str(error))[:200]
            print(f"no CUDA graph: {self.refusal}; kernels are launched one by one", flush=True)
            return False
        self._captured[key] = _Captured(graph, [x for x in copies if isinstance(x, Tensor)], result)
        return True
