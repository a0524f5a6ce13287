"""The benchmarks as on a GPU: every tiny case is carried out on stand-in CUDA tensors, which have no values.

That is the path of a user's GPU, and of `make gpu`: CUDA events, graphs, cold caches, the caching allocator's peak, the
libraries that need a GPU, the record and its table.  Decoders have one layer: another launches the same again.  What
torch.compile makes is left out, as it would compile for a device that PyTorch does not find; and, for the time they
take, PyTorch's own chunked op, the steps of terminal supervision, and others' steps of another recurrence.
"""

import json
import re
import sys
import time
from importlib.util import find_spec

import pytest
from uninterpreted import run

from bench.gpu import PARTS, kernel_tests, main, supervised, tested

needs_peers = pytest.mark.skipif(
    any(find_spec(peer) is None for peer in ("liger_kernel", "cut_cross_entropy", "pytest_benchmark")),
    reason="the other libraries, of the bench extra, are not installed",
)

# What quack and Liger's CuTe readout take and give, by plain PyTorch: their own kernels need a GPU and CUTLASS.
STAND_INS = {
    "cutlass/__init__.py": "",
    "quack/__init__.py": "",
    "quack/rmsnorm.py": """
import torch.nn.functional as F

def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
    total = x if residual is None else x + residual
    y = F.rms_norm(total, total.shape[-1:], weight, eps)
    return (y, total) if residual is not None and prenorm else y
""",
    "quack/linear_cross_entropy.py": """
import torch.nn.functional as F

def chunked_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    return F.cross_entropy(F.linear(x, weight), target, ignore_index=ignore_index, reduction=reduction)
""",
    "liger_cute.py": """
import sys, types
import torch.nn.functional as F

class LigerFusedScaledCrossEntropySM90Function:
    @staticmethod
    def apply(rows, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1):
        return F.cross_entropy(F.linear(rows, weight), target, ignore_index=ignore_index, reduction="none").float()

package = "liger_kernel.ops.cutedsl.ops"
for name in (package, f"{package}.fused_scaled_cross_entropy_sm90"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].LigerFusedScaledCrossEntropySM90Function = LigerFusedScaledCrossEntropySM90Function
""",
}

# Of numbers that are read, counts are 32, the tokens of a case, and all others, errors of results among them, 0.
SMOKE = """
import dataclasses, json, sys
from pathlib import Path
from unittest.mock import patch
import pytest, torch
import liger_cute
from bench.offline.fake_gpu import TARGETS, fake_gpu
from looped.config import PRESETS

for name in ("demo", "paper-129m"):
    PRESETS[name] = dataclasses.replace(PRESETS[name], n_layers=1)

class Outcomes:
    def __init__(self):
        self.seen = {}
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.seen[report.nodeid.partition("::")[2]] = [report.outcome, str(report.longrepr or "")[-1000:]]

class Chosen:
    def pytest_collection_finish(self, session):
        self.names = [item.name for item in session.items]

aten, outcomes, chosen = torch.ops.aten, Outcomes(), Chosen()
answers = {
    aten._local_scalar_dense.default: lambda x: 0.0 if x.is_floating_point() else 32,
    aten.equal.default: lambda *_: True,
    aten.nonzero.default: lambda x: torch.empty(x.numel(), x.dim(), dtype=torch.int64, device="cuda"),
}
run_pytest, names = pytest.main, {}

def collect(arguments, plugins):
    return run_pytest([*arguments, "--collect-only"], plugins=[chosen])

results = Path(sys.argv[1]).parent / "results"
with fake_gpu(TARGETS["sm_90"], answers):
    from bench import gpu
    from bench.measure.place import environment
    from bench.measure.records import read
    from bench.measure.timing import Instant, clock

    with patch.object(gpu, "kernel_tests", lambda: ["a test"]):
        codes = {name: part.run(results, True, [outcomes]) for name, part in gpu.PARTS.items()}
    others = "smoke and (radial or swiglu or forward) and not compiled"
    run_pytest(["bench", "--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", others], plugins=[outcomes])
    with patch("pytest.main", collect):
        for name in gpu.PARTS.keys() - {"tests", "host", "kernels"}:
            gpu.PARTS[name].run(results, False, [])
            names[name] = chosen.names
    record = gpu.record_of_today(results)
    found = {
        "outcomes": outcomes.seen, "environment": environment(), "events": clock is Instant, "codes": codes,
        "chosen": names, "record": record.read_text(), "table": gpu.table(read(record)),
    }
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("smoke") / "report.json"
    for name, text in STAND_INS.items():
        path = out.parent / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    run(SMOKE, out, packages=out.parent / "packages")
    return json.loads(out.read_text())


@needs_peers
def test_every_benchmark_runs_on_a_gpu(smoke):
    """Ours, plain PyTorch and the libraries that need a GPU; cut-cross-entropy compiles, or refuses float32."""
    failed = {name: why for name, (outcome, why) in smoke["outcomes"].items() if outcome == "failed"}
    skipped = {name for name, (outcome, _) in smoke["outcomes"].items() if outcome == "skipped"}
    passed = smoke["outcomes"].keys() - skipped - failed.keys()
    assert not failed
    assert all("cut-cross-entropy" in name for name in skipped), skipped
    for subject in ("norm", "radial", "swiglu", "readout", "statistics", "forward", "step"):
        assert any(name.startswith(f"bench_{subject}[") and "-fused]" in name for name in passed), subject
    for implementation in ("liger-concatenated-fp32-dW", "liger-cute-concatenated", "quack-concatenated"):
        assert any(name.endswith(f"-{implementation}]") for name in passed), implementation
    for variant in ("fused-graphed", "plain-graphed"):
        assert any(name.startswith("bench_step[") and name.endswith(f"-{variant}]") for name in passed), variant


@needs_peers
def test_a_gpu_is_timed_by_its_events_and_named_in_the_record(smoke):
    assert smoke["events"]
    assert smoke["environment"]["device"] == "H100"
    assert smoke["environment"]["instructions"] == "sm-90"


@needs_peers
def test_every_part_of_the_command_runs_and_writes(smoke):
    assert set(smoke["codes"].values()) == {0}, smoke["codes"]
    kinds = {json.loads(line)["kind"] for line in smoke["record"].splitlines()}
    assert kinds == {"place", "measurement", "fact", "skipped", "session"}
    for name in ("fused-graphed", "quack-concatenated", "quack + penalty", "rms_norm_penalty, residual"):
        assert f"\n| {name} | " in smoke["table"]
    assert "\n| norm backward | " in smoke["table"]
    for unit in (" GB/s", " MiB", " tokens/s, MFU ", " copies"):
        assert unit in smoke["table"]


def test_a_replay_holds_what_its_graph_reads():
    program = """
