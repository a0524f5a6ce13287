"""A sample of the campaign in kills.py, which says what is demanded."""

import json
import sys

import kills
import pytest

SEED = "16"  # of one process: killed between the two renames of a save, then while the files of one are written


@pytest.mark.parametrize(
    ("options", "n_kills", "between_names"),
    [(("--within-saving",), 2, 1), (("--within-saving", "--processes", "2", "--shard", "fsdp2"), 1, 0)],
)
def test_nothing_is_lost_in_the_midst_of_a_save(monkeypatch, capsys, no_picture, options, n_kills, between_names):
    small = ("--n-layers", "1", "--n-loops", "1")
    monkeypatch.setattr(sys, "argv", ["kills.py", "--kills", str(n_kills), "--seed", SEED, *options, *small])
    assert kills.main() == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kills"] == figures["while saving"] == figures["continued"] == n_kills
    assert figures["between two names"] == between_names
    assert figures["most steps lost"] == 3
