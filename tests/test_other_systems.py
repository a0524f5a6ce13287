"""macOS and Windows: without Triton, and without what Python has on POSIX alone, everything works on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tiny_run import arguments
from tiny_sweep import sweep_words

TESTS = Path(__file__).parent

PROGRAM = """
import json, sys
from pathlib import Path
# None in sys.modules: importing it raises ModuleNotFoundError
sys.modules.update(dict.fromkeys(("triton", "fcntl", "resource", "pwd", "grp", "termios")))
import torch

# kernels
import looped.kernels
from looped.kernels import looped_cross_entropy, radial_gradient, readout_statistics, rms_norm_penalty, swiglu
states, head, weight = (torch.randn(shape, requires_grad=True) for shape in ((3, 7, 12), (31, 12), (12,)))
targets = torch.randint(31, (7,))
loss = looped_cross_entropy(states, head, targets, norm_weight=weight, penalty=0.1).loss
y = rms_norm_penalty(states[0], weight, residual=states[1]).y
(loss + y.sum() + radial_gradient(states[0], states[1]).dot.sum() + swiglu(*states[:2]).sum()).backward()
assert all(x.grad.isfinite().all() and x.grad.any() for x in (states, head, weight))
assert readout_statistics(states, head, targets).loss.isfinite().all()

# decoder
import looped
shape = dict(vocab_size=31, d_model=12, n_heads=2, n_layers=1, d_ff=16, max_seq_len=9, n_loops=2)
tokens = torch.randint(31, (2, 9))
for fused in (True, False):
    model = looped.LoopedLM(looped.LoopedConfig(**shape), fused=fused)
    model(tokens, tokens, penalty=0.1).loss.backward()
    assert model.embedding.weight.grad.any()

# trainer and diagnosis
from train.run import main
assert main(ARGUMENTS + ["--out", "run"]) == 0
assert json.loads(Path("run", "summary.json").read_text())["peak_memory_bytes"] is None
assert main(["--resume", "run", "--steps", "9"]) == 0
from looped.diagnose.__main__ import main as diagnose
assert diagnose(["run", "--tokens", "128", "--loops", "5", "--device", "cpu"]) == 0

# the paper's sweep
from tiny_sweep import main_of_forks
assert main_of_forks(SWEEP) == 0
"""


def test_without_triton_and_posix(tmp_path):
    given = f"ARGUMENTS = {arguments(tmp_path, '--fused')!r}\nSWEEP = {sweep_words(tmp_path, '--steps', '2')!r}\n"
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", given + PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
