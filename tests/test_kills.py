"""A sample of the campaign in kills.py, which says what is demanded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = "5"  # of one process: killed between the two renames of a save, then while the files of one are written


@pytest.mark.parametrize(
    ("options", "kills", "between_names"),
    [(("--within-saving",), 2, 1), (("--within-saving", "--processes", "2", "--shard", "fsdp2"), 1, 0)],
)
def test_nothing_is_lost_in_the_midst_of_a_save(options, kills, between_names):
    program = str(Path(__file__).with_name("kills.py"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, program, "--kills", str(kills), "--seed", SEED, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] == figures["while saving"] == figures["continued"] == kills
    assert figures["between two names"] == between_names
    assert figures["most steps lost"] == 3
