"""How the presets are trained, as data; their shapes are in looped/config.py."""

from typing import Any

# Where the presets differ from the demo. Those of the paper are its section on training (Sharma & Vu, arXiv
# 2606.24898); of the released models the shape and the depths are taken, with defaults for one large GPU. The demo's
# schedule is constant, so that it can be continued as if its steps had been higher from the start.
TRAINING: dict[str, dict[str, Any]] = {
    "demo": {},
    "paper-44m": {
        "data": "wikitext-103", "tokenizer": "paper", "batch_size": 64, "learning_rate": 3e-4, "warmup_steps": 0,
        "stride": 128, "dtype": "bf16",
    },
    "paper-129m": {
        "data": "wikitext-103", "tokenizer": "paper", "batch_size": 32, "learning_rate": 3e-4, "warmup_steps": 0,
        "stride": 128, "dtype": "bf16",
    },
    "ouro-1.4b": {
        "data": "wikitext-103", "batch_size": 8, "learning_rate": 3e-4, "schedule": "warmup-cosine",
        "warmup_steps": 200, "checkpoint_loops": True, "dtype": "bf16",
    },
    "huginn-small": {
        "data": "wikitext-103", "batch_size": 8, "learning_rate": 3e-4, "schedule": "warmup-cosine",
        "warmup_steps": 200, "checkpoint_loops": True, "dtype": "bf16", "depth": "poisson:32", "backprop_loops": 8,
        "supervision": "terminal", "penalty": 0.0, "eval_loops": 64,
    },
    "parcae-140m": {
        "data": "wikitext-103", "batch_size": 16, "learning_rate": 3e-4, "schedule": "warmup-cosine",
        "warmup_steps": 200, "dtype": "bf16", "depth": "poisson:8", "backprop_loops": 4, "supervision": "terminal",
        "penalty": 0.0,
    },
    "p-hop": {
        "data": "p-hop", "supervision": "terminal", "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 100,
        "penalty": 0.0, "weight_decay": 0.0, "dtype": "fp32", "eval_tokens": 40_960,
    },
    "addition": {
        "data": "addition", "supervision": "terminal", "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 100,
        "penalty": 0.0, "weight_decay": 0.0, "dtype": "fp32", "eval_tokens": 40_960,
    },
}  # fmt: skip
LENGTH: dict[str, dict[str, float]] = {
    "demo": {"steps": 400},
    "paper-44m": {"epochs": 4},
    "paper-129m": {"epochs": 4},
    "ouro-1.4b": {"epochs": 1},
    "huginn-small": {"epochs": 1},
    "parcae-140m": {"epochs": 1},
    "p-hop": {"steps": 1500},
    "addition": {"steps": 1500},
}
