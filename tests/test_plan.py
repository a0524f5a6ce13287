import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from uninterpreted import run

from bench.measure.memory import allocations
from looped import plan
from looped.config import PRESETS, LoopedConfig
from looped.kernels.products import CPU_WIDE_CHUNK_ROWS
from looped.model import LoopedLM
from looped.sharding import replicate, share_out
from looped.step_memory import Step, memory, parameters
from train.config import TrainConfig
from train.step import training_step

GIB, MIB = 2**30, 2**20
OF_129M = {"sequences": 32, "seq_len": 256}


def planned(preset: str, changes: dict | None = None, **step) -> float:
    config = replace(PRESETS[preset], **(changes or {}))
    return memory(config, Step(**{"seq_len": config.max_seq_len} | step)).total


@pytest.mark.parametrize(("fused", "name"), [(True, "fused"), (False, "plain")])
def test_memory_is_that_of_the_steps_that_were_measured_on_a_gpu(fused, name):
    """An H200's peaks, beside weights, gradients and moments."""
    needed = planned("paper-129m", fused=fused, **OF_129M) - 16 * parameters(PRESETS["paper-129m"]).total
    assert needed == pytest.approx(plan.MEASURED_GIB[name] * GIB, rel=0.04)


# MiB, fp32 without dropout on a CPU (2026-11-26, torch 2.13.0), by `measured`.
MEASURED_MIB = {
    ("demo", 16, True, False): 354.0, ("demo", 16, True, True): 121.3,
    ("demo", 16, False, False): 640.0, ("demo", 16, False, True): 227.2,
    ("paper-44m", 4, True, False): 1879.9, ("paper-44m", 4, True, True): 1024.1,
    ("paper-44m", 4, False, False): 2662.8, ("paper-44m", 4, False, True): 1116.2,
}  # fmt: skip


def on_cpu(preset: str, sequences: int, fused: bool, checkpoint_loops: bool) -> float:
    return planned(
        preset, {"dropout": 0.0}, sequences=sequences, fused=fused, half=False, checkpoint_loops=checkpoint_loops,
        chunk_rows=CPU_WIDE_CHUNK_ROWS,
    )  # fmt: skip


