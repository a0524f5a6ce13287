"""The command that measures encoding: a text of the size asked for, and what is said of it."""

import re

from bench.encoding import main, write_text


def test_the_text_has_its_size_and_is_the_same_again(tmp_path):
    for name in ("a", "b"):
        write_text(tmp_path / name, 300_000)
    text = (tmp_path / "a").read_text(encoding="ascii")
    assert text == (tmp_path / "b").read_text(encoding="ascii")
    assert 300_000 <= len(text) < 2_000_000  # words are drawn 100,000 at a time
    assert {len(line.split()) for line in text.splitlines()} == {10}


def test_a_text_is_encoded_and_measured(capsys):
    main(["--megabytes", "1"])
    first, second = capsys.readouterr().out.splitlines()
    tokens = int(re.fullmatch(r"made.txt: 1 MB, ([\d,]+) tokens to train on, [\d.]+ s", first)[1].replace(",", ""))
    assert 100_000 < tokens < 1_000_000
    peak, before = map(int, re.fullmatch(r"peak of the process: (\d+) MiB, (\d+) before", second).groups())
    assert peak >= before > 100
