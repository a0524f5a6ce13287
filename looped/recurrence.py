"""The recurrence: what comes before the loops, what is repeated, what is fed back, and what is read.

    E = Prelude(Dropout(embedding[tokens] (+ positions)))     before the loops: `embed`
    H_0 = E, 0 or noise                                       what they start from: `start`
    H_{k+1} = Stack(Inject_k(Feed(H_k), E))                   repeated: `apply_loop`
    R_k = Coda(H_k)                                           what the readout sees: `read`

Feed is RMSNorm_loop with `config.inter_loop_norm`, for k > 0, and else nothing. Inject_k is described in
looped/injection.py. Without prelude, coda and injection, which is the simplest case, E = H_0 and R_k = H_k. "States"
are always the H_k, which are fed back; the readout's norm, logits and losses are of the R_k (looped/model.py).

The loops stop after a number that the caller gives.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looped.attention import rotary_table
from looped.block import Block, normalised_stream
from looped.config import LoopedConfig, at_least
from looped.context import Cache, Context, Part
from looped.dropout import dropout
from looped.implementation import FUSED, PLAIN, Implementation
from looped.injection import Injection

NOISE_STD = (2 / 5) ** 0.5  # of the state that Huginn starts from


def first_with_gradient(n_loops: int, backprop_loops: int | None) -> int:
    """The first of n_loops loops, from 0, that has a gradient where the last backprop_loops have one (None: all)."""
    if backprop_loops is None:
        return 0
    at_least(1, backprop_loops=backprop_loops)
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
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.n_prelude))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.coda = nn.ModuleList(Block(config) for _ in range(config.n_coda))
        self.loop_norm = nn.RMSNorm(d_model, eps=config.norm_eps) if config.inter_loop_norm else None
        self.injection = Injection(config)

    @property
    def implementation(self) -> Implementation:
        return FUSED if self.fused else PLAIN

    def unroll(
        self,
        tokens: Tensor,
        n_loops: int,
        backprop_loops: int | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, ...]:
        """The states (H_1, ..., H_K) of tokens [B, T], each [B, T, d]; K = n_loops.

        backprop_loops: the loops before so many last ones run without gradient (truncated backpropagation; Huginn,
        arXiv 2502.05171). E then has a gradient through the later loops' injection alone. None: all loops have one.
        positions, cache: as `context` takes them.
        """
        at_least(1, n_loops=n_loops)
        first = first_with_gradient(n_loops, backprop_loops)
        context = self.context(tokens, positions=positions, cache=cache)  # once for all loops and layers
        embedded = self.embed(tokens, positions=positions, context=context)
        state = self.start(embedded)
        states: list[Tensor] = []
        for loop in range(n_loops):
            with torch.no_grad() if loop < first else nullcontext():
                state = self.apply_loop(state, loop, embedded, context)
            states.append(state)
        return tuple(states)

    def context(self, rows: Tensor, *, positions: Tensor | None = None, cache: Cache | None = None) -> Context:
        """What the blocks are told of the rows: tokens [B, T], or states [B, T, d].

        positions: [T] or [B, T] int64, the rows' positions in their sequences; None for 0..T-1. cache: what else than
        each other the rows attend to. Raises ValueError for positions of other rows.
        """
        if positions is not None and positions.shape not in (rows.shape[1:2], rows.shape[:2]):
            raise ValueError(
                f"positions must be of the rows, [T] or [B, T] with [B, T] = {list(rows.shape[:2])}. "
                f"Got {list(positions.shape)}."
            )
        rotary = None
        if self.config.positions == "rotary":
            if positions is None:
                positions = torch.arange(rows.shape[1], device=rows.device)
            rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        return Context(self.implementation, rotary, cache)

    def embed(self, tokens: Tensor, *, positions: Tensor | None = None, context: Context | None = None) -> Tensor:
        """E [B, T, d] of tokens [B, T]. Raises as `LoopedLM.forward` does. positions: as `context` takes them."""
        self._check_tokens(tokens)
        context = self.context(tokens, positions=positions) if context is None else context
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + (self.positions.weight[: tokens.shape[1]] if positions is None else self.positions(positions))
        x = dropout(x, self.config.dropout if self.training else 0.0)
        return self._recomputed(self._stack, self.prelude, x, "prelude", 0, context) if len(self.prelude) else x

    def start(self, embedded: Tensor) -> Tensor:
        """H_0 of E, both [B, T, d]. Noise is N(0, 2/5) in training, as Huginn's, and its mean otherwise."""
        if self.config.start == "embedding":
            return embedded
        if self.config.start == "noise" and self.training:
            return NOISE_STD * torch.randn_like(embedded)
        return torch.zeros_like(embedded)

    def apply_loop(
        self, state: Tensor, loop: int, embedded: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """H_{loop+1} of H_loop, both [B, T, d]: one of the steps of `unroll`, loop = 0, 1, ...

        embedded: E, which an injection needs. Raises ValueError if it is missing.
        """
        if embedded is None and self.config.injection != "none":
            raise ValueError(f"embedded must be given with injection={self.config.injection}. Got embedded=None.")
        context = self.context(state) if context is None else context
        return self._recomputed(self._loop, state, loop, embedded, context)

    def read(self, state: Tensor, context: Context | None = None) -> Tensor:
        """R_k of H_k, both [B, T, d]."""
        if len(self.coda) == 0:
            return state
        context = self.context(state) if context is None else context
        return self._recomputed(self._stack, self.coda, state, "coda", 0, context)

    def _recomputed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The function's result. With checkpoint_loops its arguments alone are kept for the backward pass."""
        if not (self.checkpoint_loops and torch.is_grad_enabled()):
            return function(*arguments)
        # The generator's state is restored for dropout alone: no CUDA graph can capture that.
        random = self.training and self.config.dropout > 0
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=random)

    def _loop(self, state: Tensor, loop: int, embedded: Tensor | None, context: Context) -> Tensor:
        if loop > 0 and self.loop_norm is not None:
            state = normalised_stream(state, None, self.loop_norm, self.implementation)
        state = self.injection(state, embedded, loop)
        return self._stack(self.blocks, state, "loop", loop, context)

    def _stack(self, blocks: nn.ModuleList, x: Tensor, part: Part, loop: int, context: Context) -> Tensor:
        delta: Tensor | None = None
        with context.implementation.product_context(x):
            for layer, block in enumerate(blocks):
                x, delta = block(x, delta, context.at(part, loop, layer))
        return x if delta is None else x + delta

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape [B, T]. Got {list(tokens.shape)}.")
        if tokens.numel() == 0:
            raise ValueError(f"tokens must hold at least one token. Got shape {list(tokens.shape)}.")
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64. Got {tokens.dtype}.")
        if self.positions is not None and tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                "a sequence must not be longer than max_seq_len with learned positions. "
                f"Got T={tokens.shape[1]}, max_seq_len={self.config.max_seq_len}."
            )
        # A compiled graph cannot branch on values; there the CPU's embedding asserts the range.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"tokens must be in [0, vocab_size={self.config.vocab_size}). Got {low if low < 0 else high}."
                )
