"""One optimisation step of the decoder: fused, plain PyTorch, and the eager baseline, in turn.

The eager baseline is how the paper's own code does it: explicit softmax attention with its [B, H, T, T] scores in
memory, separate norms, K separate readouts.  All three hold the same weights and see the same batch; denormals are
flushed for all.
"""

import dataclasses
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.records import environment, time_in_turn
from bench.shapes import DEVICE, STEPS, StepShape
from looped.attention import SelfAttention
from looped.config import PRESETS
from looped.decoder import LoopedDecoder
from looped.supervision import Supervision
from train.step import training_step

VARIANTS = ("fused", "plain", "eager")


class EagerAttention(nn.Module):
    """The same projections around `dropout(softmax(q k^T / sqrt(head_dim) + mask)) v`, every score in memory."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.n_heads, self.dropout = attention.n_heads, attention.dropout
        self.qkv, self.output = attention.qkv, attention.output

    def forward(self, x: Tensor, rotary: None = None) -> Tensor:
        batch, seq_len, d_model = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=x.device).triu(1)
        probabilities = F.dropout(scores.masked_fill(future, -torch.inf).softmax(-1), self.dropout, self.training)
        return self.output((probabilities @ v).transpose(1, 2).reshape(batch, seq_len, d_model))


@cache
def step_of(shape: StepShape, variant: str, dtype: torch.dtype, supervision: Supervision):
    """A function that takes one step."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[shape.preset], readout="rmsnorm")
    model = LoopedDecoder(config, fused=variant == "fused").to(DEVICE)
    if variant == "eager":
        for block in model.blocks:
            block.attention = EagerAttention(block.attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    tokens = torch.randint(config.vocab_size, (shape.batch, shape.seq_len + 1), device=DEVICE)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model.train()
    return lambda: training_step(model, optimizer, inputs, targets, supervision=supervision, penalty=0.0, dtype=dtype)


@pytest.mark.parametrize("supervision", ["per-loop", "terminal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", STEPS, ids=str)
def bench_step(benchmark, shape: StepShape, variant: str, dtype: str, supervision: Supervision) -> None:
    benchmark.group = f"training step {shape} {supervision} {dtype}"
    arithmetic = torch.bfloat16 if dtype == "bf16" else torch.float32
    step = step_of(shape, variant, arithmetic, supervision)
    paired = time_in_turn(benchmark, step, step_of(shape, "fused", arithmetic, supervision), rounds=3)
    benchmark.extra_info.update(
        environment(),
        tokens_per_second=round(shape.batch * shape.seq_len / paired.seconds, 1),
        ratio_to_fused=round(paired.ratio, 3),
    )
