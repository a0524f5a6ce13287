"""The shape of a looped decoder, checked when it is made, and the presets."""

import math
import sys
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

Readout = Literal["rmsnorm", "layernorm", "raw", "final-only"]
Positions = Literal["learned", "rotary"]
Injection = Literal["none", "add", "concat", "diagonal"]
Start = Literal["embedding", "zero", "noise"]
BlockNorm = Literal["pre", "sandwich", "sandwich-sum"]
LARGEST = 1 << 24  # of any size, so that no product of two overflows
MOST = 1 << 12  # blocks and loops: each takes its time


@dataclass(frozen=True, kw_only=True)
class LoopedShape:
    """What a model is made of, without its vocabulary and its length. Each field is an option of training too."""

    n_loops: int = 4
    """K, how often the stack is applied. Inference may use any number."""
    d_model: int
    """Channels of a state."""
    n_heads: int
    """Attention heads; must divide d_model."""
    n_layers: int
    """Blocks in the stack."""
    d_ff: int
    """Hidden channels of SwiGLU, which has three [d_ff, d_model] matrices."""
    dropout: float = 0.1
    """Dropout probability, on the embeddings, the attention weights and the output of the MLP."""
    readout: Readout = "rmsnorm"
    """What is done to a state before the head. rmsnorm and layernorm normalise every loop, raw none; final-only is
    RMSNorm at the last loop and nothing before."""
    inter_loop_norm: bool = False
    """Normalise the state between loops (the scale-removing recurrence), with a weight of its own. The readout sees the
    state before that."""
    tied: bool = True
    """The head is the token embedding."""
    positions: Positions = "learned"
    """Learned absolute positions, added once before the first loop, or rotary ones in every attention."""
    n_prelude: int = 0
    """Blocks before the loops, applied once. E is what they make of the embeddings."""
    n_coda: int = 0
    """Blocks between a loop's state and its readout. What they make of it is read and not fed back."""
    injection: Injection = "none"
    """What enters loop k beside the state H: H + E (add), W [H; E] (concat), or a H + b E with a and b for each channel
    and 0 < a < 1 (diagonal)."""
    start: Start = "embedding"
    """What the first loop starts from: E, zero, or noise (which is zero outside training)."""
    block_norm: BlockNorm = "pre"
    """A norm before every sublayer; with sandwich one of its output too, with sandwich-sum one of the sum."""
    loop_embedding: bool = False
    """Add a learned vector to what enters each loop; loops beyond n_loops share the last one's."""
    loop_rank: int = 0
    """Rank r of a learned update U_k V_k H of what enters loop k; 0 for none. Loops beyond n_loops share the last's."""
    exit_gate: bool = False
    """A gate that says for every loop and token how probable it is to stop there. Gated supervision turns it on."""


@dataclass(frozen=True, kw_only=True)
class LoopedConfig(LoopedShape):
    """A whole model: its shape, and the fields that training takes from elsewhere.

    Raises TypeError if a field has the wrong type and ValueError if its value breaks a rule, naming the field, the
    rule and the value.
    """

    vocab_size: int
    """V, rows of the token embedding and of the head."""
    max_seq_len: int
    """Rows of the learned position table; with rotary positions a sequence may be longer."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-6
    """eps of every norm, added to the mean square (to the variance in LayerNorm)."""
    embedding_std: float = 1.0
    """Standard deviation of the initial token embeddings and learned positions."""

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                most = MOST if field.name in ("n_loops", "n_layers", "n_prelude", "n_coda") else LARGEST
                _check_size(field.name, value, least=0 if field.default == 0 else 1, most=most)
            elif field.type is float:
                _check_finite(field.name, value)
            elif field.type is bool and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False. Got {field.name}={value!r}.")
            elif get_origin(field.type) is Literal and value not in get_args(field.type):
                choices = ", ".join(get_args(field.type))
                raise ValueError(f"{field.name} must be one of {choices}. Got {field.name}={value!r}.")
        if self.start != "embedding" and self.injection == "none":
            raise ValueError(
                f"start must be embedding with injection=none: the loops would see no token. Got start={self.start!r}."
            )
        if self.loop_rank > self.d_model:
            raise ValueError(f"loop_rank must be at most d_model={self.d_model}. Got loop_rank={self.loop_rank}.")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model must be divisible by n_heads. Got d_model={self.d_model}, n_heads={self.n_heads}."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                "the head size d_model / n_heads must be even with rotary positions. "
                f"Got {self.head_dim} (d_model={self.d_model}, n_heads={self.n_heads})."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1). Got dropout={self.dropout}.")
        for name in ("rope_theta", "norm_eps", "embedding_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0. Got {name}={getattr(self, name)}.")


def at_least(least: int, **values: float | None) -> None:
    """Raise ValueError for the first value below ``least``, or nan, by its name. None is left alone."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}. Got {name}={value}.")


