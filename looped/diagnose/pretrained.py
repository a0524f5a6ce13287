"""Models as transformers saves them: loaded by name or directory, with text or tokens to measure on.

Those that `looped.adapters` knows, and our own as `looped.export` writes them.
"""

import dataclasses
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from looped.adapters import ADAPTERS
from looped.diagnose.adapted import from_model
from looped.diagnose.diagnosis import Diagnosis, as_trained, diagnose, validation_batches
from looped.diagnose.interventions import ALPHAS, sweep_alpha
from looped.diagnose.model import Batch, LoopedModel
from looped.model import LoopedLM
from looped.run_directory import Validation

OURS = "looped_lm"  # the model_type of an export
SEQ_LEN = 256  # of a window, where the model takes so many
MASKED_SHARE = 0.15  # of the tokens that a masked language model has to predict (BERT, arXiv 1810.04805)


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode, in float32, and what it is measured on. notes: what the page says of its origin."""

    name: str
    model: nn.Module
    batches: list[Batch]
    notes: dict[str, str]

    def diagnose(self, horizon: int, *, rounds: int = 0) -> Diagnosis:
        """The diagnosis. rounds: as `diagnose` takes it. Raises as it and `describe` do."""
        described = describe(self.model, self.batches)
        found = diagnose(described, self.batches, name=self.name, horizon=horizon, rounds=rounds)
        return dataclasses.replace(found, origin=found.origin | self.notes)


def describe(model: nn.Module, batches: Sequence[Batch]) -> LoopedModel:
    """A model that `load_pretrained` has loaded, as a LoopedModel.

    An export of this project has the weights of its own supervision. A gate's are means over the batches.
    """
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, LoopedLM):
        return from_model(model)
    config: Any = model.config
    return as_trained(decoder, batches, config.supervision, config.penalty, config.backprop_loops)


def load_pretrained(
    name: str, data: str, *, n_tokens: int, seq_len: int | None, device: str = "cpu", trust_remote_code: bool = False
) -> Pretrained:
    """A model, and windows of text to measure it on: `n_tokens` tokens in all, `seq_len` in each.

    seq_len: None for 256, or for the model's longest where that is shorter.
    name: a directory that save_pretrained wrote, or a model of the hub. trust_remote_code: run the code that comes with
    it, as transformers means it.
    data: a pattern of text files, for the model's tokenizer; or a .safetensors file with `tokens` [n], as a run has.
    Of a masked language model 15% of the tokens are masked, the same at every call, and all tokens are predicted.

    Raises ValueError, in one line, for whatever is missing or does not fit; the files of the data are read first.
    """
    files = _files(data)
    content = _config(name, trust_remote_code)
    longest = _longest(content)
    seq_len = min(SEQ_LEN, longest or SEQ_LEN) if seq_len is None else seq_len
    if not 1 <= seq_len <= (longest or seq_len):
        raise ValueError(f"seq_len must be in [1, {longest or 'any'}], the model's longest. Got {seq_len}.")
    masked = content["model_type"] == "albert"
    as_text = any(file.suffix != ".safetensors" for file in files)
    tokenizer = _load(name, "AutoTokenizer", trust_remote_code) if as_text or masked else None
    tokens = _read_tokens(files, tokenizer)
    vocabulary = _number(content, "padded_vocab_size", "vocab_size")
    if vocabulary is not None and (len(tokens) == 0 or int(tokens.max()) >= vocabulary or int(tokens.min()) < 0):
        found = "none" if len(tokens) == 0 else f"{int(tokens.min())} to {int(tokens.max())}"
        raise ValueError(f"data must hold tokens below the model's vocabulary of {vocabulary}. Got {found}.")
    bounds = torch.tensor([0, len(tokens)])
    batches = validation_batches(Validation(tokens, bounds, None), seq_len=seq_len, n_tokens=n_tokens)
    if masked:
        batches = mask_tokens(batches, getattr(tokenizer, "mask_token_id", None))
    loader = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _load(name, loader, trust_remote_code, dtype=torch.float32, **options)
    drawn = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]  # by transformers, at random
    if drawn:
        kind = type(model).__name__
        raise ValueError(f"model must hold all weights of {kind}, in its shapes. Got {name} without {min(drawn)}.")
    model = model.to(device).eval().requires_grad_(False)
    notes = {"model": name, "data": Path(data).name}
    if content["model_type"] == "hrm_text":
        notes["state"] = "both states before their norms, side by side"
    if masked:
        notes["masked"] = f"{MASKED_SHARE:.0%} of the tokens; all are predicted"
    return Pretrained(
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        model=model,
        batches=[(inputs.to(device), targets.to(device)) for inputs, targets in batches],
        notes=notes,
    )


def mask_tokens(batches: Sequence[Batch], mask: int | None) -> list[Batch]:
    """Batches of a masked language model: 15% of the inputs are `mask`; the targets are the inputs as they were."""
    if mask is None:
        raise ValueError("the tokenizer of a masked language model must have a mask token. Got none.")
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(inputs.shape, generator=generator) for inputs, _ in batches]
    return [
        (inputs.masked_fill(draw < MASKED_SHARE, mask), inputs)
        for (inputs, _), draw in zip(batches, draws, strict=True)
    ]


# The size of the state before the readout -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaleCheck:
    """Loop k read with its state as it is, and scaled by 0.1 to 10. In nats.

    ce: as it is, with the readout's norm. with_norm, without_norm: the largest cross-entropy over the scales minus the
    smallest, with the norm and with none before the head.
    """

    loop: int
    ce: float
    with_norm: float
    without_norm: float


def scale_checks(model: nn.Module, batches: Sequence[Batch], n_loops: int = 8) -> list[ScaleCheck]:
    """How much the scale of H_1..H_n matters to the readout, with its norm and without. n is n_loops.

    Sharma & Vu (arXiv 2606.24898) check this of Ouro. Loops beyond the trained ones are run as those are. Raises
    ValueError for n_loops < 1.
    """
    described = dataclasses.replace(describe(model, batches), n_loops=n_loops, weights=None)
    normed, raw = (sweep_alpha(read, batches) for read in (described, dataclasses.replace(described, norm=None)))
    as_it_is = ALPHAS.index(1.0)
    return [
        ScaleCheck(loop, ce[as_it_is], with_norm, without_norm)
        for loop, (ce, with_norm, without_norm) in enumerate(zip(normed.ce, normed.ranges, raw.ranges, strict=True), 1)
    ]


def scale_table(checks: Sequence[ScaleCheck]) -> str:
    """As lines of text."""
    head = "   k        CE   scaled by 0.1 to 10: CE moves by   without the readout's norm by"
    rows = [
        f"{check.loop:4} {check.ce:9.4f} {check.with_norm:29.3g} nats {check.without_norm:26.3g} nats"
        for check in checks
    ]
    return "\n".join([head, *rows])


# Files ----------------------------------------------------------------------------------------------------------------


def _files(data: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(data, recursive=True)) if Path(name).is_file()]
    if not files:
        raise ValueError(f"data must be files that are there. Got {data}.")
    return files


def _read_tokens(files: Sequence[Path], tokenizer: Any) -> Tensor:
    """The tokens [n] int64 of all files, one after the other."""
    parts = []
    for file in files:
        try:
            if file.suffix == ".safetensors":
                parts.append(safetensors.torch.load_file(file)["tokens"].long().flatten())
            else:
                text = file.read_text(encoding="utf-8")
                read = tokenizer(text, add_special_tokens=False)["input_ids"]
                parts.append(torch.tensor(read, dtype=torch.int64))
        except (OSError, UnicodeDecodeError, SafetensorError, KeyError) as error:
            rule = "data must be text in UTF-8, or tokens in a .safetensors file"
            raise ValueError(f"{rule}. {file} cannot be read ({error!r:.120}).") from error
    return torch.cat(parts)


# transformers ---------------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import huggingface_hub  # slow to import, and needed here alone
        import transformers
    except ImportError as error:
        raise ValueError(f"a model by name needs transformers: pip install 'looped-lm[hf]' ({error}).") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # a hub out of reach is one line, and not one for every try
    return transformers


def _config(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """The model's config.json, if its code is here and the model is known."""
    transformers = _transformers()
    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind == OURS:
        from looped.transformers import register

        register()
    elif not isinstance(kind, str) or kind not in ADAPTERS:
        raise ValueError(
            f"model must be one of {', '.join(sorted([*ADAPTERS, OURS]))}. Got {name} of model_type {kind!r}."
        )
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING and not trust_remote_code:
        raise ValueError(
            f"a model whose code comes with it needs --trust-remote-code: look at the code first. Got {name} of {kind}."
        )
    return dict(content)


