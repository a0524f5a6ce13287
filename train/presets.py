"""How the presets are trained, as data; their shapes are in looped/config.py."""

from typing import Any

# Where the presets differ from the demo. Those of the paper are its section on training (Sharma & Vu, arXiv
# 2606.24898); of the released models the shape and the depths are taken, with defaults for one large GPU. The demo's
# schedule is constant, so that it can be continued as if its steps had been higher from the start.
_PAPER = {
    "data": "wikitext-103", "tokenizer": "paper", "learning_rate": 3e-4, "warmup_steps": 0, "stride": 128,
    "dtype": "bf16",
}  # fmt: skip
_RELEASED = {
    "data": "wikitext-103", "batch_size": 8, "learning_rate": 3e-4, "schedule": "warmup-cosine", "warmup_steps": 200,
    "dtype": "bf16",
}  # fmt: skip
_RANDOM_DEPTH = _RELEASED | {"supervision": "terminal", "penalty": 0.0}
_TASK = {
    "supervision": "terminal", "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 100, "penalty": 0.0,
    "weight_decay": 0.0, "dtype": "fp32", "eval_tokens": 40_960,
}  # fmt: skip
TRAINING: dict[str, dict[str, Any]] = {
    "demo": {},
    "paper-44m": _PAPER | {"batch_size": 64},
    "paper-129m": _PAPER | {"batch_size": 32},
    "ouro-1.4b": _RELEASED | {"checkpoint_loops": True},
    "huginn-small": _RANDOM_DEPTH
    | {"checkpoint_loops": True, "depth": "poisson:32", "backprop_loops": 8, "eval_loops": 64},
    "parcae-140m": _RANDOM_DEPTH | {"batch_size": 16, "depth": "poisson:8", "backprop_loops": 4},
    "p-hop": _TASK | {"data": "p-hop"},
    "addition": _TASK | {"data": "addition"},
}
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
