"""The rules that the arguments of the ops obey, and the one layout that the readout ops work on."""

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from .device import uses_triton

Readout = Literal["rmsnorm", "layernorm", "raw", "final-only"]
States = Tensor | Sequence[Tensor]
OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)
FLOAT32_MAX = torch.finfo(torch.float32).max
INT64 = torch.iinfo(torch.int64)
MAX_COLUMNS = 32768  # a program holds a row of a state: up to 4096 columns in registers, of more some may spill


def _shown(value: object) -> str:
    """A value in an error's one line."""
    return f"{' '.join(repr(value).split()):.80}"


def check_values(name: str, x: Tensor) -> None:
    """Raise unless x is a tensor of a floating dtype that the kernels take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor. Got {type(x).__name__}.")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor. Got {x.layout}.")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) and not (
        x.dtype == torch.float64 and not uses_triton(x)
    ):
        raise TypeError(f"{name} must be float32, bfloat16 or float16 (float64 on CPU). Got {x.dtype}.")


def check_rows(name: str, x: Tensor) -> None:
    """Raise unless x is a floating tensor [..., d] that the row kernels take."""
    check_values(name, x)
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_COLUMNS:
        raise ValueError(f"{name} must have shape [..., d] with 1 <= d <= {MAX_COLUMNS}. Got {tuple(x.shape)}.")


def _is_floating(x: object) -> bool:
    """Whether x is a dense tensor of a floating dtype that there is arithmetic in: none has it in 8 bits."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.itemsize > 1 and x.layout == torch.strided


def _kind(x: object) -> str:
    """For an error: a tensor's dtype and layout, or the type of what is no tensor."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{x.dtype}" if x.layout == torch.strided else f"{x.dtype}, {x.layout}"


def check_vector(name: str, vector: Tensor | None, like: Tensor, length: int) -> None:
    """Raise unless `vector` is None or a floating [length] on the device of `like`."""
    if vector is None:
        return
    if not _is_floating(vector):
        raise TypeError(f"{name} must be a dense floating tensor. Got {_kind(vector)}.")
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},). Got {tuple(vector.shape)}.")
    if vector.device != like.device:
        raise ValueError(f"{name} must be on {like.device}. Got {vector.device}.")


def check_number(name: str, value: object, low: float, high: float = FLOAT32_MAX, *, above: bool = False) -> None:
    """Raise unless value is a number in [low, high], or above low; without limits, one that float32 holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number. Got {_shown(value)}.")
    if not (low < value if above else low <= value) or not value <= high:
        bound = "" if low == -FLOAT32_MAX else f" and {'>' if above else '>='} {low:g}"
        rule = f"finite{bound}" if high == FLOAT32_MAX else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {rule}. Got {value}.")


def check_scalar(name: str, value: object, like: Tensor) -> None:
    """Raise unless value is a number >= 0, or a tensor [] on the device of `like`, whose value is not looked at."""
    if not isinstance(value, Tensor):
        check_number(name, value, 0)
    elif value.dim() > 0 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be a number or a real tensor []. Got {value.dtype} {tuple(value.shape)}.")
    elif value.device != like.device:
        raise ValueError(f"{name} must be on the states' device {like.device}. Got {value.device}.")


def check_integer(name: str, value: object, low: int, high: int, or_none: str = "") -> None:
    """Raise unless value is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer{or_none}. Got {_shown(value)}.")
    if not low <= value <= high:
        rule = f">= {low}" if value < low and low > INT64.min else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {rule}. Got {value}.")


def as_rows(states: States) -> tuple[list[Tensor], torch.Size]:
    """`states` as [one [K, N, d]] or as [K times [N, d]], never stacked by a copy, and the tokens' shape [...]."""
    if isinstance(states, Tensor):
        check_rows("states", states)
        if states.dim() < 2 or states.shape[0] == 0:
            raise ValueError(f"states must have shape [K, ..., d] with K >= 1. Got {tuple(states.shape)}.")
        shape = states.shape[1:-1]
        return [states.reshape(states.shape[0], shape.numel(), states.shape[-1])], shape
    if not isinstance(states, Sequence) or len(states) == 0:
        got = "an empty sequence" if isinstance(states, Sequence) else type(states).__name__
        raise ValueError(f"states must be a tensor [K, ..., d] or a sequence of K >= 1 tensors. Got {got}.")
    for loop, state in enumerate(states):
        check_rows(f"states[{loop}]", state)
        for what in ("shape", "dtype", "device"):
            if getattr(state, what) != getattr(states[0], what):
                raise ValueError(
                    f"states must all have one {what}. Got {getattr(states[0], what)} for states[0] and "
                    f"{getattr(state, what)} for states[{loop}]."
                )
    shape = states[0].shape[:-1]
    return [state.reshape(shape.numel(), state.shape[-1]) for state in states], shape


