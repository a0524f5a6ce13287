"""Ouro's checkpoints as this decoder's, and this decoder's as Ouro's (arXiv 2510.25741; ByteDance/Ouro-1.4B).

A checkpoint is a directory with config.json and safetensors files. Ouro's names are on the left:

    model.embed_tokens, lm_head                  embedding, head
    model.layers.N.input_layernorm[_2]           blocks.N.attention_norm, attention_output_norm
    model.layers.N.post_attention_layernorm[_2]  blocks.N.mlp_norm, mlp_output_norm
    model.layers.N.self_attn.{q,k,v}_proj        blocks.N.attention.qkv, one below the other
    model.layers.N.self_attn.o_proj              blocks.N.attention.output
    model.layers.N.mlp.{gate,up,down}_proj       blocks.N.mlp.{w1,w3,w2}
    model.norm                                   loop_norm and readout_norm
    model.early_exit_gate                        exit_gate

Ouro has one norm after every loop, whose result is fed back and read. Here the state is what that norm is applied to,
and feeding back and reading have a norm each. Where their weights differ, as they do after training, the norm that
feeds back is written, and what it lacks for reading is multiplied into head and gate, channel by channel. That changes
nothing but rounding.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from looped.config import LoopedConfig
from looped.model import LoopedLM
from looped.whole_file import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# What Ouro's decoder is, in the fields of LoopedConfig that it fixes.
SHAPE: dict[str, Any] = {
    "readout": "rmsnorm",
    "inter_loop_norm": True,
    "positions": "rotary",
    "n_prelude": 0,
    "n_coda": 0,
    "injection": "none",
    "start": "embedding",
    "block_norm": "sandwich",
    "loop_embedding": False,
    "loop_rank": 0,
}
# Names of a layer's weights: Ouro's and ours. q, k and v are ours in one.
LAYER = {
    "input_layernorm": "attention_norm",
    "input_layernorm_2": "attention_output_norm",
    "post_attention_layernorm": "mlp_norm",
    "post_attention_layernorm_2": "mlp_output_norm",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NEVER = -30.0  # the bias of a gate that lets no token leave before the last loop


def config_from_ouro(ouro: Mapping[str, Any]) -> LoopedConfig:
    """The decoder's configuration from Ouro's config.json.

    Raises ValueError for a configuration that is not Ouro's, lacks a field, or asks for what the decoder does not have:
    grouped heads, a head size of its own, sliding windows, scaled rotary positions, another activation.
    """
    if ouro.get("model_type") != "ouro":
        raise ValueError(f"model_type of Ouro's configuration must be ouro. Got {ouro.get('model_type')!r}.")
    try:
        n_heads, d_model = ouro["num_attention_heads"], ouro["hidden_size"]
        rotary = {"rope_theta": ouro.get("rope_theta")} | (
            ouro.get("rope_parameters") or ouro.get("rope_scaling") or {}
        )
        wanted = {
            "num_key_value_heads": (ouro.get("num_key_value_heads") or n_heads, n_heads),
            "head_dim": (ouro.get("head_dim") or d_model // n_heads, d_model // n_heads),
            "hidden_act": (ouro.get("hidden_act", "silu"), "silu"),
            "use_sliding_window": (bool(ouro.get("use_sliding_window")), False),
            "rope_type": (rotary.get("rope_type", rotary.get("type", "default")), "default"),
        }
        for name, (value, here) in wanted.items():
            if value != here:
                raise ValueError(f"{name} of Ouro's configuration must be {here} here. Got {value!r}.")
        return LoopedConfig(
            **SHAPE,
            vocab_size=ouro["vocab_size"],
            d_model=d_model,
            n_heads=n_heads,
            n_layers=ouro["num_hidden_layers"],
            d_ff=ouro["intermediate_size"],
            max_seq_len=ouro["max_position_embeddings"],
            n_loops=ouro["total_ut_steps"],
            dropout=0.0,
            exit_gate=True,
            tied=bool(ouro.get("tie_word_embeddings")),
            rope_theta=rotary["rope_theta"],
            norm_eps=ouro["rms_norm_eps"],
            embedding_std=ouro.get("initializer_range", 0.02),
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"Ouro's configuration cannot be used ({error!r:.160}).") from error


def config_to_ouro(config: LoopedConfig) -> dict[str, Any]:
    """Ouro's config.json for a decoder. Raises ValueError if the decoder is not of Ouro's shape, naming the field."""
    for name, wanted in SHAPE.items():
        if getattr(config, name) != wanted:
            raise ValueError(f"{name} must be {wanted} in Ouro's layout. Got {name}={getattr(config, name)}.")
    return {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.embedding_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "total_ut_steps": config.n_loops,
        "early_exit_threshold": 1.0,
        "auto_map": {
            "AutoConfig": "ByteDance/Ouro-1.4B--configuration_ouro.OuroConfig",
            "AutoModelForCausalLM": "ByteDance/Ouro-1.4B--modeling_ouro.OuroForCausalLM",
        },
    }


def weights_from_ouro(weights: Mapping[str, Tensor], config: LoopedConfig) -> dict[str, Tensor]:
    """The decoder's weights from Ouro's. Raises ValueError for names that are missing or left over."""
    left = dict(weights)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"Ouro's weights must hold {name}. Got {len(weights)} others.")
        return left.pop(name)

    ours = {"embedding.weight": take("model.embed_tokens.weight")}
    for layer in range(config.n_layers):
        theirs, mine = f"model.layers.{layer}.", f"blocks.{layer}."
        ours[f"{mine}attention.qkv.weight"] = torch.cat([take(f"{theirs}{name}.weight") for name in QKV])
        for name, here in LAYER.items():
            ours[f"{mine}{here}.weight"] = take(f"{theirs}{name}.weight")
    ours["loop_norm.weight"] = take("model.norm.weight")
    ours["readout_norm.weight"] = ours["loop_norm.weight"].clone()
    gate = {f"exit_gate.{name}": take(f"model.early_exit_gate.{name}") for name in ("weight", "bias")}
    if config.exit_gate:
        ours |= gate
    if config.tied:
        left.pop("lm_head.weight", None)  # the embedding again
    else:
        ours["head.weight"] = take("lm_head.weight")
    if left:
        raise ValueError(f"Ouro's weights must hold nothing else. Got {sorted(left)[0]}.")
    return ours


def weights_to_ouro(model: LoopedLM) -> dict[str, Tensor]:
    """Ouro's weights from a decoder's. One without an exit gate gets a gate that lets no token leave early.

    Raises ValueError if the decoder is not of Ouro's shape, or its two norms differ and cannot be made one.
    """
    config_to_ouro(model.config)
    ours = model.state_dict()
    norm = ours["loop_norm.weight"]
    if not torch.equal(norm, ours["readout_norm.weight"]):
        ours |= _read_through(norm, ours)
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": norm}
    for layer in range(model.config.n_layers):
        there, mine = f"model.layers.{layer}.", f"blocks.{layer}."
        parts = ours[f"{mine}attention.qkv.weight"].chunk(len(QKV))
        theirs |= {f"{there}{name}.weight": part.clone() for name, part in zip(QKV, parts, strict=True)}
        theirs |= {f"{there}{name}.weight": ours[f"{mine}{here}.weight"] for name, here in LAYER.items()}
    theirs["model.early_exit_gate.weight"] = ours.get("exit_gate.weight", torch.zeros_like(norm).unsqueeze(0))
    theirs["model.early_exit_gate.bias"] = ours.get("exit_gate.bias", torch.full_like(norm[:1], NEVER))
    if model.head is not None:
        theirs["lm_head.weight"] = ours["head.weight"]
    return theirs


def _read_through(norm: Tensor, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Head and gate that make of states behind this norm what ours make of them behind the readout's."""
    if "head.weight" not in ours or not bool(norm.all()):
        raise ValueError(
            "loop_norm and readout_norm must be equal in Ouro's layout, which has one norm, if the head is tied to the "
            f"embedding or a weight of loop_norm is 0. Got a difference of "
            f"{(norm - ours['readout_norm.weight']).abs().max().item():.3g}."
        )
    ratio = ours["readout_norm.weight"].double() / norm.double()
    return {
        name: (ours[name].double() * ratio).to(ours[name].dtype)
        for name in ("head.weight", "exit_gate.weight")
        if name in ours
    }


