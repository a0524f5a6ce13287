"""A run's directory, written and read: its lock, tokenizer, configuration, validation text and model.

config.json has the run's configuration under ``train`` and the model's under ``model``. validation.safetensors is the
whole validation split, so that whoever has the directory can measure on its text: tokens [n]; bounds [documents + 1],
where documents begin and end; and, if bits per byte are defined, bytes_per_token [V]; each in small integers. For a
task its documents are sequences, with targets [n] beside them. tokenizer.json is of the tokenizers library; a task has
none. The checkpoint is described in looped/checkpoint.py.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from looped import checkpoint
from looped.config import LoopedConfig
from looped.field_types import check_field_types
from looped.model import LoopedLM
from looped.supervision import IGNORE_INDEX, Gated, Supervision
from looped.whole_file import read_json, regular, replacing

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system
    fcntl = None

CONFIG, TOKENIZER, VALIDATION = "config.json", "tokenizer.json", "validation.safetensors"


@dataclass(frozen=True)
class Validation:
    """A run's whole validation split.

    tokens: [n] int64. bounds: [documents + 1] int64; document i is tokens[bounds[i] : bounds[i + 1]], its
    end-of-document token included. bytes_per_token: [V] int64, UTF-8 bytes that each token stands for, 0 for special
    tokens; None if the tokenizer loses text, so that bits per byte are not defined. targets: [n] int64, what is to be
    predicted at each token of a task's sequences, -100 for nothing; None for text, where it is the next token.
    """

    tokens: Tensor
    bounds: Tensor
    bytes_per_token: Tensor | None
    targets: Tensor | None = None


@dataclass(frozen=True)
class Training:
    """Of a run's options, those of train/config.py, what is read here. Early runs lack those that have a default."""

    data: str
    tokenizer: str | None
    supervision: Supervision
    penalty: float
    backprop_loops: int | None = None
    gate_beta: float = Gated.beta
    gate_prior: str = Gated.prior


@dataclass(frozen=True)
class SavedRun:
    """name: of the directory. config: its config.json. model: in evaluation mode, on the CPU, in fp32, after ``step``
    optimisation steps. weights_hash: of the model's weights, as `looped.checkpoint.weights_hash` gives it."""

    name: str
    directory: Path
    config: dict[str, Any]
    model: LoopedLM
    validation: Validation
    step: int
    weights_hash: str


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


def hold(out: Path) -> int | None:
    """Lock a directory until the returned descriptor is closed, at the latest when this process ends.

    Raises ValueError if another process has it. On a system or file system without locks everybody has it.
    """
    if fcntl is None:
        return None
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"out must not be in use. Another process trains there. Got out={out}.") from None
    except OSError:
        pass
    return handle


def write_config(out: Path, train: dict[str, Any], model: LoopedConfig) -> None:
    """``train``: fields that JSON can write."""
    with replacing(out / CONFIG) as scratch:
        content = json.dumps({"train": train, "model": asdict(model)}, indent=2, allow_nan=False)
        scratch.write_text(content + "\n", encoding="utf-8")


def write_tokenizer(out: Path, content: str) -> None:
    with replacing(out / TOKENIZER) as scratch:
        scratch.write_text(content, encoding="utf-8")


def write_validation(
    out: Path,
    tokens: np.ndarray,
    bounds: np.ndarray,
    *,
    bytes_per_token: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> None:
    """``bytes_per_token``: None if bits per byte are not defined. ``targets``: of a task."""
    arrays = {"tokens": tokens, "bounds": bounds, "bytes_per_token": bytes_per_token, "targets": targets}
    small = {
        name: array.astype(np.result_type(*map(np.min_scalar_type, (array.min(), array.max()))))
        for name, array in arrays.items()
        if array is not None
    }
    with replacing(out / VALIDATION) as scratch:
        scratch.write_bytes(safetensors.numpy.save(small))


def remove_beginnings(out: Path) -> None:
    """Remove what the functions above have written."""
    for name in (CONFIG, VALIDATION, TOKENIZER):
        (out / name).unlink(missing_ok=True)


def read_config(out: Path) -> dict[str, Any]:
    """The config.json of a run. Raises ValueError if there is none, or it is damaged."""
    path = out / CONFIG
    try:
        config = read_json(path)
        return {"train": dict(config["train"]), "model": dict(config["model"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used ({error!r:.120}).") from error


def load_run(directory: Path) -> SavedRun:
    """The run that training left in ``directory``, from its config.json, checkpoint/ and validation.safetensors.

    The random generators are left as they were. Raises ValueError, in one line, naming what is missing or wrong.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"a run must be a directory that training wrote. {directory} is none.")
    config = read_config(directory)
    try:
        shape = LoopedConfig(**config["model"])
        options = config["train"]
        training = Training(**{field.name: options[field.name] for field in fields(Training) if field.name in options})
        check_field_types(training)
        config["train"] |= asdict(training)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG} cannot be used ({error!r:.160}).") from error
    place = checkpoint.found(directory)
    progress = checkpoint.check_whole(place, ["model"])
    with torch.device("meta"):  # no memory for sizes that the weights may not have
        model = LoopedLM(shape)
    model.load_state_dict(checkpoint.read_weights(place, model), assign=True)
    return SavedRun(
        name=directory.resolve().name,
        directory=directory,
        config=config,
        model=model.eval().requires_grad_(False),
        validation=_read_validation(directory / VALIDATION, shape.vocab_size),
        step=progress.step,
        weights_hash=checkpoint.weights_hash(directory) or "",
    )


def _read_validation(path: Path, vocab_size: int) -> Validation:
    try:
        arrays = safetensors.numpy.load_file(regular(path))
        least = {"tokens": 0, "bounds": 0, "bytes_per_token": 0, "targets": IGNORE_INDEX}
        names = [name for name in least if name in {"tokens", "bounds", *arrays}]
        tensors = {name: _integers(arrays[name], f"{path} has {name}, which", least[name]) for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be used ({error!r:.160}).") from error
    tokens, bounds = tensors["tokens"], tensors["bounds"]
    if len(tokens) == 0 or int(tokens.max()) >= vocab_size:
        found = "none" if len(tokens) == 0 else int(tokens.max())
        raise ValueError(f"{path} must hold tokens below vocab_size={vocab_size}. Got {found}.")
    if len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != len(tokens) or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"{path} must hold bounds that rise from 0 to its {len(tokens)} tokens. Got {bounds.tolist()!s:.80}."
        )
    sizes, targets = tensors.get("bytes_per_token"), tensors.get("targets")
    if targets is not None and targets.shape != tokens.shape:
        raise ValueError(f"{path} must hold a target for each of its {len(tokens)} tokens. Got {len(targets)}.")
    if targets is not None and int(targets.max()) >= vocab_size:
        raise ValueError(f"{path} must hold targets below vocab_size={vocab_size}. Got {int(targets.max())}.")
    if sizes is not None:
        # The model's vocabulary may be larger than the tokenizer's; what it adds stands for nothing.
        sizes = F.pad(sizes, (0, max(0, vocab_size - len(sizes))))
    return Validation(tokens, bounds, sizes, targets)


def _integers(array: np.ndarray, what: str, low: int) -> Tensor:
    """Integers [n] as int64. Raises ValueError for what is none, or below ``low``, as what overflows is."""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers [n]. Got {array.dtype} {list(array.shape)}.")
    tensor = torch.from_numpy(array.astype("int64"))
    if len(tensor) and int(tensor.min()) < low:
        raise ValueError(f"{what} must be at least {low}. Got {int(tensor.min())}.")
    return tensor
