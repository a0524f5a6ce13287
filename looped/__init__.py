"""Looped language models: one decoder stack applied K times, its states, and the losses that train them.

    model = LoopedLM(PRESETS["demo"])
    output = model(tokens, targets)  # tokens, targets: [B, T] int64
    output.loss.backward()

config -> block (attention, SwiGLU) -> recurrence (tokens to states H_1..H_K) -> model (states to loss, logits,
statistics) -> generate (more tokens). Each is a file or a folder; implementation.py says what is fused and what the
same is in plain PyTorch.
"""

from looped.checkout import search_path as _search_path

__path__ = _search_path()  # where looped.kernels is found, in a checkout too

from looped.attention import causal_attention
from looped.capture import Captured, capture
from looped.config import PRESETS, LoopedConfig, LoopedShape, Positions, Readout
from looped.model import LoopedLM, LoopedOutput
from looped.patch import Patched, patch
from looped.supervision import IGNORE_INDEX, Gated, Supervision

__all__ = [
    "IGNORE_INDEX",
    "PRESETS",
    "Captured",
    "Gated",
    "LoopedConfig",
    "LoopedLM",
    "LoopedOutput",
    "LoopedShape",
    "Patched",
    "Positions",
    "Readout",
    "Supervision",
    "capture",
    "causal_attention",
    "patch",
]
