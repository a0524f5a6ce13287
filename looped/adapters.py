"""Recurrent models of others that are known by name: where their states, norm and head are.

A model is recognised by `config.model_type`, as transformers writes it. HRM-Text and ALBERT are part of transformers;
Ouro (arXiv 2510.25741), Huginn (arXiv 2502.05171) and Nanbeige4.2 bring their code with their weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One model, as names of its modules.

    kind: its model_type. n_loops: K as configured.
    norm, head: the readout. states: the module whose outputs are the states; None: the states are the norm's inputs.
    coda: modules between a state and the norm, in order.
    loop: the modules that one loop consists of, in order. feeds_back_norm: whether a loop starts from norm(H_k).
    gate: of Ouro, the module whose outputs are the logits of leaving after each loop.
    shifts: whether the model's own loss compares the prediction at t with the label at t + 1.
    """

    kind: str
    n_loops: int
    norm: str
    head: str = "lm_head"
    states: str | None = None
    coda: tuple[str, ...] = ()
    loop: tuple[str, ...] = ()
    feeds_back_norm: bool = False
    gate: str | None = None
    shifts: bool = True


def find_adapter(model: nn.Module, otherwise: str = "") -> Adapter:
    """The adapter of a model. otherwise: what the caller takes instead of a known model, for the message.

    Raises ValueError for an unknown model, one without its head, and one configured in a way that is not known.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        got = type(model).__name__ + (f" of model_type {kind!r}" if kind else "")
        wrapped = ", which wraps one: give its .module" if isinstance(getattr(model, "module", None), nn.Module) else ""
        raise ValueError(f"model must be one of {known}{otherwise}. Got {got}{wrapped}.")
    for name, value in REQUIRED.get(kind, {}).items():
        found = getattr(config, name, value)
        if (found or None) != (value or None):
            raise ValueError(f"{name} must be {value!r} for a model of type {kind}. Got {found!r}.")
    adapter = ADAPTERS[kind](config)
    try:
        model.get_submodule(adapter.head)
    except AttributeError:
        got = type(model).__name__
        raise ValueError(f"model must have its head, the module {adapter.head}. Got {got}, which has none.") from None
    return adapter


def _hrm_text(config: Any) -> Adapter:
    """H_cycles times: L_cycles of L_module on (z_L + z_H), then H_module on (z_H + z_L). Each ends in its own norm."""
    return Adapter(kind="hrm_text", n_loops=config.H_cycles, norm="model.H_module.final_norm", feeds_back_norm=True)


def _albert(config: Any) -> Adapter:
    """One layer, num_hidden_layers times. The masked LM head has a linear layer and an activation before its norm."""
    layers = "albert.encoder.albert_layer_groups.0"
    return Adapter(
        kind="albert", n_loops=config.num_hidden_layers, norm="predictions.LayerNorm", head="predictions.decoder",
        states=layers, coda=("predictions.dense", "predictions.activation"), loop=(layers,), shifts=False,
    )  # fmt: skip


def _ouro(config: Any) -> Adapter:
    """All layers total_ut_steps times, the norm after each time and its result fed back."""
    return Adapter(
        kind="ouro", n_loops=config.total_ut_steps, norm="model.norm", loop=_layers(config.num_hidden_layers),
        feeds_back_norm=True, gate="model.early_exit_gate",
    )  # fmt: skip


def _nanbeige(config: Any) -> Adapter:
    """All layers num_loops times. With skip_loop_final_norm the norm comes once, after the last time."""
    layers, once = _layers(config.num_hidden_layers), bool(getattr(config, "skip_loop_final_norm", False))
    loop_weights = getattr(config, "loop_loss_weights", None)
    return Adapter(
        kind="nanbeige", n_loops=len(loop_weights) + 1 if loop_weights else config.num_loops, norm="model.norm",
        states=layers[-1] if once else None, loop=layers, feeds_back_norm=not once,
    )  # fmt: skip


def _huginn(config: Any) -> Adapter:
    """A prelude; the core block some 32 times, with the prelude's output; the norm, a coda, and the norm again."""
    core = [f"transformer.core_block.{layer}" for layer in range(config.n_layers_in_recurrent_block)]
    coda = [f"transformer.coda.{layer}" for layer in range(config.n_layers_in_coda)]
    return Adapter(
        kind="huginn_raven", n_loops=config.mean_recurrence, norm="transformer.ln_f", states=core[-1],
        coda=("transformer.ln_f", *coda), loop=("transformer.adapter", *core), shifts=False,
    )  # fmt: skip


def _layers(n_layers: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}" for layer in range(n_layers))


ADAPTERS: Mapping[str, Callable[[Any], Adapter]] = {
    "albert": _albert,
    "hrm_text": _hrm_text,
    "huginn_raven": _huginn,
    "nanbeige": _nanbeige,
    "ouro": _ouro,
}
# What a configuration must say where another would mean another recurrence. An empty value stands for none at all.
REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "albert": {"num_hidden_groups": 1},
    "nanbeige": {
        "enable_double_loop_split": False,
        "enable_hyper_connection": False,
        "enable_depth_attention": False,
        "loop_share_kv": False,
        "insert_ngram_layer_idx": [],
    },
}
