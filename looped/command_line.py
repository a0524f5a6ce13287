"""Command lines: from dataclasses, whose fields are the options and whose docstrings are the help, and by argparse."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
import tyro

Options = TypeVar("Options")


def command_line(argv: list[str], defaults: Options, prog: str | None = None) -> Options:
    """Parse ``argv`` over ``defaults``, a dataclass; tyro's box of several lines becomes a ValueError of one.

    A default that is tyro.MISSING must be given. prog: what the help calls the program; None for its file.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(type(defaults), args=argv, default=defaults, prog=prog)
    except SystemExit as exit_:
        if not exit_.code:
            raise  # --help
        lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()]
        message = " ".join(line for line in lines if line)
        raise ValueError(message.partition("For full helptext")[0]) from None


def device_named(name: str) -> str:
    """auto, cpu or cuda; auto is a GPU where there is one. Raises ValueError for cuda without a GPU."""
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device must be one that PyTorch finds here. Got device=cuda.")
    return ("cuda" if found else "cpu") if name == "auto" else name


def count(word: str) -> int:
    """A whole number of at least 1, as a type of argparse's options."""
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Got {number}.")
    return number


class Parser(argparse.ArgumentParser):
    """argparse's. Its help keeps the description's lines. Usage and error become one line; the exit code is 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        for word in words:  # argparse makes an empty list of it, whatever the option's type is
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"an option must have a value other than --. Got {word}.")
        return super().parse_args(words, namespace)
