"""A finished or stopped run, read back from its directory: the model, and the text that it is measured on."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from looped.config import LoopedConfig
from looped.decoder import LoopedDecoder


@dataclass(frozen=True)
class Validation:
    """A run's whole validation split.

    tokens: [n] int64. bounds: [documents + 1] int64; document i is tokens[bounds[i] : bounds[i + 1]], its
    end-of-document token included. bytes_per_token: [V] int64, UTF-8 bytes that each token stands for, 0 for special
    tokens; None if the tokenizer loses text, so that bits per byte are not defined.
    """

    tokens: Tensor
    bounds: Tensor
    bytes_per_token: Tensor | None


@dataclass(frozen=True)
class SavedRun:
    """name: of the directory. config: its config.json. model: in evaluation mode, on the CPU, in fp32."""

    name: str
    directory: Path
    config: dict[str, Any]
    model: LoopedDecoder
    validation: Validation


def nearest_existing(path: Path) -> Path:
    """The path, or the closest of the directories above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def check_writable(out: Path) -> None:
    """Raise ValueError unless ``out`` is, or could become, a directory to write in.

    Tried, not asked: os.access lets root write anywhere.
    """
    try:
        with tempfile.TemporaryDirectory(dir=nearest_existing(out)):
            pass
    except OSError as error:
        raise ValueError(f"out must be a directory that can be written. Got out={out} ({error.strerror}).") from error


def load_run(directory: Path) -> SavedRun:
    """The run that training left in ``directory``, from its config.json, checkpoint/ and validation.safetensors.

    The random generators are left as they were. Raises ValueError, in one line, naming what is missing or wrong.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"a run must be a directory that training wrote. {directory} is none.")
    config, shape = _read_config(directory / "config.json")
    with torch.random.fork_rng(devices=[]):
        model = LoopedDecoder(shape)
    _load_weights(model, directory)
    validation = _read_validation(directory / "validation.safetensors", shape.vocab_size)
    return SavedRun(directory.resolve().name, directory, config, model.eval().requires_grad_(False), validation)


def _read_config(path: Path) -> tuple[dict[str, Any], LoopedConfig]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config, LoopedConfig(**config["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used ({error!r:.160}).") from error


def _load_weights(model: LoopedDecoder, directory: Path) -> None:
    # The trainer keeps the previous checkpoint, as checkpoint.old, until the new one is in place.
    paths = [directory / name / "model.safetensors" for name in ("checkpoint", "checkpoint.old")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{directory} holds no checkpoint/model.safetensors.")
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    here = {name: list(value.shape) for name, value in model.state_dict().items()}
    there = {name: list(value.shape) for name, value in weights.items()}
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{path} is not of the model in config.json: {name} is {there.get(name, 'missing')} in the file and "
                f"{here.get(name, 'missing')} in the model."
            )
    model.load_state_dict(weights)


def _read_validation(path: Path, vocab_size: int) -> Validation:
    try:
        arrays = safetensors.numpy.load_file(path)
        tensors = {name: torch.from_numpy(array.astype("int64")) for name, array in arrays.items()}
        tokens, bounds, sizes = tensors["tokens"], tensors["bounds"], tensors.get("bytes_per_token")
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be used ({error!r:.160}).") from error
    if len(tokens) == 0 or int(tokens.max()) >= vocab_size:
        found = "none" if len(tokens) == 0 else int(tokens.max())
        raise ValueError(f"{path} must hold tokens below vocab_size={vocab_size}. Got {found}.")
    if len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != len(tokens) or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"{path} must hold bounds that rise from 0 to its {len(tokens)} tokens. Got {bounds.tolist()!s:.80}."
        )
    if sizes is not None:
        # The model's vocabulary may be larger than the tokenizer's; what it adds stands for nothing.
        sizes = F.pad(sizes, (0, max(0, vocab_size - len(sizes))))
    return Validation(tokens, bounds, sizes)