def load_ouro(name: str | Path) -> LoopedLM:
    """The decoder of a checkpoint in Ouro's layout, in evaluation mode, in the checkpoint's dtype.

    name: a directory, or a repository of the Hugging Face hub. Raises ValueError, in one line, for a hub that cannot be
    reached or whose client is missing, files that are missing or damaged, and what `config_from_ouro` and
    `weights_from_ouro` refuse.
    """
    directory = Path(name) if Path(name).is_dir() else _download(str(name))
    config = config_from_ouro(_read_json(directory / CONFIG))
    weights = weights_from_ouro(_read_weights(directory), config)
    with torch.device("meta"):
        model = LoopedLM(config)
    for key, place in model.state_dict().items():
        if weights[key].shape != place.shape:
            raise ValueError(f"{key} must have the shape {list(place.shape)}. Got {list(weights[key].shape)}.")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def write_ouro(model: LoopedLM, directory: Path, *, eos_token_id: int | None = None) -> None:
    """Write a decoder in Ouro's layout to a directory that exists.

    eos_token_id: the token that ends a document, at which generation stops. Raises as `weights_to_ouro` does, before
    anything is written.
    """
    weights = weights_to_ouro(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = config_to_ouro(model.config) | {"dtype": dtype, "eos_token_id": eos_token_id}
    safetensors.torch.save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"name must be a directory where huggingface_hub is missing: pip install 'looped-lm[hf]'. Got {repository}."
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"name must be a directory or a repository of the Hugging Face hub that can be reached. Got {repository} "
            f"({' '.join(str(error).split()):.100})."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used ({error!r:.120}).") from error


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Of one safetensors file, or of the several that an index names."""
    files = [WEIGHTS]
    if not (directory / WEIGHTS).exists():
        names = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise ValueError(f"weight_map of {directory / INDEX} must give the file of each weight. Got {names!r:.60}.")
        files = sorted(set(names.values()))
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= safetensors.torch.load_file(directory / file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{directory / file} cannot be read ({error!s:.160}).") from error
    return weights
