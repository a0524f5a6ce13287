"""Which implementation a tensor takes, and in which dtype its sums are kept."""

import torch
import triton


def uses_triton(tensor: torch.Tensor) -> bool:
    """True for CUDA and ROCm tensors; under TRITON_INTERPRET=1 for CPU tensors too."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and bool(triton.knobs.runtime.interpret))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: float32, and float64 for float64 (CPU only)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast decides now in which dtype a matrix product of `tensor` runs."""
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `tensor` runs now: autocast's, or its own."""
    return torch.get_autocast_dtype(tensor.device.type) if autocasts(tensor) else tensor.dtype
