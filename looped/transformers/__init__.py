"""The decoder as a model of Hugging Face's transformers: saved, loaded, generated from and trained as theirs are.

    from looped.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained("export", depth=4)
    tokenizer = AutoTokenizer.from_pretrained("export")
    model.generate(**tokenizer("The state of the", return_tensors="pt"), max_new_tokens=20)

`python -m looped.export RUN --to transformers DIR` writes such a directory. Where this package is installed, it is
loaded with `trust_remote_code=True` too, without `register`: the code it then runs is this package's.

configuration -> attention (masks and the cache of transformers) -> model; card is the README.md of an export.
"""

from looped.transformers.configuration import LoopedPretrainedConfig
from looped.transformers.model import LoopedForCausalLM

__all__ = ["LoopedForCausalLM", "LoopedPretrainedConfig", "register"]


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM know these classes. May be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(LoopedPretrainedConfig.model_type, LoopedPretrainedConfig, exist_ok=True)
    AutoModelForCausalLM.register(LoopedPretrainedConfig, LoopedForCausalLM, exist_ok=True)
