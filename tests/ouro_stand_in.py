"""A small stand-in of Ouro's model (arXiv 2510.25741): its module names and its data flow, from the equations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A config.json with the fields of ByteDance/Ouro-1.4B's, and sizes for a test.
CONFIG: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": ["full_attention", "full_attention"],
    "attention_dropout": 0.0,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "torch_dtype": "float32",
}


class OuroNorm(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config["hidden_size"]).uniform_(0.5, 1.5))
        self.eps = config["rms_norm_eps"]

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class OuroAttention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d_model = config["hidden_size"]
        self.head_dim, self.theta = config["head_dim"], config["rope_theta"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = self.rotate(q) @ self.rotate(k).transpose(2, 3) / self.head_dim**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape))

    def rotate(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        wavelengths = self.theta ** (torch.arange(half) / half)
        angles = torch.arange(x.shape[2])[:, None] / wavelengths
        turn = torch.complex(angles.cos(), angles.sin())
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)


class OuroMLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d_model, d_ff = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OuroDecoderLayer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = OuroAttention(config)
        self.mlp = OuroMLP(config)
        self.input_layernorm = OuroNorm(config)
        self.input_layernorm_2 = OuroNorm(config)
        self.post_attention_layernorm = OuroNorm(config)
        self.post_attention_layernorm_2 = OuroNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x)))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class OuroModel(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.n_loops = config["total_ut_steps"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(OuroDecoderLayer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = OuroNorm(config)
        self.early_exit_gate = nn.Linear(config["hidden_size"], 1)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """The normalised states of all loops, each of which the next loop starts from."""
        x, states = self.embed_tokens(tokens), []
        for _ in range(self.n_loops):
            for layer in self.layers:
                x = layer(x)
            x = self.norm(x)
            states.append(x)
        return states


class OuroForCausalLM(nn.Module):
    """Random, every norm away from 1."""

    def __init__(self, config: dict[str, Any] = CONFIG, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits [B, T, V] of every loop, and lambda [K, B, T], how probable it is that a token leaves at it."""
        states = self.model(tokens)
        gates = torch.stack([self.model.early_exit_gate(state).squeeze(-1) for state in states])
        return [self.lm_head(state) for state in states], gates.sigmoid()
