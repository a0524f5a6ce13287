"""The benchmarks as on a GPU: every tiny case is carried out on stand-in CUDA tensors, which have no values.

That is the path of a user's GPU: CUDA events, cold caches, the caching allocator's peak, the libraries that need a GPU.
What torch.compile makes is left out, as it would compile for a device that PyTorch does not find; and, for the time
they take, PyTorch's own chunked op and the steps of terminal supervision.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_peers = pytest.mark.skipif(
    any(find_spec(peer) is None for peer in ("liger_kernel", "cut_cross_entropy", "pytest_benchmark")),
    reason="the other libraries, of the bench extra, are not installed",
)

# Of numbers that are read, counts are 32, the tokens of a case, and all others, errors of results among them, 0.
SMOKE = """
import json, sys
import pytest, torch
from bench.offline.fake_gpu import TARGETS, fake_gpu

class Outcomes:
    def __init__(self):
        self.seen = {}
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.seen[report.nodeid.partition("::")[2]] = [report.outcome, str(report.longrepr or "")[-1000:]]

aten, outcomes = torch.ops.aten, Outcomes()
answers = {
    aten._local_scalar_dense.default: lambda x: 0.0 if x.is_floating_point() else 32,
    aten.equal.default: lambda *_: True,
    aten.nonzero.default: lambda x: torch.empty(x.numel(), x.dim(), dtype=torch.int64, device="cuda"),
}
with fake_gpu(TARGETS["sm_90"], answers) as record:
    chosen = "smoke and not (compiled or chunked or terminal)"
    pytest.main(["bench", "--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", chosen], plugins=[outcomes])
    from bench.measure.place import environment
    from bench.measure.timing import Instant, clock
    told = environment()
json.dump({"outcomes": outcomes.seen, "environment": told, "events": clock is Instant}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("smoke") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SMOKE, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert out.exists(), done.stderr[-4000:]
    return json.loads(out.read_text())


@needs_peers
def test_every_benchmark_runs_on_a_gpu(smoke):
    """Ours, plain PyTorch and the libraries that need a GPU; cut-cross-entropy compiles, or refuses float32."""
    failed = {name: why for name, (outcome, why) in smoke["outcomes"].items() if outcome == "failed"}
    skipped = {name for name, (outcome, _) in smoke["outcomes"].items() if outcome == "skipped"}
    passed = smoke["outcomes"].keys() - skipped - failed.keys()
    assert not failed
    assert all("cut-cross-entropy" in name for name in skipped), skipped
    for subject in ("norm", "radial", "readout", "statistics", "forward", "step"):
        assert any(name.startswith(f"bench_{subject}[") and "-fused]" in name for name in passed), subject
    assert any("-liger-concatenated-fp32-dW]" in name for name in passed)


@needs_peers
def test_a_gpu_is_timed_by_its_events_and_named_in_the_record(smoke):
    assert smoke["events"]
    assert smoke["environment"]["device"] == "H100"
    assert smoke["environment"]["instructions"] == "sm-90"
