"""A decoder small enough for every test of it, its tokens, gradients, and the same from the equations alone."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from looped.config import LoopedConfig
from looped.model import LoopedLM

V, D, HEADS, LAYERS, FF, LENGTH = 61, 24, 3, 2, 40, 16
COMPILED: dict[str, Any] = {"n_layers": 1, "n_loops": 2}  # changes for torch.compile, which takes long for every layer


def config(**changes: Any) -> LoopedConfig:
    shape: dict[str, Any] = {
        "vocab_size": V,
        "d_model": D,
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "d_ff": FF,
        "max_seq_len": LENGTH,
        "n_loops": 3,
        "dropout": 0.0,
    }
    return LoopedConfig(**{**shape, **changes})


def model(*, fused: bool = False, seed: int = 0, **changes: Any) -> LoopedLM:
    """A decoder with norms away from 1 and injections away from their start, so that a forgotten weight shows."""
    torch.manual_seed(seed)
    decoder = LoopedLM(config(**changes), fused=fused)
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.startswith("injection") and "adapter" not in name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return decoder


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def uneven_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets [4, 11], two rows for each of two processes; not equally many targets count in both."""
    drawn = tokens(4, 12, seed)
    targets = drawn[:, 1:].clone()
    targets[0, 2:] = -100
    return drawn[:, :-1], targets


def gradients(decoder: LoopedLM, states: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of a function that sees every state, with a weight of its own for every element."""
    generator = torch.Generator().manual_seed(2)
    loss = torch.stack([(state * torch.randn(state.shape, generator=generator)).mean() for state in states]).sum()
    decoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = wanted.abs().max().item()
        torch.testing.assert_close(
            actual[name], wanted, atol=tolerance * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# An independent reference, from the equations -------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of x [B, H, T, head_dim], pair by pair."""
    half = x.shape[-1] // 2
    out = x.clone()
    for t, i in itertools.product(range(x.shape[2]), range(half)):
        angle = t * theta ** (-2 * i / x.shape[-1])
        a, b = x[:, :, t, i], x[:, :, t, i + half]
        out[:, :, t, i] = a * math.cos(angle) - b * math.sin(angle)
        out[:, :, t, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def reference_block(weights: dict[str, Tensor], x: Tensor, config: LoopedConfig) -> Tensor:
    batch, length, d_model = x.shape
    y = rms_norm(x, weights["attention_norm.weight"])
    q_weight, k_weight, v_weight = weights["attention.qkv.weight"].split(d_model)
    q, k, v = (
        (y @ w.T).view(batch, length, config.n_heads, -1).transpose(1, 2) for w in (q_weight, k_weight, v_weight)
    )
    if config.positions == "rotary":
        q, k = turn(q, config.rope_theta), turn(k, config.rope_theta)
    scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, d_model)
    x = reference_sum(x, mixed @ weights["attention.output.weight"].T, weights, "attention_output_norm", config)
    y = rms_norm(x, weights["mlp_norm.weight"])
    gate, up = y @ weights["mlp.w1.weight"].T, y @ weights["mlp.w3.weight"].T
    mlp = (gate * torch.sigmoid(gate) * up) @ weights["mlp.w2.weight"].T
    return reference_sum(x, mlp, weights, "mlp_output_norm", config)


def reference_sum(x: Tensor, update: Tensor, weights: dict[str, Tensor], norm: str, config: LoopedConfig) -> Tensor:
    if config.block_norm == "pre":
        return x + update
    if config.block_norm == "sandwich":
        return x + rms_norm(update, weights[f"{norm}.weight"])
    return rms_norm(x + update, weights[f"{norm}.weight"])


def reference_stack(decoder: LoopedLM, part: str, n_blocks: int, x: Tensor) -> Tensor:
    weights = decoder.state_dict()
    for layer in range(n_blocks):
        prefix = f"{part}.{layer}."
        block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = reference_block(block, x, decoder.config)
    return x


def reference_injection(decoder: LoopedLM, state: Tensor, embedded: Tensor, loop: int) -> Tensor:
    weights, config = decoder.state_dict(), decoder.config
    if config.injection == "add":
        state = state + embedded
    elif config.injection == "concat":
        from_state, from_embedded = weights["injection.adapter.weight"].split(config.d_model, dim=1)
        state = state @ from_state.T + embedded @ from_embedded.T
    elif config.injection == "diagonal":
        decay = 1 / (1 + weights["injection.decay"].exp())  # exp(-softplus(x))
        state = decay * state + weights["injection.gain"] * embedded
    last = min(loop, config.n_loops - 1)
    if config.loop_embedding:
        state = state + weights["injection.loop_embedding"][last]
    if config.loop_rank:
        state = state + state @ weights["injection.down"][last].T @ weights["injection.up"][last].T
    return state


def reference_states(decoder: LoopedLM, tokens: Tensor, n_loops: int) -> list[Tensor]:
    """H_1..H_K in evaluation mode."""
    weights, config = decoder.state_dict(), decoder.config
    embedded = weights["embedding.weight"][tokens]
    if config.positions == "learned":
        embedded = embedded + weights["positions.weight"][: tokens.shape[1]]
    embedded = reference_stack(decoder, "prelude", config.n_prelude, embedded)
    x = embedded if config.start == "embedding" else torch.zeros_like(embedded)
    states = []
    for loop in range(n_loops):
        if loop > 0 and config.inter_loop_norm:
            x = rms_norm(x, weights["loop_norm.weight"])
        x = reference_stack(decoder, "blocks", config.n_layers, reference_injection(decoder, x, embedded, loop))
        states.append(x)
    return states


def reference_read(decoder: LoopedLM, state: Tensor) -> Tensor:
    """R_k of H_k."""
    return reference_stack(decoder, "coda", decoder.config.n_coda, state)
