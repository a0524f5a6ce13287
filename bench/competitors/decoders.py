"""Variants of the looped decoder, with the same weights: fused, plain PyTorch, the blocks of either compiled, eager.

The eager baseline is how the paper's own code does it: explicit softmax attention with its [B, H, T, T] scores in
memory, separate norms, K separate readouts.
"""

import dataclasses
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.graphs import Replay
from bench.measure.implementation import Implementation, by_name, is_ours
from bench.measure.roofs import Roof, projection_roof
from bench.measure.timing import Prepare
from bench.shapes import DEVICE, RECURRENCES, Case, DecoderShape
from looped.attention import SelfAttention
from looped.config import PRESETS
from looped.context import Context
from looped.model import LoopedLM
from looped.supervision import Supervision
from train.step import training_step


class EagerAttention(SelfAttention):
    """`dropout(softmax(q k^T / sqrt(head_dim) + mask)) v` with every score in memory."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H, T, head_dim]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        probabilities = F.dropout(scores.masked_fill(future, -torch.inf).softmax(-1), self.dropout, self.training)
        return (probabilities @ v).transpose(1, 2).flatten(2)


VARIANTS = ("fused", "plain", "fused-blocks-compiled", "plain-blocks-compiled", "eager")
IMPLEMENTATIONS = by_name(Implementation(name, compiles="inside" if "compiled" in name else "") for name in VARIANTS)

GRAPHED = "-graphed"  # behind a variant: its training step as one CUDA graph
NEEDS_GPU = None if DEVICE.type == "cuda" else "needs a GPU"
STEP_IMPLEMENTATIONS = by_name(
    implementation._replace(name=implementation.name + ending, missing=missing)
    for implementation in IMPLEMENTATIONS.values()
    for ending, missing in (("", None), (GRAPHED, NEEDS_GPU))
)


def decoder(shape: DecoderShape, variant: str, device: torch.device = DEVICE) -> LoopedLM:
    """A decoder of the shape, with RMSNorm readout; the same weights in every variant."""
    variant = variant.removesuffix(GRAPHED)
    torch.manual_seed(0)
    changes = RECURRENCES[shape.recurrence]
    config = dataclasses.replace(PRESETS[shape.preset], readout="rmsnorm", n_loops=shape.n_loops, **changes)
    with device:
        model = LoopedLM(config, fused=is_ours(variant))
    for block in (*model.prelude, *model.blocks, *model.coda):
        if variant == "eager":
            block.attention.__class__ = EagerAttention
        if IMPLEMENTATIONS[variant].compiles:
            block.compile(dynamic=False)  # one by one, as PyTorch recommends for repeated blocks: one graph for all
    return model


def tokens_of(shape: DecoderShape, vocab_size: int) -> Tensor:
    """[B, T + 1] random tokens: inputs and, one further, targets."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (shape.batch, shape.seq_len + 1), generator=generator).to(DEVICE)


@lru_cache(maxsize=2)  # the fused model, with which the others take turns, and one other
def stepping(case: Case[DecoderShape], variant: str, supervision: Supervision) -> Prepare:
    """A model in training and its optimiser, with a function that takes a step."""
    graphed = variant.endswith(GRAPHED)
    if "compiled" in variant:
        torch.compiler.reset()  # a block may have only so many graphs
    model = decoder(case.shape, variant).train()
    rate = torch.tensor(1e-5, device=DEVICE) if graphed else 1e-5  # a number would be written into the graph
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True, capturable=graphed)
    tokens = tokens_of(case.shape, model.config.vocab_size)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> object:
        return training_step(model, optimizer, inputs, targets, supervision=supervision, penalty=0.0, dtype=case.dtype)

    step()  # creates the optimiser's state
    call = Replay(lambda: step) if graphed else step
    return lambda: call


def decoder_roof(model: LoopedLM, shape: DecoderShape, dtype: torch.dtype, flops: int) -> Roof:
    """So many FLOPs as the widest projection alone, [B T, d] times [d, d_ff]."""
    return projection_roof(shape.n_tokens, model.config.d_model, model.config.d_ff, dtype, flops)
