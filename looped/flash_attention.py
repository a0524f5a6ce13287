"""Which implementation of causal attention serves, decided by what is installed and never by trying to import it.

flash-attn 2 and flash-attn 4 share the import name `flash_attn`: the wheel of flash-attn 4 has `flash_attn/cute` and no
`flash_attn/__init__.py`, and `import flash_attn` succeeds. The distributions' names and versions tell them apart.

    dropout       flash-attn 2; else PyTorch's scaled_dot_product_attention (SDPA); on a CPU looped/dropout.py
    no dropout    SDPA, where FlashAttention-3 or 4 is activated in it; flash-attn 4; flash-attn 2; SDPA

`torch.nn.attention.activate_flash_attention_impl` puts FlashAttention-3 or 4 into SDPA for the whole process, where
they then refuse dropout. So a program may do that and this library does not; it keeps dropout away from them.
flash-attn 4 is not one operation to torch.compile and serves outside of it alone.
"""

import functools
import importlib
import importlib.metadata
import re

import torch
from torch.nn.attention import current_flash_attention_impl

from looped.kernels.device import constant_in_graphs

HALF = (torch.float16, torch.bfloat16)
FLASH_2, FLASH_4, SDPA = "flash-attn 2", "flash-attn 4", "PyTorch's scaled_dot_product_attention"
DISTRIBUTIONS = {FLASH_2: "flash-attn", FLASH_4: "flash-attn-4"}
MODULES = {FLASH_2: "flash_attn", FLASH_4: "flash_attn.cute"}


def attention_implementation(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, *, compiled: bool = False
) -> str:
    """What serves `causal_attention` of such tensors, with its version: for a log.

    dtype: of the queries, under autocast its dtype. compiled: inside torch.compile.
    Raises ImportError in one line if flash-attn should serve and cannot be imported.
    """
    if device.type == "cpu" and dropout > 0:
        return "blocks with dropout, on the CPU"
    name = SDPA
    if qualifies_for_flash_attention(device.type == "cuda", dtype, head_dim):
        name = flash_implementation(device, head_dim, dropout, compiled)
    if name != SDPA:
        return f"{DISTRIBUTIONS[name]} {importlib.metadata.version(DISTRIBUTIONS[name])}"
    active = None if device.type == "cpu" or dropout > 0 else current_flash_attention_impl()
    return SDPA if active is None else f"{SDPA}, {active} activated"


def qualifies_for_flash_attention(is_cuda: bool, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash-attn's kernels take tensors of this device, dtype and head size."""
    return is_cuda and dtype in HALF and head_dim <= 256 and head_dim % 8 == 0


def flash_implementation(device: torch.device, head_dim: int, dropout: float, compiled: bool) -> str:
    """FLASH_2, FLASH_4 or SDPA, for tensors that qualify. Raises ImportError if that installation is broken."""
    if dropout == 0:
        if sdpa_has_flash_3_or_4():
            return SDPA
        if not compiled and head_dim <= flash_4_head_dim(device):
            return FLASH_4
    return FLASH_2 if flash_2_serves(device) else SDPA


# Constants for torch.compile, which traces neither imports nor metadata -----------------------------------------------


@constant_in_graphs
def sdpa_has_flash_3_or_4() -> bool:
    """Whether FlashAttention-3 or 4 is activated in SDPA, which then refuses dropout."""
    return current_flash_attention_impl() is not None


@constant_in_graphs
def flash_2_serves(device: torch.device) -> bool:
    """Whether flash-attn 2 is installed and has code for this GPU."""
    return _flash_2_serves(device)


@constant_in_graphs
def flash_4_head_dim(device: torch.device) -> int:
    """The largest head that flash-attn 4 differentiates on this GPU; 0 where it is not installed or does not serve."""
    return _flash_4_head_dim(device)


@functools.cache
def _flash_2_serves(device: torch.device) -> bool:
    # It is compiled for 8.0 and 9.0, and since 2.7.3 with CUDA 12.8 for 10.0 and 12.0; a GPU runs code for its own
    # major capability alone. AMD's builds are for the GPU that they were made on.
    version, major = _release(FLASH_2), torch.cuda.get_device_capability(device)[0]
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    if torch.version.hip is not None or major in (8, 9):
        serves = version >= (2,)
    else:
        serves = major in (10, 12) and version >= (2, 7, 3) and cuda >= (12, 8)
    return serves and _check_import(FLASH_2)


@functools.cache
def _flash_4_head_dim(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0]
    serves = torch.version.hip is None and major >= 9 and _release(FLASH_4) >= (4,) and _check_import(FLASH_4)
    return (256 if major == 9 else 128) if serves else 0


def _release(name: str) -> tuple[int, ...]:
    """(2, 8, 3) of an installed "2.8.3.post1"; () if nothing is installed or it is of another generation."""
    try:
        text = importlib.metadata.version(DISTRIBUTIONS[name])
    except importlib.metadata.PackageNotFoundError:
        return ()
    release = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    return release if release[:1] == (int(name[-1]),) else ()


def _check_import(name: str) -> bool:
    """True, or ImportError in one line: what is installed for this GPU must work, or the user wants to know."""
    try:
        return callable(importlib.import_module(MODULES[name]).flash_attn_func)
    except Exception as error:  # any: of a library compiled for another torch
        version = importlib.metadata.version(DISTRIBUTIONS[name])
        raise ImportError(
            f"{DISTRIBUTIONS[name]} must be importable where it is installed; install it anew or uninstall it. "
            f"Got {DISTRIBUTIONS[name]} {version} with torch {torch.__version__}, and {error!r}."
        ) from error
