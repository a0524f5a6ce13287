"""Hostile inputs: how many are drawn, how long each may take, how files are damaged, and what a refusal looks like.

Each test draws a few in the ordinary suite, always the same. ``HOSTILE=32`` in the environment has it draw 32 times as
many, and others every time.
"""

import contextlib
import copy
import io
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

SECONDS = 30.0  # that any one input may take, on a machine that does other work too


def drawn(few: int) -> settings:
    """Settings of a test that draws ``few`` inputs, or as many times that as the environment asks for."""
    asked = os.environ.get("HOSTILE")
    return settings(
        max_examples=few * int(asked or 1),
        derandomize=asked is None,
        database=None,
        deadline=timedelta(seconds=SECONDS),
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        print_blob=True,
    )


class _Hangs(BaseException):
    """No ``except Exception`` of what is tested takes it."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Fails what takes longer. The alarm that was set before goes on, less the time that has passed."""

    def stop(*_: object) -> None:
        raise _Hangs

    handler, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Hangs:
        raise AssertionError(f"must end within {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (time.monotonic() - began)))


def contents(directory: Path) -> dict[str, bytes]:
    """Every name below a directory, with what is in the files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
    }


def outcome(main: Callable[[list[str]], int | None], argv: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a program, run here. A traceback is an exception."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv) or 0
        except SystemExit as exit_:  # --help
            code = exit_.code if isinstance(exit_.code, int) else 1
    return code, err.getvalue()


def assert_refusal(code: int, error: str) -> None:
    """Exit code 2, and one line that says why."""
    assert code == 2, (code, error)
    assert re.fullmatch(r"error: [^\n]+\n", error), error


def assert_rejected(
    main: Callable[[list[str]], int | None], argv: list[str], directory: Path, message: str, capsys: Any
) -> None:
    """A refusal that says ``message``, prints nothing else, and leaves ``directory`` as it was, or still not there."""
    before = directory.exists(), contents(directory)
    capsys.readouterr()
    code, printed = main(argv), capsys.readouterr()
    assert_refusal(code or 0, printed.err)
    assert re.search(message, printed.err), printed.err
    assert printed.out == ""
    assert (directory.exists(), contents(directory)) == before


RULES = "must|cannot|needs?|is torn|is too short|is empty|holds no|checkpoint of another|do not make up"


def assert_says_why(error: Exception) -> None:
    """One line with the rule and, mostly, the value that broke it."""
    assert re.fullmatch(rf"[^\n]*\b({RULES})\b[^\n]*", str(error)), error


HUGE = [2**31, 2**63, 10**30, -1, -(2**63), 0]
ODD: list[Any] = [
    None,
    True,
    "",
    "x",
    "\x00",
    "é\u2028",
    [],
    {},
    [[]],
    {"a": None},
    1.5,
    float("nan"),
    float("inf"),
    *HUGE,
]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """The content cut, with bits flipped, bytes put in or taken out, or a part of it twice."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                del data[at:]
            case 1 if data:
                data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 2:
                data[at:at] = draw.choice(
                    [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"{", b'"', b"\r"]
                )
            case 3:
                del data[at : at + draw.randint(1, 64)]
            case 4:
                data[at:at] = data[at : at + draw.randint(1, 64)]
            case 5:
                data[at:at] = draw.randbytes(draw.randint(1, 16))
    return bytes(data)


def lying(value: Any, draw: random.Random) -> Any:
    """JSON with one to three of its values replaced, left out, or said twice under another name."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        place = value
        while True:
            if isinstance(place, dict) and place:
                key: Any = draw.choice(list(place))
            elif isinstance(place, list) and place:
                key = draw.randrange(len(place))
            else:
                break
            if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
                place = place[key]
                continue
            match draw.randrange(6):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[draw.choice(["", "x", str(key) + " "])] = copy.deepcopy(place[key])
                case 2 if isinstance(place[key], int):
                    place[key] = place[key] + draw.choice([-1, 1])
                case _:
                    place[key] = copy.deepcopy(draw.choice(ODD))
            break
    return value
