"""config.json of the decoder, as transformers writes and reads it."""

from dataclasses import asdict, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from looped.config import LoopedConfig
from looped.supervision import Gated, Supervision

# Where AutoConfig and AutoModelForCausalLM find the classes with trust_remote_code=True: in a file beside config.json.
AUTO_FILE = "looped_lm.py"
AUTO_MAP = {
    "AutoConfig": "looped_lm.LoopedPretrainedConfig",
    "AutoModelForCausalLM": "looped_lm.LoopedForCausalLM",
}
AUTO_CODE = '''"""The classes that config.json names. They are in the package looped-lm, which must be installed."""

from looped.transformers import LoopedForCausalLM, LoopedPretrainedConfig

__all__ = ["LoopedForCausalLM", "LoopedPretrainedConfig"]
'''


class LoopedPretrainedConfig(PreTrainedConfig):
    """Every field of `looped.LoopedConfig`, flat, and what transformers' calls leave no room for:

    depth: K, how often the stack is applied here. It may be changed at any time; by default n_loops.
    supervision, penalty: of the loss that labels give, as `LoopedLM.readout_loss` describes them.
    backprop_loops: of the loss, as `LoopedLM.forward` takes it; None for all.
    gate_beta, gate_prior: of gated supervision, as `looped.supervision.Gated` describes them.
    run: what is known of the run that the weights are from; the model card shows it. {} if nothing is.

    Raises ValueError for a depth that is no int of at least 1, TypeError or ValueError as LoopedConfig and Gated do,
    and TypeError where a field without default is missing.
    """

    model_type = "looped_lm"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "per_loop"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tied",
    }

    def __init__(
        self,
        *,
        depth: int | None = None,
        supervision: Supervision = "per-loop",
        penalty: float = 0.0,
        backprop_loops: int | None = None,
        gate_beta: float = Gated.beta,
        gate_prior: str = Gated.prior,
        run: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        names = [field.name for field in fields(LoopedConfig)]
        shape = LoopedConfig(**{name: options.pop(name) for name in names if name in options})
        for name, value in asdict(shape).items():
            setattr(self, name, value)
        self.depth = shape.n_loops if depth is None else depth
        self.supervision = supervision
        self.penalty = penalty
        self.backprop_loops = backprop_loops
        gate = Gated(gate_beta, gate_prior)
        self.gate_beta, self.gate_prior = gate.beta, gate.prior
        self.run = {} if run is None else run
        self.auto_map = AUTO_MAP
        super().__init__(**{name: value for name, value in options.items() if name != "auto_map"})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "depth" and (type(value) is not int or value < 1):
            raise ValueError(f"depth must be an int of at least 1. Got {value!r}.")
        super().__setattr__(name, value)

    @classmethod
    def of(cls, shape: LoopedConfig, **options: Any) -> "LoopedPretrainedConfig":
        return cls(**asdict(shape), **options)

    @property
    def shape(self) -> LoopedConfig:
        """The decoder's own configuration."""
        return LoopedConfig(**{field.name: getattr(self, field.name) for field in fields(LoopedConfig)})

    @property
    def loss_supervision(self) -> Supervision | Gated:
        """The supervision of the loss, with its options."""
        return Gated(self.gate_beta, self.gate_prior) if self.supervision == "gated" else self.supervision

    @property
    def num_hidden_layers(self) -> int:
        """The layers that a token goes through, each of which has its place in a cache."""
        return self.n_prelude + self.n_coda + self.depth * self.n_layers
