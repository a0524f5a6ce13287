"""``python -m looped.generate``: what it writes where, what it refuses, and text in whole characters."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tiny_run import arguments, text
from tokenizers import decoders, models, pre_tokenizers, trainers

from looped.generate import Exit, Generated, Options, generate
from looped.generate.__main__ import main
from looped.generate.text import TextStream
from looped.halting import MARGIN
from looped.run_directory import load_run, write_validation
from train.run import main as train

ROOT = Path(__file__).parents[1]
PROMPT = text(40)[:60]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rotary positions, whose length does not bound the text."""
    place = tmp_path_factory.mktemp("generate")
    assert train(arguments(place, "--positions", "rotary", "--steps", "2", "--out", str(place / "run"))) == 0
    return place / "run"


def tokenizer_of(run: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))


def generated(run: Path, options: Options, prompt: str = PROMPT) -> tuple[Generated, str]:
    """What `generate` gives, and the text of prompt and new tokens."""
    tokenizer = tokenizer_of(run)
    ids = tokenizer.encode(prompt).ids
    result = generate(load_run(run).model, [ids], options)
    return result, tokenizer.decode(ids + result.tokens[0], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], Options()),
        (
            ["--temperature", "0", "--max-new-tokens", "5", "--n-loops", "1"],
            Options(temperature=0, max_new_tokens=5, n_loops=1),
        ),
        (
            ["--top-k", "3", "--top-p", "0.9", "--seed", "4", "--temperature", "2"],
            Options(top_k=3, top_p=0.9, seed=4, temperature=2),
        ),
        (["--exit", "margin:0.02"], Options(exit=Exit(MARGIN, 0.02))),
        (["--speculate", "1", "--draft-tokens", "3"], Options(draft_loops=1, draft_tokens=3)),
        (["--shared-cache", "--seed", "1"], Options(shared_cache=True, seed=1)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",  # options have addresses in them
)
def test_the_text_is_that_of_generate(
    run: Path, words: list[str], options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([str(run), "--prompt", PROMPT, *words]) == 0
    out, err = capsys.readouterr()
    result, expected = generated(run, options)
    assert out == expected + "\n"
    assert out.startswith(PROMPT)
    assert err.startswith(f"{options.max_new_tokens} tokens; ")
    assert re.search(r"; [\d.,]+ tokens/s; ", err)
    loops = result.loops[0]
    if options.exit is not None:
        assert f"; {sum(loops) / len(loops):.2f} loops on average (1: {loops.count(1)}, " in err
    else:
        assert f"; {loops[0]} loop{'s' * (loops[0] > 1)} each" in err
    assert (f"; {result.kept} of {result.drafted} drafted tokens kept\n" in err) == (options.draft_loops is not None)


def test_the_end_of_a_document_ends_the_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this run documents end with a token that the model says fifth."""
    result, _ = generated(run, Options(seed=2, max_new_tokens=9))
    said = result.tokens[0]
    end = next(token for i, token in enumerate(said) if i > 3 and token not in said[:i])
    n_before = said.index(end)
    ended = tmp_path / "run"
    shutil.copytree(run, ended)
    write_validation(ended, np.array([3, end, 4, end]), np.array([0, 2, 4]))
    capsys.readouterr()
    assert main([str(ended), "--prompt", PROMPT, "--seed", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == tokenizer_of(run).decode(tokenizer_of(run).encode(PROMPT).ids + said[:n_before]) + "\n"
    assert err.startswith(f"{n_before + 1} tokens, the last ends the document; ")


def test_the_prompt_may_come_from_standard_input(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--prompt", PROMPT]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n"), encoding="ascii"))
    assert main([str(run), "--prompt", "-"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "prompt must hold some text. Got none."),
        (["--prompt", "a\udcff"], "prompt must be UTF-8. Got other bytes: "),
        ([], "Required options "),
        (
            ["--prompt", "a", "--exit", "luck:1"],
            "policy must be one of margin, top-probability, entropy, state-change. Got policy='luck'.",
        ),
        (["--prompt", "a", "--exit", "gate:0.5"], "policy gate needs a model with an exit gate. Got policy='gate'."),
        (["--prompt", "a", "--exit", "margin"], "exit must be POLICY:TAU, TAU a number. Got exit=margin."),
        (["--prompt", "a", "--exit", "margin:nan"], "tau must be a number or inf. Got tau=nan."),
        (["--prompt", "a", "--top-p", "0"], "top_p must be above 0 and at most 1. Got top_p=0.0."),
        (["--prompt", "a", "--speculate", "3"], "draft_loops must be below n_loops. Got draft_loops=3, n_loops=3."),
        (["--prompt", "a", "--n-loops", "0"], "n_loops must be at least 1. Got n_loops=0."),
        (["--prompt", "a", "--device", "cuda"], "device must be one that PyTorch finds here. Got device=cuda."),
    ],
    ids=str,
)
def test_bad_command_lines(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([str(run), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_bad_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([str(tmp_path / "none"), "--prompt", "a"]) == 2
    without = tmp_path / "without"
    shutil.copytree(run, without)
    (without / "tokenizer.json").unlink()
    assert main([str(without), "--prompt", "a"]) == 2
    (without / "tokenizer.json").write_text("{")
    assert main([str(without), "--prompt", "a"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == f"error: a run must be a directory that training wrote. {tmp_path / 'none'} is none."
    assert (
        second == f"error: a run must have a tokenizer to read and write text. {without / 'tokenizer.json'} is missing."
    )
    assert third.startswith(f"error: tokenizer {without / 'tokenizer.json'} cannot be read (")


@pytest.mark.parametrize(
    ("shell", "code", "stderr"),
    [
        ("| head -c 5; exit ${PIPESTATUS[0]}", 0, b""),
        ("> /dev/full", 2, b"error: [Errno 28] No space left on device\n"),
    ],
)
def test_a_closed_pipe_ends_quietly(run: Path, shell: str, code: int, stderr: bytes) -> None:
    command = ["bash", "-c", f'"$0" -m looped.generate "$@" {shell}', sys.executable, str(run), "--prompt", "a"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (code, stderr)
    assert len(done.stdout) <= 5


# Characters -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_tokenizer() -> tokenizers.Tokenizer:
    """A token for every byte."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def test_characters_are_given_whole(bytes_tokenizer: tokenizers.Tokenizer) -> None:
    whole = "né 5€ 😀!"
    ids = bytes_tokenizer.encode(whole).ids
    assert len(ids) == len(whole.encode())
    stream = TextStream(bytes_tokenizer)
    pieces = [stream.add([token]) for token in ids]
    assert "".join(pieces) == whole
    assert {piece for piece in pieces if piece} == set(whole)
    assert stream.end() == ""
    assert TextStream(bytes_tokenizer).add(ids) == whole


def test_bytes_that_are_no_character_are_shown_at_the_end(bytes_tokenizer: tokenizers.Tokenizer) -> None:
    euro, letter = bytes_tokenizer.encode("€").ids, bytes_tokenizer.encode("a").ids
    stream = TextStream(bytes_tokenizer)
    assert [stream.add(letter), stream.add(euro[:1]), stream.add(euro[1:2]), stream.end()] == ["a", "", "", "\ufffd"]
    stream = TextStream(bytes_tokenizer)
    assert [stream.add(euro[:2]), stream.add(letter), stream.end()] == ["", "\ufffda", ""]
