"""Looped language models: one decoder stack applied K times, its states, and the losses that train them."""

from looped.checkout import search_path as _search_path

__path__ = _search_path()  # where looped.kernels is found, in a checkout too

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
