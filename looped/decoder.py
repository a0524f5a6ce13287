"""The looped decoder: tokens -> embedding -> K passes through one stack of blocks -> states H_1..H_K."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looped.attention import SelfAttention, rotary_table
from looped.config import LoopedConfig
from looped.dropout import dropout
from looped.kernels import rms_norm_penalty
from looped.kernels.device import product_autocast

Rotary = tuple[Tensor, Tensor] | None


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) * w3 x)`, no biases."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """`x + Attn(RMSNorm(x))`, then `x + Dropout(SwiGLU(RMSNorm(x)))`.

    The residual stream travels as a pair (x, delta) whose sum it is, so that each addition can be done by the norm
    that reads its result. delta is None at the start of a loop.
    """

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, delta: Tensor | None, rotary: Rotary, fused: bool) -> tuple[Tensor, Tensor]:
        normalised, x = add_and_normalise(x, delta, self.attention_norm, fused)
        normalised, x = add_and_normalise(x, self.attention(normalised, rotary), self.mlp_norm, fused)
        return x, dropout(self.mlp(normalised), self.dropout if self.training else 0.0)


def add_and_normalise(x: Tensor, delta: Tensor | None, norm: nn.RMSNorm, fused: bool) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + delta), x + delta), each [B, T, d]; the sum keeps x's dtype. Fused: one kernel for both."""
    if not fused:
        x = x if delta is None else x + delta
        return norm(x), x
    assert norm.eps is not None
    if delta is None:
        return rms_norm_penalty(x, norm.weight, eps=norm.eps).y, x
    normalised, _, total = rms_norm_penalty(delta, norm.weight, eps=norm.eps, residual=x)
    assert total is not None  # a residual was given
    return normalised, total