def _longest(content: dict[str, Any]) -> int | None:
    """The most tokens that the model of a config.json takes; None for any number."""
    if content["model_type"] == OURS:
        return _number(content, "max_seq_len") if content.get("positions") == "learned" else None
    return _number(content, "max_position_embeddings", "block_size")


def _number(content: dict[str, Any], *names: str) -> int | None:
    """The first of these fields that a config.json has. Raises ValueError unless it is an integer of at least 1."""
    name = next((name for name in names if content.get(name) is not None), None)
    if name is not None and (type(content[name]) is not int or content[name] < 1):
        raise ValueError(f"{name} of the model's config.json must be an integer of at least 1. Got {content[name]!r}.")
    return None if name is None else content[name]


def _load(name: str, loader: str, trust_remote_code: bool, **options: Any) -> Any:
    """What one of transformers' Auto classes loads."""
    try:
        return getattr(_transformers(), loader).from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except OSError as error:
        raise ValueError(_not_found(name, error)) from error
    except Exception as error:  # the code that comes with a model may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{loader} cannot load {name} ({type(error).__name__}: {reason:.160}).") from error


def _not_found(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return (
        "model must be a directory that save_pretrained wrote, or a model of the hub, if that can be reached. "
        f"Got {name} ({reason:.160})"
    )
