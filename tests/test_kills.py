"""A sample of the campaign in kills.py, which says what is demanded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("options", "kills"), [(("--within-saving",), 2), (("--within-saving", "--processes", "2", "--shard", "fsdp2"), 1)]
)
def test_nothing_is_lost_in_the_midst_of_a_save(options, kills):
    program = str(Path(__file__).with_name("kills.py"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, program, "--kills", str(kills), "--seed", "2", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] == kills
    assert figures["while saving"] >= kills - 1
    assert figures["most steps lost"] <= 3
