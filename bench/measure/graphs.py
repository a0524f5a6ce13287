"""A call as one CUDA graph: recorded once, then replayed without the host's part."""

from typing import Any

import torch

from bench.measure.memory import peak_memory
from bench.measure.timing import Call, Prepare

WARM_UPS = 3  # on a stream of their own, as a capture needs: they allocate and compile


class Replay:
    """Replays a graph; what it returns is written over by the next replay.

    prepare: makes the call that is recorded; it may run on the GPU itself, as the forward pass of a backward pass does.
    peak_bytes: temporary memory of the call, which the graph keeps for itself: a replay allocates nothing.
    """

    def __init__(self, prepare: Prepare) -> None:
        self.stream = torch.cuda.Stream()  # autograd runs a backward pass on the stream of the forward pass
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.call: Call = prepare()  # held, as the graph reads what it holds, such as a forward pass's results
            for _ in range(WARM_UPS):
                self.call()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        self.peak_bytes, self.result = peak_memory(self._capture)

    def _capture(self) -> Any:
        with torch.cuda.graph(self.graph, stream=self.stream):
            return self.call()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result
