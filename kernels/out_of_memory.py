"""What the readout does when memory runs out: it takes half as many rows of logits at a time, once, and says so.

The device's chunks stay at half from then on.  A second time the error goes to the caller.  So it does at once where
nothing may be repeated: while a CUDA graph is captured, and by one rank of a group, whose others would wait for it.
"""

import warnings

import torch

from .readout_call import ReadoutCall

_halved: dict[torch.device, int] = {}  # rows of a chunk, of devices whose memory has run out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory ran out, or the host's, which PyTorch reports as a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def within_memory(call: ReadoutCall, device: torch.device) -> ReadoutCall:
    """The call, its chunks no larger than its device has had memory for.

    A group's call stays as it is: all its ranks have the same chunks.
    """
    rows = _halved.get(device) if call.shard is None else None
    return call if rows is None or rows >= call.chunk_rows else call._replace(chunk_rows=rows)


def halve(error: RuntimeError, call: ReadoutCall, device: torch.device, n_rows: int) -> None:
    """Have the device's chunks be half of the call's.  Raises the error where that was done before, or is not allowed.

    n_rows: of all chunks together.
    """
    rows = min(call.chunk_rows, n_rows)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not is_out_of_memory(error) or device in _halved or capturing or call.shard is not None or rows < 2:
        raise error
    _halved[device] = rows // 2
    warnings.warn(
        f"memory of {device} ran out in the readout, with {rows} rows of logits at a time; it takes {rows // 2} "
        "from here on",
        RuntimeWarning,
        stacklevel=2,
    )