def measured(
    config: LoopedConfig, sequences: int, *, fused=True, checkpoint_loops=False, shard=None, grad_accumulation=1
) -> int:
    """The peak of two training steps, the model's making included: every allocation that PyTorch's profiler reports."""

    def steps() -> None:
        model = LoopedLM(replace(config, dropout=0.0), fused=fused, checkpoint_loops=checkpoint_loops)
        trained: torch.nn.Module = model
        if shard == "none":
            trained = replicate(model, dist.group.WORLD, find_unused=False)
        if shard == "fsdp2":
            share_out(model, dist.group.WORLD, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(config.vocab_size, (sequences, config.max_seq_len))
        for _ in range(2):
            training_step(
                trained, optimizer, tokens, tokens, supervision="per-loop", penalty=0.01, dtype=torch.float32,
                grad_accumulation=grad_accumulation,
            )  # fmt: skip

    return max(accumulate(allocations(steps)[0]))


@pytest.mark.parametrize(("preset", "sequences", "fused", "checkpoint_loops"), MEASURED_MIB)
def test_memory_is_that_of_the_steps_that_were_measured_on_a_cpu(preset, sequences, fused, checkpoint_loops):
    step = preset, sequences, fused, checkpoint_loops
    assert on_cpu(*step) == pytest.approx(MEASURED_MIB[step] * MIB, rel=0.15)


def test_memory_is_that_of_a_step_now():
    assert on_cpu("demo", 2, True, False) == pytest.approx(measured(PRESETS["demo"], 2), rel=0.15)


WIDER = {"dropout": 0.0, "d_model": 256, "d_ff": 1024, "n_layers": 8}
SHARED_OUT = [(shard, checkpoint_loops) for shard in ("none", "fsdp2") for checkpoint_loops in (False, True)]


def wide(shard: str, checkpoint_loops: bool, **step) -> float:
    return planned(
        "demo", WIDER, sequences=2, half=False, checkpoint_loops=checkpoint_loops, chunk_rows=CPU_WIDE_CHUNK_ROWS,
        **({"gpus": 2, "shard": shard} | step),
    )  # fmt: skip


def measure_on_a_rank(rank: int, out: Path) -> None:
    config = replace(PRESETS["demo"], **WIDER)
    found = [measured(config, 2, shard=shard, checkpoint_loops=checkpoint) for shard, checkpoint in SHARED_OUT]
    (out / f"{rank}.json").write_text(json.dumps(found))


def test_memory_is_that_of_two_processes(tmp_path):
    """What a thread of gloo's is the last to hold is freed unseen: a buffer as large as the weights may be counted."""
    run_ranks(measure_on_a_rank, tmp_path, tmp_path)
    unseen = 4 * parameters(replace(PRESETS["demo"], **WIDER)).total
    for rank in range(2):
        peaks = json.loads((tmp_path / f"{rank}.json").read_text())
        for peak, step in zip(peaks, SHARED_OUT, strict=True):
            assert 0.9 * wide(*step) <= peak <= 1.1 * wide(*step) + unseen


@pytest.mark.parametrize("checkpoint_loops", [False, True])
def test_memory_of_micro_batches(checkpoint_loops):
    """The gradients of the micro-batch before beside those that are being formed."""
    peak = measured(replace(PRESETS["demo"], **WIDER), 4, checkpoint_loops=checkpoint_loops, grad_accumulation=2)
    assert wide("none", checkpoint_loops, gpus=1, accumulated=True) == pytest.approx(peak, rel=0.05)


# Steps of the demo, 16 sequences, as `step_record` takes them.
TRACED = [
    {"fused": True},
    {"fused": True, "checkpoint_loops": True},
    {"fused": False, "supervision": "terminal"},
    {"fused": False, "n_prelude": 1, "n_coda": 1, "injection": "concat", "dropout": 0.1, "n_layers": 1},
    {"fused": False, "block_norm": "sandwich-sum", "positions": "rotary", "inter_loop_norm": True, "tied": False},
]
TRACE = """
import json, sys
from bench.offline.whole_program import step_record
peaks = [step_record("demo", "sm_90", batch=16, **options).record.peak_bytes for options in json.loads(sys.argv[1])]
print(json.dumps(peaks))
"""


def test_memory_is_that_of_all_tensors_on_a_gpu():
    """Every allocation of the CUDA path, counted on a GPU that is not there."""
    for options, peak in zip(TRACED, json.loads(run(TRACE, json.dumps(TRACED))), strict=True):
        how = {name: options[name] for name in ("fused", "checkpoint_loops", "supervision") if name in options}
        shape = {name: value for name, value in options.items() if name not in how}
        assert planned("demo", shape, sequences=16, **how) == pytest.approx(peak, rel=0.1), options


def test_what_is_shared_out_is_divided():
    count = parameters(PRESETS["ouro-1.4b"])
    step = Step(sequences=1, seq_len=4096, gpus=8)
    needed = [
        memory(PRESETS["ouro-1.4b"], replace(step, **changes))
        for changes in ({}, {"shard_head": True}, {"shard": "fsdp2"})
    ]
    of_head = 7 / 8 * 49_152 * 2048
    assert [n.weights for n in needed] == [4 * count.total, 4 * (count.total - of_head), count.total / 2]
    assert [n.moments / n.weights for n in needed] == [2, 2, 2]


def test_speed_is_that_of_the_measured_step():
    options = plan.parse(["--preset", "paper-129m", "--batch-size", "32", "--gpu", "h200"])
    assert plan.tokens_per_second(options) == pytest.approx(127_400, rel=0.002)
    again = replace(options, checkpoint_loops=True)
    assert 0.7 < plan.tokens_per_second(again) / plan.tokens_per_second(options) < 0.8


def test_every_gpu_has_a_peak():
    assert {name: gpu.peak for name, gpu in plan.GPUS.items()} == {
        "h100": 989, "h200": 989, "b200": 2250, "a100": 312, "l40s": 362, "rtx4090": 165.2, "mi300x": 1307,
    }  # fmt: skip


def test_options_are_those_of_training():
    of_the_plan = {"gpus", "gpu", "tokens", "growth"}
    names = set(plan.PlanOptions.__dataclass_fields__) - of_the_plan
    assert names <= set(TrainConfig.__dataclass_fields__)
    for name in ("shard", "shard_head", "batch_size", "grad_accumulation", "fused", "supervision", "checkpoint_loops"):
        assert getattr(plan.PlanOptions, name) == getattr(TrainConfig, name)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--preset demo", "--shard none fits"),
        ("--preset paper-129m --batch-size 512 --gpu rtx4090", "take --shard none --grad-accumulation 16"),
        (
            "--preset ouro-1.4b --batch-size 8 --gpu l40s --gpus 8 --seq-len 8192",
            "take --shard fsdp2 --checkpoint-loops",
        ),
        ("--preset ouro-1.4b --batch-size 1 --gpu rtx4090 --seq-len 65536", "take a shorter --seq-len, more --gpus"),
    ],
)
def test_what_does_not_fit_is_told_what_does(words, advice, capsys):
    assert plan.main(words.split()) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice")]
    assert advice in line
    options = plan.parse(words.split())
    assert plan.fits(options) == ("too large" not in line)


def test_report(capsys):
    assert plan.main(["--preset", "ouro-1.4b", "--gpus", "8", "--gpu", "h100", "--tokens", "1e11"]) == 0
    out = capsys.readouterr().out
    for way in ("none", "none --checkpoint-loops", "fsdp2", "fsdp2 --checkpoint-loops"):
        assert f"\n--shard {way} " in out
    assert "1,434,652,672 parameters" in out
    assert "predicted time for 100,000,000,000 tokens" in out


def test_growth(capsys):
    assert plan.main(["--preset", "paper-129m", "--batch-size", "32", "--growth"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert rows[-1].startswith("| 1,000 GPUs |")


@pytest.mark.parametrize("more", [[], ["--gpus", "2", "--shard-head"]], ids=str)
def test_more_loops_with_gradient_than_there_are_is_all_of_them(more, capsys):
    reports = []
    for backprop_loops in ([], ["--backprop-loops", "4"], ["--backprop-loops", "9"]):
        assert plan.main(["--preset", "paper-44m", *more, *backprop_loops]) == 0
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1] == reports[2]
    shared = plan.parse(["--preset", "paper-44m", "--gpus", "2", "--shard-head"])
    assert plan.bytes_sent(replace(shared, backprop_loops=9)) == plan.bytes_sent(shared)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset x", "preset must be one of demo"),
        ("--gpus 3", "batch_size must be divisible by gpus * grad_accumulation"),
        ("--gpus 0", "gpus must be at least 1. Got gpus=0"),
        ("--tokens nan", "tokens must be finite and above 0"),
        ("--n-heads 5", "d_model must be divisible by n_heads"),
        ("--shard fsdp2", "shard and shard_head need several GPUs. Got gpus=1"),
        ("--gpus 2 --shard fsdp2 --shard-head", "shard_head must be left out with shard=fsdp2"),
        ("--gpus 2 --no-fused --shard-head", "shard_head needs the fused readout"),
        ("--gpu z80", "z80"),
        ("--nonsense", "nonsense"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert plan.main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
