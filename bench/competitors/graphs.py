"""A call as one CUDA graph: recorded once, then replayed without the host's part."""

from collections.abc import Callable
from typing import Any

import torch

from bench.measure.memory import peak_memory

WARM_UPS = 3  # on a stream of their own, as a capture needs: they allocate and compile


class Replay:
    """Replays a graph; what it returns is written over by the next replay.

    peak_bytes: temporary memory of the call, which the graph keeps for itself: a replay allocates nothing.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph, self.call = torch.cuda.CUDAGraph(), call
        self.peak_bytes, self.result = peak_memory(self._capture)

    def _capture(self) -> Any:
        with torch.cuda.graph(self.graph):
            return self.call()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result
