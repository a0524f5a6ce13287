"""Looped language models: one decoder stack applied K times, its states, and the losses that train them."""

from pathlib import Path as _Path

if not (_Path(__file__).parent / "kernels").is_dir():  # a checkout, where looped.kernels stands beside this package
    __path__.append(str(_Path(__file__).parent.parent))

from looped.attention import causal_attention
from looped.config import PRESETS, LoopedConfig, Positions, Readout
from looped.decoder import LoopedDecoder
from looped.supervision import LoopedLoss, Supervision, evaluation_losses, looped_loss, readout_logits

__all__ = [
    "PRESETS",
    "LoopedConfig",
    "LoopedDecoder",
    "LoopedLoss",
    "Positions",
    "Readout",
    "Supervision",
    "causal_attention",
    "evaluation_losses",
    "looped_loss",
    "readout_logits",
]
