"""``python -m looped.export RUN --to transformers DIR``: a run's model where other tools expect one.

    transformers  config.json, safetensors, tokenizer and model card, as `looped.transformers` loads them
    ouro          config.json, safetensors and tokenizer in the layout of ByteDance/Ouro-1.4B, for models of its shape
    safetensors   model.safetensors alone: all weights, under the model's own names, however many processes trained it

DIR must not exist, or be empty. It is there whole or not at all.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch

from looped.checkpoint import WEIGHTS
from looped.command_line import Parser
from looped.ouro_weights import write_ouro
from looped.run_directory import TOKENIZER, SavedRun, check_writable, load_run, nearest_existing
from looped.tokenizer_file import read_tokenizer_file
from looped.whole_file import read_json

# What tokenizers call their tokens, beside the one that ends a document.
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if the input is bad. Then nothing is written but one line on stderr, why."""
    options = _parser().parse_args(argv)
    try:
        check_target(options.directory)
        if options.to != "safetensors":
            _prepare_transformers()
        run = load_run(options.run)
        with whole_directory(options.directory) as scratch:
            EXPORTS[options.to](run, scratch)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.to} {options.directory}: {', '.join(sorted(path.name for path in options.directory.iterdir()))}")
    return 0


def check_target(directory: Path) -> None:
    """Raises ValueError unless a directory can be made there, or an empty one is there that can be replaced."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"DIR must not exist, or be an empty directory. Got {directory}.")
    if directory.is_mount() or directory.resolve() == Path.cwd():
        raise ValueError(f"DIR must not be a mount point or the current directory. Got {directory}.")
    check_writable(directory.resolve().parent)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write to. It becomes ``directory`` at the end, and after an error nothing is left of it."""
    directory = directory.resolve()  # a link leads to what is replaced
    place = nearest_existing(directory.parent)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=place) as scratch:
        whole = Path(scratch, directory.name)
        whole.mkdir()
        yield whole
        directory.parent.mkdir(parents=True, exist_ok=True)
        os.replace(whole, directory)


def to_transformers(run: SavedRun, directory: Path) -> None:
    """As `looped.transformers` loads it."""
    from looped.transformers import LoopedForCausalLM, LoopedPretrainedConfig

    tokenizer = _tokenizer(run)
    train = run.config["train"]
    config = LoopedPretrainedConfig.of(
        run.model.config,
        **{name: train[name] for name in ("supervision", "penalty", "backprop_loops", "gate_beta", "gate_prior")},
        run=provenance(run),
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LoopedForCausalLM(config)
    model.decoder.load_state_dict(run.model.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def to_ouro(run: SavedRun, directory: Path) -> None:
    """In the layout of ByteDance/Ouro-1.4B. Raises as `looped.ouro_weights.write_ouro` does."""
    tokenizer = _tokenizer(run)
    write_ouro(run.model, directory, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(directory)


def to_safetensors(run: SavedRun, directory: Path) -> None:
    """The weights in one file, as any program reads them."""
    weights = {name: value.contiguous() for name, value in run.model.state_dict().items()}
    (directory / WEIGHTS).write_bytes(safetensors.torch.save(weights, {"format": "pt"}))


EXPORTS = {"transformers": to_transformers, "ouro": to_ouro, "safetensors": to_safetensors}


def provenance(run: SavedRun) -> dict[str, Any]:
    """What the model card says of a run: from its configuration, its checkpoint and, where it ended, its summary."""
    path = run.directory / "summary.json"
    try:
        summary = dict(read_json(path)) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used ({error!r:.120}).") from error
    known = {
        "name": run.name,
        "parameters": run.model.parameter_count(),
        "data": run.config["train"]["data"],
        "steps": run.step,
        "tokens": summary.get("tokens"),
        "supervision": _supervision(run.config["train"]),
        "penalty": run.config["train"]["penalty"],
        "commit": summary.get("commit"),
        "weights": run.weights_hash or None,
        "evaluation": summary.get("evaluation"),
    }
    return {name: value for name, value in known.items() if value is not None}


def _supervision(train: dict[str, Any]) -> str:
    """In words."""
    name: str = train["supervision"]
    return f"{name} (beta {train['gate_beta']:g}, {train['gate_prior']} prior)" if name == "gated" else name


def _tokenizer(run: SavedRun) -> Any:
    """The run's tokenizer as transformers'. As in training, none is added, and a token's name in a text is text."""
    from transformers import PreTrainedTokenizerFast

    if run.validation.targets is not None:
        raise ValueError(f"RUN must be of text for a layout with a tokenizer: export a task's weights. Got {run.name}.")
    model = read_tokenizer_file(run.directory / TOKENIZER)
    end = model.id_to_token(int(run.validation.tokens[-1]))  # every document ends with it
    special = {name: token for name, token in SPECIAL.items() if model.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=end,
        **special,
        model_max_length=run.model.config.max_seq_len,
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _prepare_transformers() -> None:
    """Raises ValueError where it is missing."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"an export needs transformers: pip install 'looped-lm[hf]' ({error}).") from error
    logging.disable_progress_bar()  # of writing one file


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m looped.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run that training wrote")
    parser.add_argument("--to", choices=tuple(EXPORTS), required=True, help="what is to load it")
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory to make")
    return parser


if __name__ == "__main__":
    sys.exit(main())