def _check_size(name: str, value: object, *, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer. Got {name}={value!r}.")
    at_least(least, **{name: value})
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}. Got {name}={value}.")


def _check_finite(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number. Got {name}={value!r}.")
    if not abs(value) <= sys.float_info.max:  # nan, or an int that no float holds
        raise ValueError(f"{name} must be finite. Got {name}={value}.")


PRESETS: dict[str, LoopedConfig] = {
    # Trains on two CPU cores in minutes. Its embedding starts at 0.02, not at the paper's N(0, 1): with a tied head
    # and N(0, 1) the first loss is in the hundreds, and a short run would show little but the way down from there.
    # No dropout: a few minutes on fresh windows do not overfit, and on a CPU the random numbers cost more than the
    # matrix multiplications at this size.
    "demo": LoopedConfig(
        vocab_size=4096,
        d_model=128,
        n_heads=4,
        n_layers=4,
        d_ff=512,
        max_seq_len=128,
        dropout=0.0,
        embedding_std=0.02,
    ),
    # The two models of Sharma & Vu (arXiv 2606.24898): 43,934,208 and 128,822,016 parameters.
    "paper-44m": LoopedConfig(
        vocab_size=20_000,
        d_model=512,
        n_heads=8,
        n_layers=8,
        d_ff=2048,
        max_seq_len=256,
    ),
    "paper-129m": LoopedConfig(
        vocab_size=20_000,
        d_model=768,
        n_heads=12,
        n_layers=12,
        d_ff=3072,
        max_seq_len=256,
    ),
    # Ouro-1.4B (arXiv 2510.25741): its norm after every loop is fed back and read.
    "ouro-1.4b": LoopedConfig(
        vocab_size=49_152,
        d_model=2048,
        n_heads=16,
        n_layers=24,
        d_ff=5632,
        max_seq_len=4096,
        dropout=0.0,
        inter_loop_norm=True,
        tied=False,
        positions="rotary",
        rope_theta=1_000_000.0,
        block_norm="sandwich",
        embedding_std=0.02,
    ),
    # Huginn (arXiv 2502.05171) in shape, a fifth of its width: 2 blocks before, 4 in the loop, 2 after.
    "huginn-small": LoopedConfig(
        vocab_size=65_536,
        d_model=1024,
        n_heads=16,
        n_layers=4,
        d_ff=3456,
        max_seq_len=4096,
        dropout=0.0,
        n_loops=32,
        positions="rotary",
        rope_theta=50_000.0,
        n_prelude=2,
        n_coda=2,
        injection="concat",
        start="noise",
        block_norm="sandwich-sum",
        embedding_std=math.sqrt(2 / 5),
    ),
    # Parcae-140M (arXiv 2604.12946) in shape. Its MLP is ReLU^2 of 3072 channels, which has as many parameters as
    # SwiGLU of 2048; its norms of q and k and of the prelude's output are not built.
    "parcae-140m": LoopedConfig(
        vocab_size=32_768,
        d_model=768,
        n_heads=6,
        n_layers=2,
        d_ff=2048,
        max_seq_len=2048,
        dropout=0.0,
        n_loops=8,
        positions="rotary",
        n_prelude=2,
        n_coda=2,
        injection="diagonal",
        start="noise",
        norm_eps=1e-5,
        embedding_std=0.02,
    ),
    # The tasks p-hop and addition (train/tasks/), small enough for a CPU core: one layer, so a loop is one look-up.
    # What a look-up has found can be looked up again once it has the scale of an embedding, which is what the norm
    # between loops is for: without it, trials of 500 and 1,250 steps stayed at two hops.
    "p-hop": LoopedConfig(
        vocab_size=8,
        d_model=64,
        n_heads=2,
        n_layers=1,
        d_ff=128,
        max_seq_len=40,
        dropout=0.0,
        inter_loop_norm=True,
        tied=False,
        embedding_std=0.02,
    ),
    "addition": LoopedConfig(
        vocab_size=11,
        d_model=64,
        n_heads=4,
        n_layers=1,
        d_ff=128,
        max_seq_len=19,
        dropout=0.0,
        inter_loop_norm=True,
        tied=False,
        embedding_std=0.02,
    ),
}
