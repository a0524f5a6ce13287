"""What bench/gpu_static.py does where a GPU is present: here on a stand-in, with the clock alone left out."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu_measured import target_present
from bench.gpu_tables import page

ROOT = Path(__file__).parents[1]
PEERS = ("liger_kernel", "cut_cross_entropy")
needs_peers = pytest.mark.skipif(
    any(find_spec(peer) is None for peer in PEERS), reason="the other libraries, of the bench extra, are not installed"
)
COMMITTED = ROOT / "bench" / "results" / "gpu_static.json"

# Every measurement runs on the stand-in H100; one library finds no answer to a question about values, and fails.
MEASURE = """
import json, sys, torch
from bench import gpu_measured
from bench.fake_gpu import TARGETS, fake_gpu

def stub(function, prepare=tuple):
    function(*prepare())
    return 0.123456

gpu_measured.measured_seconds = stub
report = json.load(open(sys.argv[1]))
small, large = str(gpu_measured.READOUTS[0]), {"readouts": [], "norms": [], "steps": []}
for kind in large:  # which would take as long again
    large[kind] = [r for r in report[kind] if r.get("shape", small) != small or r.get("d", 768) != 768]
    report[kind] = [r for r in report[kind] if r not in large[kind]]
aten = torch.ops.aten
answers = {aten._local_scalar_dense.default: lambda _: 8192, aten.equal.default: lambda *_: True}
with fake_gpu(TARGETS["sm_90"], answers):
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    target = gpu_measured.target_present()
    gpu_measured.measure(report, target)
print(json.dumps({"target": target, "report": report, "large": large}))
"""

# The first of two targets is the GPU present, and measuring it stops the program.
WRITE_FIRST = """
import json, sys
from pathlib import Path
from bench import gpu_static

def stop(report, target):
    raise KeyboardInterrupt(target)

report = json.load(open(sys.argv[1]))
gpu_static.predictions, gpu_static.measure, gpu_static.target_present = lambda _: report, stop, lambda: "sm_80"
out, sys.argv = sys.argv[2], ["gpu_static", "--out", sys.argv[2], "--targets", "sm_80", "sm_90"]
try:
    gpu_static.main()
except KeyboardInterrupt as stopped:
    print(stopped, sorted(path.name for path in Path(out).iterdir()))
"""


def run(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def measured() -> dict:
    """The report with the measured rows of the small shape."""
    found = json.loads(run(MEASURE, str(COMMITTED)))
    assert found["target"] == "sm_90"
    return found


@pytest.fixture
def text(measured) -> str:
    """Its page, the rows of the large shape put back."""
    report = measured["report"]
    return page(report | {kind: [*report[kind], *rows] for kind, rows in measured["large"].items()})


@needs_peers
def test_only_the_rows_of_the_gpu_that_is_present(measured):
    measured = measured["report"]
    assert measured["measured_gpu"] == "H100"
    for row in (*measured["readouts"], *measured["norms"], *measured["steps"]):
        names = {name for name in row if "measured" in name}
        assert bool(names) == (row["gpu"] == "H100"), row
    times = [row["measured_ms"] for row in measured["readouts"] + measured["steps"] if "measured_ms" in row]
    assert set(times) == {123.456}
    norms = [row for row in measured["norms"] if row["gpu"] == "H100"]
    assert all(row["forward_measured_us"] == row["backward_measured_us"] == 123456 for row in norms)


@needs_peers
def test_an_error_of_one_implementation_is_shown_and_the_others_measured(measured, text):
    rows = {row["implementation"]: row for row in measured["report"]["readouts"] if row["gpu"] == "H100"}
    failed = {name for name, row in rows.items() if "measured_error" in row}
    assert not any("looped" in name or "plain" in name for name in failed)
    assert failed == {"cut-cross-entropy, states concatenated"}
    for name in failed:
        assert rows[name]["measured_error"] in text


def test_the_page_puts_them_beside_that_gpus_predictions(text):
    lines = text.splitlines()
    for line in lines:
        if line.startswith("| implementation"):
            assert "measured on NVIDIA H100 80GB HBM3, ms" in line
        if "123.46 |" in line:
            assert not any(f", {gpu}," in line or f"{gpu}, " in line for gpu in ("A100", "B200", "MI300X"))
    assert sum("123.46 |" in line for line in lines) > 4


def test_a_gpu_beside_the_main_one_has_its_own_table():
    report = json.loads(COMMITTED.read_text()) | {"measured_gpu": "A100", "measured_on": "NVIDIA A100-SXM4-80GB"}
    headers = [line for line in page(report).splitlines() if line.startswith("| implementation")]
    assert ["measured on NVIDIA A100-SXM4-80GB" in header for header in headers] == [False, False, True, True]


def test_one_target_alone_has_its_readouts():
    report = json.loads(COMMITTED.read_text())
    report["gpus"] = {"A100": report["gpus"]["A100"]}
    for kind in ("readouts", "norms", "steps", "kernels"):
        report[kind] = [row for row in report[kind] if row["gpu"] == "A100"]
    text = page(report)
    assert text.count("A100; GEMM floor") == 2
    assert "Targets, on" not in text


def test_predictions_are_on_disk_before_anything_is_measured(tmp_path):
    assert run(WRITE_FIRST, str(COMMITTED), str(tmp_path)).strip() == "sm_80 ['gpu_static.json', 'gpu_static.md']"


@pytest.mark.parametrize(
    ("name", "multiprocessors", "target"),
    [
        ("NVIDIA A100-SXM4-80GB", 108, "sm_80"),
        ("NVIDIA H100 80GB HBM3", 132, "sm_90"),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA H200", 132, None),
        ("AMD Instinct MI300X", 304, "gfx942"),
    ],
)
def test_only_a_gpu_that_is_predicted_is_a_target(monkeypatch, name, multiprocessors, target):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert target_present() == target


def test_no_gpu_is_no_target(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target_present() is None
