"""The memory of one training step on one GPU, in bytes, from the shape of the model and of the batch.

A step has its peak at one of five moments. `memory` adds up what is there at each, and takes the largest sum.
What a block keeps for the backward pass is counted tensor by tensor in `block_bytes`. N: tokens of a micro-batch on one
GPU. d, ff, V, K: channels, hidden channels, vocabulary, loops. h: bytes of a number in a product, 2 in bf16, 4 in fp32.
The stream of states is fp32.

Weights, gradients and AdamW's moments (arXiv 1711.05101) take 4, 4 and 8 bytes a parameter. Under autocast the backward
pass keeps the products' weights in bf16, too. `fsdp2` shares weights, gradients and moments out over the GPUs, as ZeRO
stage 3 does (arXiv 1910.02054), and gathers them once in a step; `shard_head` shares out the table of the vocabulary
(Megatron-LM, arXiv 1909.08053).
"""

import functools
from dataclasses import dataclass, fields
from typing import Literal

import torch

from looped.config import LoopedConfig
from looped.kernels.products import CUDA_CHUNK_ROWS
from looped.model import LoopedLM
from looped.recurrence import first_with_gradient
from looped.supervision import Supervision

Shard = Literal["none", "fsdp2"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """How a step is taken. sequences: of a micro-batch on one GPU. half: products are in bf16. accumulated: the
    micro-batch is one of several. chunk_rows: rows of the fused readout whose logits are in memory at once."""

    sequences: int
    seq_len: int
    fused: bool = True
    half: bool = True
    supervision: Supervision = "per-loop"
    backprop_loops: int | None = None
    checkpoint_loops: bool = False
    accumulated: bool = False
    gpus: int = 1
    shard: Shard = "none"
    shard_head: bool = False
    chunk_rows: int = CUDA_CHUNK_ROWS

    @property
    def n_tokens(self) -> int:
        return self.sequences * self.seq_len

    @property
    def product_bytes(self) -> int:
        """h."""
        return 2 if self.half else 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at one moment of a step, by kind.

    gathered: weights in the products' dtype, and those that other GPUs hold. states: H_1..H_K and their gradients.
    activations: what is kept for the backward pass beside them. readout: normed rows and dW; logits: of a chunk, or of
    plain PyTorch.
    """

    moment: str
    weights: float
    moments: float
    gradients: float
    gathered: float
    states: float
    activations: float
    readout: float = 0
    logits: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "moment")


@dataclass(frozen=True)
class Parameters:
    """How many: all; those of the blocks; those of the table [V, d] that is the head."""

    total: int
    blocks: int
    head: int


@functools.cache
def parameters(config: LoopedConfig) -> Parameters:
    with torch.device("meta"):
        model = LoopedLM(config)
    blocks = (*model.prelude, *model.blocks, *model.coda)
    of_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    return Parameters(model.parameter_count(), of_blocks, model.head_weight.numel())


def block_bytes(config: LoopedConfig, step: Step) -> int:
    """What one application of a block keeps of a token.

    The residual sums before both sublayers in fp32; their normed values; q, k, v, and the heads' outputs with their
    log-sum-exp; the gate, the value and their product of SwiGLU, and plain PyTorch silu(gate) too; dropout's mask.
    """
    d, h = config.d_model, step.product_bytes
    kept = 2 * 4 * d + 2 * h * d + 4 * h * d + 4 * config.n_heads + (3 if step.fused else 4) * h * config.d_ff
    if config.positions == "rotary":
        kept += 2 * h * d  # q and k, turned
    if config.dropout > 0:
        kept += d
    if config.block_norm == "sandwich":
        kept += 2 * h * d  # what the second norms are of
    if config.block_norm == "sandwich-sum":
        kept += 2 * 4 * d  # the sums that they are of
    return kept


def loop_bytes(config: LoopedConfig, step: Step) -> int:
    """What one loop keeps of a token beside the states before and after it."""
    d, h = config.d_model, step.product_bytes
    kept = config.n_layers * block_bytes(config, step) - 4 * d  # the first sum is the state
    if config.injection != "none" or config.loop_embedding or config.loop_rank > 0:
        kept += 4 * d
    if config.inter_loop_norm:
        kept += 4 * d
    if config.injection == "concat":
        kept += 2 * h * d
    if config.loop_rank > 0:
        kept += h * (d + config.loop_rank)
    return kept


@dataclass(frozen=True)
class _Activations:
    """Bytes kept from the forward to the backward pass.

    outside: by embedding, prelude and coda. loops: by all loops that have a gradient; loop: by one of them.
    recomputed: the most that is formed again at once. working: the gradients inside a block's backward pass.
    """

    outside: float
    loops: float
    loop: float
    recomputed: float
    working: float


def _activations(config: LoopedConfig, step: Step, n_loops: int, n_read: int) -> _Activations:
    n, d, h = step.n_tokens, config.d_model, step.product_bytes
    block, loop = n * block_bytes(config, step), n * loop_bytes(config, step)
    embedded = n * d * (4 + (config.dropout > 0))
    prelude, coda = config.n_prelude * block, config.n_coda * block
    read = 4 * n * d * n_read * (config.n_coda > 0)
    working = n * (3 * h * config.d_ff + 12 * d)
    if step.checkpoint_loops:
        return _Activations(embedded + read, 0, 0, max(loop, prelude, coda), working)
    return _Activations(embedded + read + prelude + n_read * coda, n_loops * loop, loop, 0, working)


@dataclass(frozen=True)
class _Readout:
    """Bytes of the readout: what it keeps for its backward pass; logits and their gradients, forward and backward."""

    kept: float
    forward: float
    backward: float


def _readout(config: LoopedConfig, step: Step, n_read: int) -> _Readout:
    n, d, h = step.n_tokens, config.d_model, step.product_bytes
    columns = config.vocab_size / (step.gpus if step.shard_head else 1)
    if step.fused:
        chunk = min(step.chunk_rows, n_read * n) * columns * h
        return _Readout(n_read * n * h * d + 4 * columns * d, chunk, 4 * columns * d)
    # Of every loop the normed rows and the softmax; of the last one its logits too, in both precisions, and in fp32
    # those of the loop before; then two gradients.
    return _Readout(n_read * n * (4 * columns + h * d), n * columns * (8 + h), n * columns * 8)


@dataclass(frozen=True)
class _Weights:
    """Bytes. held: weights of this GPU. gathered: weights of other GPUs, and copies of weights in bf16.

    The others are gradients. of_head: the table's alone. of_loops: while the backward pass has loops to come. whole: at
    its end.
    """

    held: float
    gathered: float
    of_head: float
    of_loops: float
    whole: float


def _weights(config: LoopedConfig, step: Step) -> _Weights:
    count, h = parameters(config), step.product_bytes
    head = count.head / (step.gpus if step.shard_head else 1)
    total = count.total - count.head + head
    rest = total - count.blocks
    if step.shard == "fsdp2":
        cast = h * head if step.half else 0
        held = 4 * total / step.gpus
        gathered, summed = h * count.blocks + 4 * rest + cast, h * count.blocks
        return _Weights(held, gathered, 4 * head, summed + 4 * rest, held + summed + 4 * rest)
    if step.half:
        copied = h * (count.blocks + head)
    else:  # W1 and W3 as one matrix
        n_blocks = config.n_prelude + config.n_layers + config.n_coda
        copied = h * n_blocks * 2 * config.d_model * config.d_ff if step.fused else 0
    # The fused path sums a weight's gradient over the loops in fp32. Plain PyTorch sums it in the weight's dtype, bf16,
    # unless each loop, recomputed, casts it anew.
    summed = 4 * count.blocks if step.fused or step.checkpoint_loops else h * count.blocks
    return _Weights(4 * total, copied, 4 * head, 4 * rest + summed, 4 * total)


def trained_loops(config: LoopedConfig, step: Step) -> tuple[int, int]:
    """How many loops have a gradient, and how many of those are read out."""
    n_loops = config.n_loops - first_with_gradient(config.n_loops, step.backprop_loops)
    return n_loops, 1 if step.supervision == "terminal" else n_loops


def memory(config: LoopedConfig, step: Step) -> Memory:
    """The peak of a step."""
    n_loops, n_read = trained_loops(config, step)
    weights, readout = _weights(config, step), _readout(config, step, n_read)
    kept = _activations(config, step, n_loops, n_read)
    states, dstates = (4 * loops * step.n_tokens * config.d_model for loops in (config.n_loops, n_loops))

    def at(moment: str, gradients: float, states: float, activations: float, **readout: float) -> Memory:
        return Memory(
            moment=moment, weights=weights.held, moments=2 * weights.held, gradients=gradients,
            gathered=weights.gathered, states=states, activations=activations, **readout,
        )  # fmt: skip

    # Gradients of the micro-batches before, or DDP's buckets: new ones come beside them, summed over the loops.
    replicated = step.gpus > 1 and step.shard == "none"
    before = weights.held if step.accumulated or replicated else 0

    both, all_kept = states + dstates, kept.outside + kept.loops
    in_block = kept.recomputed + kept.working
    moments = [
        at("readout, forward", before, states, all_kept, readout=readout.kept, logits=readout.forward),
        at(
            "readout, backward", before + weights.of_head, both, all_kept, readout=readout.kept, logits=readout.backward
        ),
        at("backward pass of the last loop", before + weights.of_head, both, all_kept + in_block),
        at("backward pass of the loop before", before + weights.of_loops, both, all_kept - kept.loop + in_block),
        at("end of the backward pass", weights.whole, 0, kept.outside),
    ]
    return max(moments, key=lambda moment: moment.total)