class LoopedDecoder(nn.Module):
    """A decoder stack applied K times to its own output (Sharma & Vu, arXiv 2606.24898).

    `H_0 = Dropout(embedding[tokens] (+ positions))`, `H_k = Stack(H_{k-1})`; with `config.inter_loop_norm`,
    `H_{k+1} = Stack(RMSNorm_loop(H_k))`. Every H_k is a readout's input before the readout's norm.

    fused: use the functions of `kernels` instead of plain PyTorch, here and in `looped.supervision`; and on a CPU that
    gains nothing by autocast's dtype form products in float32, as those functions do.
    checkpoint_loops: keep only the states for the backward pass and recompute each loop from the one before.
    Both are attributes that may change at any time; neither touches parameters or checkpoints.

    Weights start as PyTorch's nn.Linear starts them, embedding and learned positions as
    N(0, `config.embedding_std`^2), norms at 1.
    """

    def __init__(self, config: LoopedConfig, *, fused: bool = True, checkpoint_loops: bool = False) -> None:
        super().__init__()
        self.config = config
        self.fused = fused
        self.checkpoint_loops = checkpoint_loops
        d_model = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d_model)
        self.positions = nn.Embedding(config.max_seq_len, d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.loop_norm = nn.RMSNorm(d_model, eps=config.norm_eps) if config.inter_loop_norm else None
        self.readout_norm: nn.RMSNorm | nn.LayerNorm | None = None
        if config.readout == "layernorm":
            self.readout_norm = nn.LayerNorm(d_model, eps=config.norm_eps)
        elif config.readout != "raw":
            self.readout_norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(d_model, config.vocab_size, bias=False)

        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=config.embedding_std)

    @property
    def head_weight(self) -> Tensor:
        """[V, d]: the rows that states are multiplied with to give logits; the embedding when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens: Tensor, *, n_loops: int | None = None) -> tuple[Tensor, ...]:
        """The states (H_1, ..., H_K), each [B, T, d] in the embedding's dtype, under autocast too.

        tokens: [B, T] int64, each in [0, vocab_size). n_loops: K >= 1, any number; default `config.n_loops`.
        Raises TypeError for another dtype and ValueError for another rank, a sequence longer than the learned
        positions, n_loops < 1, or tokens out of range (on a CPU; looking at CUDA tokens would stall the device,
        whose embedding kernel asserts the range itself).
        """
        n_loops = self.config.n_loops if n_loops is None else n_loops
        if n_loops < 1:
            raise ValueError(f"n_loops must be at least 1. Got n_loops={n_loops}.")
        state = self.embed(tokens)
        rotary = None
        if self.config.positions == "rotary":  # once for all loops and layers
            rotary = rotary_table(tokens.shape[1], self.config.head_dim, self.config.rope_theta, tokens.device)

        states: list[Tensor] = []
        for loop in range(n_loops):
            if loop > 0:
                state = self._between_loops(state)
            if self.checkpoint_loops and torch.is_grad_enabled():
                # The generator's state is restored for dropout alone: no CUDA graph can capture that.
                random = self.training and self.config.dropout > 0
                state = checkpoint(self._stack, state, rotary, use_reentrant=False, preserve_rng_state=random)
            else:
                state = self._stack(state, rotary)
            states.append(state)
        return tuple(states)

    def embed(self, tokens: Tensor) -> Tensor:
        """H_0 [B, T, d] of tokens [B, T]. Raises as `forward` does."""
        self._check_tokens(tokens)
        return self._embed(tokens)

    def apply_loop(self, state: Tensor, loop: int) -> Tensor:
        """H_{loop+1} of H_loop, both [B, T, d]: one of the steps of `forward`, loop = 0, 1, ..."""
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_table(state.shape[1], self.config.head_dim, self.config.rope_theta, state.device)
        return self._stack(self._between_loops(state) if loop > 0 else state, rotary)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape [B, T]. Got {list(tokens.shape)}.")
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64. Got {tokens.dtype}.")
        if self.positions is not None and tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                "a sequence must not be longer than max_seq_len with learned positions. "
                f"Got T={tokens.shape[1]}, max_seq_len={self.config.max_seq_len}."
            )
        # A compiled graph cannot branch on values; there the CPU's embedding asserts the range.
        if tokens.device.type == "cpu" and tokens.numel() > 0 and not torch.compiler.is_compiling():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"tokens must be in [0, vocab_size={self.config.vocab_size}). Got {low if low < 0 else high}."
                )

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        return dropout(x, self.config.dropout if self.training else 0.0)

    def _stack(self, x: Tensor, rotary: Rotary) -> Tensor:
        delta: Tensor | None = None
        with product_autocast(x) if self.fused else contextlib.nullcontext():
            for block in self.blocks:
                x, delta = block(x, delta, rotary, self.fused)
        return x if delta is None else x + delta

    def _between_loops(self, state: Tensor) -> Tensor:
        if self.loop_norm is None:
            return state
        # Its result is the residual stream itself, which autocast must not round.
        with torch.autocast(state.device.type, enabled=False):
            return add_and_normalise(state, None, self.loop_norm, self.fused)[0]

    def parameter_count(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(
        self,
        n_loops: int | None = None,
        *,
        n_readouts: int | None = None,
        seq_len: int | None = None,
        training: bool = True,
    ) -> int:
        """Floating-point operations of the matrix multiplications for one token, an addition or product counting 1.

        `n_loops * n_layers * (2 * (4 d^2 + 3 d d_ff) + 2 T d) + n_readouts * 2 V d`, times 3 for training (the
        backward pass multiplies each matrix twice). `2 T d` is causal attention: `2 * 2 T d` for scores and
        mixing, halved because a token sees half of the sequence on average. Recomputation is not counted.
        Defaults: the trained n_loops; a readout of every loop; T = max_seq_len.
        """
        config = self.config
        n_loops = config.n_loops if n_loops is None else n_loops
        n_readouts = n_loops if n_readouts is None else n_readouts
        seq_len = config.max_seq_len if seq_len is None else seq_len
        projections = 2 * (4 * config.d_model**2 + 3 * config.d_model * config.d_ff)
        attention = 2 * seq_len * config.d_model
        readout = 2 * config.vocab_size * config.d_model
        forward = n_loops * config.n_layers * (projections + attention) + n_readouts * readout
        return 3 * forward if training else forward