def check_tensors(rows: list[Tensor], shape: torch.Size, head: Tensor, targets: Tensor) -> None:
    """Raise unless head [V, d] and targets [...] fit the states."""
    h = rows[0]
    if not _is_floating(head):
        raise TypeError(f"head must be a dense floating tensor. Got {_kind(head)}.")
    if head.dim() != 2 or head.shape[0] < 1 or head.shape[1] != h.shape[-1]:
        raise ValueError(f"head must have shape [V, {h.shape[-1]}] with V >= 1. Got {tuple(head.shape)}.")
    if head.device != h.device:
        raise ValueError(f"head must be on the states' device {h.device}. Got {head.device}.")
    if (head.dtype == torch.float64) != (h.dtype == torch.float64):
        raise TypeError(f"head and states must both be float64 or neither. Got {head.dtype} and {h.dtype}.")
    if (
        not isinstance(targets, Tensor)
        or targets.dtype not in (torch.int64, torch.int32)
        or targets.layout != torch.strided
    ):
        raise TypeError(f"targets must be a dense int64 or int32 tensor. Got {_kind(targets)}.")
    if targets.shape != shape:
        raise ValueError(f"targets must have the tokens' shape {tuple(shape)}. Got {tuple(targets.shape)}.")
    if targets.device != h.device:
        raise ValueError(f"targets must be on the states' device {h.device}. Got {targets.device}.")


def check_range(targets: Tensor, n_columns: int, ignore_index: int, in_range: Tensor | None) -> None:
    """Raise where a target is out of range; on a GPU by an assertion on the device, without waiting for it.

    in_range: [] bool, whether all are in range, where a kernel has looked, as it always has on a GPU.
    """
    rule = f"targets must be in [0, {n_columns}) or ignore_index={ignore_index}."
    if targets.is_cuda and in_range is not None:
        torch._assert_async(in_range, rule)
        return
    bad = ((targets < 0) | (targets >= n_columns)) & (targets != ignore_index)
    if bad.any():
        raise ValueError(f"{rule} Got {targets[bad][0].item()}.")


def check_readout(readout: str, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, h: Tensor) -> None:
    """Raise unless the readout is known and its norm's parameters fit it."""
    if readout not in get_args(Readout):
        raise ValueError(f"readout must be one of {', '.join(get_args(Readout))}. Got {_shown(readout)}.")
    check_vector("norm_weight", norm_weight, h, h.shape[-1])
    check_vector("norm_bias", norm_bias, h, h.shape[-1])
    check_number("eps", eps, 0)
    if readout == "raw" and norm_weight is not None:
        raise ValueError("norm_weight must be None for readout='raw', which has no norm. Got a tensor.")
    if readout != "layernorm" and norm_bias is not None:
        raise ValueError(f"norm_bias must be None unless readout='layernorm'. Got a tensor for readout={readout!r}.")


def check_options(
    h: Tensor, *, penalty: float | Tensor, label_smoothing: float, softcap: float | None, z_loss: float | Tensor,
    reduction: str, n_targets: float | Tensor | None, chunk_rows: int | None, ignore_index: int,
) -> None:  # fmt: skip
    """Raise unless every option of a loss of states like h is of its kind and in its range."""
    check_scalar("penalty", penalty, h)
    check_scalar("z_loss", z_loss, h)
    check_number("label_smoothing", label_smoothing, 0, 1)
    if softcap is not None:
        check_number("softcap", softcap, 0, above=True)
    check_integer("ignore_index", ignore_index, INT64.min, INT64.max)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none. Got {_shown(reduction)}.")
    if reduction == "none" and (isinstance(penalty, Tensor) or penalty > 0):
        raise ValueError(f"penalty is added to a sum and must be 0 for reduction='none'. Got {penalty}.")
    if n_targets is not None:
        check_scalar("n_targets", n_targets, h)
        if reduction != "mean":
            raise ValueError(f"n_targets divides a mean and must be None for reduction={reduction!r}. Got {n_targets}.")
    if chunk_rows is not None:
        check_integer("chunk_rows", chunk_rows, 1, 2**31 - 1, " or None")


def check_weights(weights: Tensor | Sequence[float] | None, n_loops: int, shape: torch.Size, h: Tensor) -> None:
    """Raise unless weights are [K] or [K, ...] on the states' device, or K numbers."""
    if weights is None:
        return
    if isinstance(weights, Tensor):
        if not _is_floating(weights):
            raise TypeError(f"weights must be a dense floating tensor or numbers. Got {_kind(weights)}.")
        if weights.shape not in ((n_loops,), (n_loops, *shape)):
            expected = f"({n_loops},) or {(n_loops, *shape)}"
            raise ValueError(f"weights must have shape {expected}. Got {tuple(weights.shape)}.")
        if weights.device != h.device:
            raise ValueError(f"weights must be on the states' device {h.device}. Got {weights.device}.")
        return
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"weights must be a tensor, a sequence of numbers or None. Got {_shown(weights)}.")
    if len(weights) != n_loops:
        raise ValueError(f"weights must have one number for each of the {n_loops} loops. Got {len(weights)}.")
    for loop, weight in enumerate(weights):
        check_number(f"weights[{loop}]", weight, -FLOAT32_MAX)
    if not any(weights):
        raise ValueError(f"weights must have a number other than 0. Got {list(weights)}.")


def gathered(tensor: OptionalTensor) -> OptionalTensor:
    """A sharded parameter (FSDP2, tensor parallel) as a whole; its gradient goes back averaged over ranks.

    The mean is what FSDP2 makes of its own parameters' gradients, and right for ranks that hold the same rows.
    """
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Partial  # slow to import, and who has one has imported it

    if isinstance(tensor, DTensor):
        return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
    return tensor
