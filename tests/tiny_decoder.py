"""A decoder small enough for every test of it, its tokens, gradients, and the same from the equations alone."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from looped.config import LoopedConfig
from looped.model import LoopedLM

V, D, HEADS, LAYERS, FF, LENGTH = 61, 24, 3, 2, 40, 16


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
    """A decoder with norms away from 1, so that a forgotten weight shows."""
    torch.manual_seed(seed)
    decoder = LoopedLM(config(**changes), fused=fused)
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return decoder


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


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
    x = x + mixed @ weights["attention.output.weight"].T
    y = rms_norm(x, weights["mlp_norm.weight"])
    gate, up = y @ weights["mlp.w1.weight"].T, y @ weights["mlp.w3.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ weights["mlp.w2.weight"].T


def reference_states(decoder: LoopedLM, tokens: Tensor, n_loops: int) -> list[Tensor]:
    weights = decoder.state_dict()
    x = weights["embedding.weight"][tokens]
    if decoder.config.positions == "learned":
        x = x + weights["positions.weight"][: tokens.shape[1]]
    states = []
    for loop in range(n_loops):
        if loop > 0 and decoder.config.inter_loop_norm:
            x = rms_norm(x, weights["loop_norm.weight"])
        for layer in range(decoder.config.n_layers):
            prefix = f"blocks.{layer}."
            block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            x = reference_block(block, x, decoder.config)
        states.append(x)
    return states