import gc, weakref
import torch
from bench.offline.fake_gpu import TARGETS, fake_gpu

def prepare():
    read = torch.ones(3, device="cuda")
    prepare.read = weakref.ref(read)
    return lambda: read + 1

with fake_gpu(TARGETS["sm_90"]):
    from bench.measure.graphs import Replay
    replay = Replay(prepare)
    gc.collect()
    print(prepare.read() is not None)
"""
    assert run(program) == "True\n"


@needs_peers
def test_the_command_chooses_cases_that_are_there(smoke):
    """Ten steps of two batches; twelve readouts of two shapes; six norms each way, with and without an add, twice."""
    counts = {name: len(names) for name, names in smoke["chosen"].items()}
    assert counts == {"step": 20, "readout": 24, "forward only": 7, "norms": 48}
    assert not any("smoke" in name for names in smoke["chosen"].values() for name in names)


def test_the_parts_end_in_time():
    assert sum(part.seconds for part in PARTS.values()) < 8 * 60


@pytest.mark.parametrize(
    ("program", "outcome", "fine"),
    [
        ("print('all', 'well')", r"done in \d s", True),
        ("print('oh', 'no'); raise SystemExit(3)", "failed, exit code 3", False),
        ("import time; print('slow', flush=True); time.sleep(60)", "stopped after 2 s", False),
    ],
)
def test_a_part_is_stopped_and_its_end_is_shown(program, outcome, fine):
    became, went_well, end = supervised([sys.executable, "-S", "-c", program], 2)
    assert re.fullmatch(outcome, became)
    assert went_well == fine
    assert end.strip() in ("all well", "oh no", "slow")


def test_the_kernels_tests_are_found():
    files = {name.partition("::")[0] for name in kernel_tests()}
    assert {"tests/test_rms_norm.py", "tests/test_looped_cross_entropy.py"} <= files


def test_tests_are_run_by_name_counted_and_stopped(tmp_path):
    (tmp_path / "test_three.py").write_text("""
import time, pytest

@pytest.mark.parametrize("x", ["a b", "c - d"])
def test_well(x):
    pass

def test_badly():
    assert False, "PASSED"

def test_slowly():
    time.sleep(600)
""")
    names = ["test_well[a b]", "test_well[c - d]", "test_badly", "test_slowly"]
    tests = [f"{tmp_path}/test_three.py::{name}" for name in names]
    start = time.monotonic()
    ended = tested(tests[:3], 200)
    stopped = tested(tests, 2 * (time.monotonic() - start) + 1)
    for found, not_run in ((ended, 0), (stopped, 1)):
        assert (found["passed"], len(found["failed"]), found["not_run"]) == (2, 1, not_run)
        assert "test_badly" in found["failed"][0]


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "a GPU must be there. Got torch" in capsys.readouterr().err
