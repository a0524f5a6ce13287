"""The recurrence: what comes before the loops, what is repeated, what is fed back, and when it stops.

    H_0 = Dropout(embedding[tokens] (+ positions))        before: `embed`
    H_k = Stack(H_{k-1})                                  repeated: `apply_loop`
    H_{k+1} = Stack(RMSNorm_loop(H_k))                    fed back, with `config.inter_loop_norm`

It stops after a number of loops that the caller gives. How states are read out is the model's (looped/model.py).
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looped.attention import rotary_table
from looped.block import Block
from looped.config import LoopedConfig
from looped.context import Context
from looped.dropout import dropout
from looped.implementation import FUSED, PLAIN, Implementation


def first_with_gradient(n_loops: int, backprop_loops: int | None) -> int:
    """The first of n_loops loops, from 0, that has a gradient where the last backprop_loops have one (None: all)."""
    if backprop_loops is None:
        return 0
    if backprop_loops < 1:
        raise ValueError(f"backprop_loops must be at least 1. Got backprop_loops={backprop_loops}.")
    return max(0, n_loops - backprop_loops)


class Recurrence(nn.Module):
    """The part of a looped model that makes states of tokens. Its parameters start as PyTorch's modules start them.

    fused and checkpoint_loops are described in `LoopedLM`.
    """

    def __init__(self, config: LoopedConfig, *, fused: bool, checkpoint_loops: bool) -> None:
        super().__init__()
        self.config = config
        self.fused = fused
        self.checkpoint_loops = checkpoint_loops
        d_model = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d_model)
        self.positions = nn.Embedding(config.max_seq_len, d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.loop_norm = nn.RMSNorm(d_model, eps=config.norm_eps) if config.inter_loop_norm else None

    @property
    def implementation(self) -> Implementation:
        return FUSED if self.fused else PLAIN

    def unroll(self, tokens: Tensor, n_loops: int, backprop_loops: int | None = None) -> tuple[Tensor, ...]:
        """The states (H_1, ..., H_K) of tokens [B, T], each [B, T, d]; K = n_loops.

        backprop_loops: the loops before so many last ones run without gradient (truncated backpropagation; Huginn,
        arXiv 2502.05171). No gradient reaches H_0 through them. None: all loops have one.
        """
        if n_loops < 1:
            raise ValueError(f"n_loops must be at least 1. Got n_loops={n_loops}.")
        first = first_with_gradient(n_loops, backprop_loops)
        state = self.embed(tokens)
        context = self._context(state)  # once for all loops and layers
        states: list[Tensor] = []
        for loop in range(n_loops):
            with torch.no_grad() if loop < first else nullcontext():
                state = self._loop(state, loop, context)
            states.append(state)
        return tuple(states)

    def embed(self, tokens: Tensor) -> Tensor:
        """H_0 [B, T, d] of tokens [B, T]. Raises as `LoopedLM.forward` does."""
        self._check_tokens(tokens)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        return dropout(x, self.config.dropout if self.training else 0.0)

    def apply_loop(self, state: Tensor, loop: int) -> Tensor:
        """H_{loop+1} of H_loop, both [B, T, d]: one of the steps of `unroll`, loop = 0, 1, ..."""
        return self._loop(state, loop, self._context(state))

    def _context(self, state: Tensor) -> Context:
        config, rotary = self.config, None
        if config.positions == "rotary":
            rotary = rotary_table(state.shape[1], config.head_dim, config.rope_theta, state.device)
        return Context(self.implementation, rotary)

    def _loop(self, state: Tensor, loop: int, context: Context) -> Tensor:
        if loop > 0:
            state = self._between_loops(state)
        if self.checkpoint_loops and torch.is_grad_enabled():
            # The generator's state is restored for dropout alone: no CUDA graph can capture that.
            random = self.training and self.config.dropout > 0
            return checkpoint(self._stack, state, context, use_reentrant=False, preserve_rng_state=random)
        return self._stack(state, context)

    def _between_loops(self, state: Tensor) -> Tensor:
        """What is fed back: the state, or its norm."""
        if self.loop_norm is None:
            return state
        # Its result is the residual stream itself, which autocast must not round.
        with torch.autocast(state.device.type, enabled=False):
            return self.implementation.add_and_normalise(state, None, self.loop_norm)[0]

    def _stack(self, x: Tensor, context: Context) -> Tensor:
        delta: Tensor | None = None
        with context.implementation.product_context(x):
            for block in self.blocks:
                x, delta = block(x, delta, context)
        return x if delta is None else x + delta

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
