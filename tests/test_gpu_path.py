"""Every line of the CUDA path runs before a user's GPU sees it: training steps and a whole run on fake CUDA tensors.

bench/offline/whole_program.py takes training steps of the paper's 129M model, with layers enough for every line:
dispatch, launchers (each launch compiled), autograd, clipping, AdamW; and carries train/run.py from text to report, and
looped.diagnose to its page.  Here its record is checked.
"""

import json
from dataclasses import replace

import pytest
from uninterpreted import run

from bench.offline.whole_program import STEPS
from looped.config import PRESETS

CONFIG = replace(PRESETS["paper-129m"], n_layers=2)
N_TOKENS = 32 * CONFIG.max_seq_len
CHUNK_ROWS = 4096
SMALL_LAUNCHES = 9  # of a readout: weights and their check, sums, scaling by the upstream gradient


@pytest.fixture(scope="module")
def report() -> dict[str, dict]:
    program = "import json, sys; from bench.offline.whole_program import whole_report\n"
    return json.loads(run(program + "print(json.dumps(whole_report(int(sys.argv[1]))))", CONFIG.n_layers))


@pytest.mark.parametrize("name", [*STEPS, "readout 129m", "readout large"])
def test_the_host_never_waits(report, name):
    """No step copies to or from the host; a read of a value would have raised in the subprocess."""
    assert report[name]["host_waits"] == []


@pytest.mark.parametrize("name", STEPS)
def test_every_parameter_has_a_gradient(report, name):
    assert report[name]["gradients"] == report[name]["parameters"] > 0


@pytest.mark.parametrize("name", STEPS)
def test_flops_are_those_the_model_states(report, name):
    """Up to attention, whose causal half the counter does not see (2-3% at this shape); checkpoints recompute."""
    if name == "checkpointed":
        pytest.skip("recomputation is not counted by flops_per_token")
    assert report[name]["flops"] == pytest.approx(report[name]["expected_flops"], rel=0.04)


def test_launches_of_a_fused_step(report):
    """Two norms and a SwiGLU a block and loop, a norm a readout, each way, and a softmax a chunk of the readout.

    The partial sums of a norm's weight are summed up once, after all loops.
    """
    norms = 2 * CONFIG.n_layers * CONFIG.n_loops
    n_chunks = CONFIG.n_loops * N_TOKENS // CHUNK_ROWS
    assert report["fused"]["triton_launches"] == {
        "norm_forward_kernel": norms + CONFIG.n_loops,
        "norm_backward_kernel": norms + CONFIG.n_loops,
        "sum_rows_kernel": 2 * CONFIG.n_layers + 1,
        "swiglu_forward_kernel": CONFIG.n_layers * CONFIG.n_loops,
        "swiglu_backward_kernel": CONFIG.n_layers * CONFIG.n_loops,
        "cross_entropy_kernel": n_chunks,
        "row_weights_kernel": 1,
        "loss_sums_kernel": 1,
        "scaled_kernel": 1,
    }
    assert report["plain"]["triton_launches"] == {}
    assert report["fused"]["launches"] < 0.85 * report["plain"]["launches"]


def test_every_norm_but_a_loops_first_adds_the_residual_stream(report):
    """A loop's first norm finds the sum of the loop before it; the readout's norms have nothing to add."""
    assert report["fused"]["residual_norms"] == 2 * CONFIG.n_layers * CONFIG.n_loops - CONFIG.n_loops
    assert report["plain"]["residual_norms"] == 0


def test_terminal_supervision_reads_one_loop(report):
    assert report["terminal"]["triton_launches"]["cross_entropy_kernel"] == N_TOKENS // CHUNK_ROWS


def test_the_main_job_runs_from_text_to_report_is_continued_and_diagnosed(report):
    run = report["run"]
    assert run["exit_codes"] == [0, 0, 0]
    assert run["steps"] == [1, 5, 6]
    assert {"checkpoint/model.safetensors", "report.png", "summary.json", "diagnosis/index.html"} <= set(run["files"])


def test_the_main_job_reads_out_in_chunks_in_steps_and_evaluations(report):
    """A step and an evaluation have 2048 tokens each; the replays of graphs count."""
    n_steps, n_evaluations, n_loops = 6, 2, 2
    rows = (n_steps + n_evaluations) * n_loops * 16 * 128
    assert report["run"]["triton_launches"]["cross_entropy_kernel"] == rows // CHUNK_ROWS


def test_the_main_job_waits_in_logging_saving_capturing_and_evaluation_alone(report):
    """And where a model or a checkpoint is moved to the GPU; not in a step, nor where its batch is moved.

    One line each: of an evaluation, that is its end.
    """
    places = [wait.partition(", ")[2].partition(" (")[0] for wait in report["run"]["host_waits"]]
    expected = ["_row", "save", "evaluate", "_synchronise", "_capture", "prepare", "load", "read_into"]
    assert sorted(places) == sorted(expected)


def test_memory(report):
    """Parameters and two moments stay; fused steps hold less; a checkpointed loop less still."""
    fused, plain = report["fused"], report["plain"]
    n_parameters = 34_434_816
    assert 12 * n_parameters <= fused["state_bytes"] < 12.01 * n_parameters
    assert fused["peak_bytes"] < 0.85 * plain["peak_bytes"]
    assert report["checkpointed"]["peak_bytes"] < report["raw"]["peak_bytes"]


@pytest.mark.parametrize("name", ["readout 129m", "readout large"])
def test_readout_makes_four_launches_a_chunk(report, name):
    """Three products and a softmax a chunk of 4096 rows, two norms a loop, 6 K N d V FLOPs, and nine around them."""
    readout = report[name]
    n_chunks = 4 * 8192 // CHUNK_ROWS
    assert readout["flops"] == readout["expected_flops"]
    assert readout["matrix_products"] == 3 * n_chunks
    launches = readout["triton_launches"]
    assert launches == {
        "norm_forward_kernel": 4, "cross_entropy_kernel": n_chunks, "norm_backward_kernel": 4,
        "sum_rows_kernel": 1, "row_weights_kernel": 1, "scaled_kernel": 1, "loss_sums_kernel": 1,
    }  # fmt: skip
    assert readout["launches"] <= 4 * n_chunks + 2 * 4 + SMALL_LAUNCHES == 49
