import json
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny_sweep import assert_rejected, finished_sweep, training_words

from looped.run_directory import load_run
from train.paper import frontier, frontier_perplexity, sweep
from train.paper.__main__ import main
from train.paper.figures import draw_frontier
from train.paper.frontier_page import markdown
from train.paper.frontier_perplexity import Documents, document_sums, estimates, perplexity, points, resample
from train.paper.frontier_speed import Rate

NAMES = ("per-loop-rmsnorm", "terminal-rmsnorm")
QUICK = ("--batches", "1", "3", "--rounds", "2")
SEQ_LEN = 16
COMMITTED = Path(__file__).parents[1] / "bench/results/2026-11-24-amd-epyc-avx2-2-threads-frontier.json"


def arguments(directory: Path, trained: Path) -> list[str]:
    own = ["--conditions", *NAMES, "--seeds", "7", "--tokens", "256", "--out", str(directory / "out"), *QUICK]
    return ["frontier", *own, "--", *training_words(trained)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return finished_sweep(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory) -> Path:
    """A directory in which the command has found its runs (runs/frontier) and written its record (out)."""
    directory = tmp_path_factory.mktemp("frontier")
    shutil.copytree(trained / "sweep", directory / "runs" / "frontier")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sweep, "_start", None)  # what is there is not trained again
        assert main(arguments(directory, trained)) == 0
    return directory


@pytest.fixture
def runs(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the runs, to be damaged; without the competitors in speed, which compile."""
    monkeypatch.setattr(frontier, "competitors", lambda model: {})
    return Path(shutil.copytree(finished / "runs" / "frontier", tmp_path / "runs"))


def written(out: Path, kind: str = "json") -> Path:
    """The one file of that kind, named by date and device."""
    (path,) = out.glob(f"????-??-??-*-threads-frontier.{kind}")
    return path


def measured(runs: Path, out: Path, *options: str) -> dict:
    assert main(["frontier", "--runs", str(runs), "--out", str(out), "--tokens", "256", *QUICK, *options]) == 0
    return json.loads(written(out).read_text())


def test_perplexity_and_bits_per_byte_are_those_that_the_runs_reported(finished):
    record = json.loads(written(finished / "out").read_text())
    assert [(point["condition"], point["n_loops"]) for point in record["points"]] == [
        (name, loop) for name in NAMES for loop in (1, 2, 3, 4)
    ]
    for point in record["points"]:
        run = finished / "runs" / "frontier" / point["condition"] / "seed-7"
        reported = json.loads((run / "summary.json").read_text())["evaluation"][point["n_loops"] - 1]
        for name in ("ppl", "bits_per_byte"):
            assert point[name]["mean"] == pytest.approx(reported[name], rel=1e-4)
            assert point[name]["by_seed"] == [point[name]["mean"]]
            assert point[name]["low"] < point[name]["mean"] < point[name]["high"]
        assert list(point["tokens_per_second"]) == ["1", "3"]
        for rate in point["tokens_per_second"].values():
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert record["settings"]["tokens"] == 256
    assert record["settings"]["documents"] > 3
    assert {"device", "threads", "versions", "commit", "date"} <= set(record)


def test_difference_from_the_reference(finished):
    record = json.loads(written(finished / "out").read_text())
    reference, others = record["points"][:4], record["points"][4:]
    assert [point["ppl_difference"] for point in reference] == [None] * 4
    for theirs, point in zip(reference, others, strict=True):
        difference = point["ppl_difference"]
        assert difference["mean"] == pytest.approx(point["ppl"]["mean"] - theirs["ppl"]["mean"])
        assert difference["low"] <= difference["mean"] <= difference["high"]


def test_what_is_not_there_is_trained(monkeypatch, tmp_path):
    """By the sweep, with its options; what it says of success is the exit code."""
    called = []
    monkeypatch.setattr(sweep, "run", lambda words, interruptions: called.append(words) or 3)
    assert main(["frontier", "--conditions", *NAMES, "--seeds", "5", "--out", str(tmp_path / "out"), "--", "-x"]) == 3
    assert called == [["--out", "runs/frontier", "--conditions", *NAMES, "--seeds", "5", "-x"]]
    assert not (tmp_path / "out").exists()


def test_training_that_does_not_succeed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["frontier", "--out", "out", "--", "--data", "none.txt"]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_committed_page_is_that_of_its_record():
    record = json.loads(COMMITTED.read_text())
    assert markdown(record, COMMITTED.stem) == COMMITTED.with_suffix(".md").read_text()


def test_every_complete_run_counts(runs, tmp_path):
    first, second = (runs / name for name in NAMES)
    shutil.copytree(first / "seed-7", first / "seed-8")
    shutil.copytree(second / "seed-7", second / "seed-9")
    (second / "seed-9" / "summary.json").unlink()  # stopped
    before = sorted(path for path in runs.rglob("*"))
    record = measured(runs, tmp_path / "out")
    assert sorted(path for path in runs.rglob("*")) == before
    assert [(run["condition"], run["seed"], run["steps"]) for run in record["runs"]] == [
        (NAMES[0], 7, 8), (NAMES[0], 8, 8), (NAMES[1], 7, 8),
    ]  # fmt: skip
    assert record["without_runs"] == ["per-loop-raw", "per-loop-final-only", "per-loop-rmsnorm-penalty"]
    for point in record["points"]:
        assert len(point["ppl"]["by_seed"]) == (2 if point["condition"] == NAMES[0] else 1)


def test_losses_belong_to_the_document_of_their_target(finished):
    run = load_run(finished / "runs" / "frontier" / NAMES[0] / "seed-7")
    tokens, bounds = run.validation.tokens, run.validation.bounds.tolist()
    losses, n_tokens, n_bytes = np.zeros((4, len(bounds) - 1)), np.zeros(len(bounds) - 1), np.zeros(len(bounds) - 1)
    assert (len(tokens) - 1) % SEQ_LEN > 0  # the last window is shorter than the others
    for start in range(0, len(tokens) - 1, SEQ_LEN):
        row = tokens[None, start : start + SEQ_LEN + 1]
        with torch.no_grad():
            loss = run.model.evaluation_losses(run.model(row[:, :-1]).states, row[:, 1:])[:, 0]
        for offset in range(loss.shape[-1]):
            position = start + 1 + offset
            document = max(number for number in range(len(bounds) - 1) if bounds[number] <= position)
            losses[:, document] += loss[:, offset].numpy()
            n_tokens[document] += 1
            n_bytes[document] += int(run.validation.bytes_per_token[tokens[position]])
    assert n_tokens.sum() == len(tokens) - 1  # nothing is left out
    sums = document_sums(run, len(tokens), torch.float32)
    assert sums.n_tokens.tolist() == n_tokens.tolist()
    assert sums.n_bytes.tolist() == n_bytes.tolist()
    np.testing.assert_allclose(sums.losses, losses, rtol=1e-5)


def test_documents_without_a_target_are_left_out(finished):
    run = load_run(finished / "runs" / "frontier" / NAMES[0] / "seed-7")
    sums = document_sums(run, 1, torch.float32)  # one window, in the first documents
    assert sums.n_tokens.sum() == SEQ_LEN
    assert len(sums.n_tokens) < len(run.validation.bounds) - 1
    assert sums.losses.shape == (4, len(sums.n_tokens))


def made_documents(n_documents: int, seed: int = 0, loops: int = 2) -> Documents:
    draw = np.random.default_rng(seed)
    n_tokens = draw.integers(1, 50, n_documents).astype(float)
    losses = np.abs(draw.normal(3, 0.5, (loops, n_documents))) * n_tokens
    return Documents(losses, n_tokens, 4 * n_tokens)


def test_a_draw_is_the_text_of_the_drawn_documents():
    documents = made_documents(7)
    counts = resample(7, 20)
    assert counts.shape == (21, 7)
    assert (counts.sum(1) == 7).all()
    assert len(np.unique(counts, axis=0)) > 10
    bits = frontier_perplexity.bits_per_byte(documents, counts)
    for row, ppl, bpb in zip(counts, perplexity(documents, counts), bits, strict=True):
        chosen = np.repeat(np.arange(7), row.astype(int))
        nats, n_tokens = documents.losses[:, chosen].sum(1), documents.n_tokens[chosen].sum()
        np.testing.assert_allclose(ppl, np.exp(nats / n_tokens))
        np.testing.assert_allclose(bpb, nats / math.log(2) / documents.n_bytes[chosen].sum())
    np.testing.assert_array_equal(counts, resample(7, 20))


def test_interval_is_that_of_the_mean():
    """Of documents of one length the mean loss is normal, with standard deviation sd / sqrt(D)."""
    losses = np.random.default_rng(1).normal(3, 0.5, (1, 400))
    documents = Documents(losses, np.ones(400), None)
    (estimate,) = estimates([perplexity(documents, resample(400, 4000))], 400)
    half = 1.96 * losses.std() / math.sqrt(400)
    assert estimate.mean == pytest.approx(math.exp(losses.mean()))
    assert math.log(estimate.low) == pytest.approx(losses.mean() - half, abs=0.1 * half)
    assert math.log(estimate.high) == pytest.approx(losses.mean() + half, abs=0.1 * half)


def test_seeds_are_averaged_within_a_draw():
    """The interval is that of the value: two seeds that the draws move by the same amount keep its width."""
    draws = np.linspace(-1, 1, 101)[:, None]
    first, second = (np.concatenate([[[value]], value + draws]) for value in (2.0, 6.0))
    (estimate,) = estimates([first, second], 5)
    assert (estimate.mean, estimate.by_seed) == (4.0, [2.0, 6.0])
    assert (estimate.low, estimate.high) == pytest.approx((3.05, 4.95))
    (alone,) = estimates([first], 1)
    assert alone.mean == 2
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


def test_differences_are_paired_by_draw_and_seed():
    """Documents differ much, conditions by a constant: the perplexities' intervals overlap, the difference is clear."""
    of_reference = {seed: made_documents(30, seed) for seed in (1, 2)}
    better = {
        seed: Documents(made.losses - 0.1 * made.n_tokens, made.n_tokens, None) for seed, made in of_reference.items()
    }
    rates = {"4": {"shape": [Rate(3.0, 2.0, 4.0)] * 2}}
    shapes = dict.fromkeys(("per-loop-rmsnorm", "per-loop-raw"), "shape")
    made = points(
        {"per-loop-rmsnorm": of_reference, "per-loop-raw": better | {3: made_documents(30, 3)}}, rates, shapes
    )
    for theirs, ours in zip(made[:2], made[2:], strict=True):
        difference = ours["ppl_difference"]
        assert ours["ppl"]["high"] > theirs["ppl"]["low"]
        assert difference["high"] < 0
        expected = [value * math.expm1(-0.1) for value in theirs["ppl"]["by_seed"]]
        assert difference["by_seed"] == pytest.approx(expected)  # seed 3 has no partner
        assert ours["seeds"] == [1, 2, 3]
        assert ours["bits_per_byte"] is None
        assert ours["tokens_per_second"] == {"4": {"median": 3.0, "low": 2.0, "high": 4.0}}
    alone = points({"per-loop-raw": of_reference}, rates, shapes)
    assert [point["ppl_difference"] for point in alone] == [None, None]


def test_conditions_of_one_architecture_share_their_speed(finished):
    record = json.loads(written(finished / "out").read_text())
    first, second = (record["points"][:4], record["points"][4:])
    assert [point["tokens_per_second"] for point in first] == [point["tokens_per_second"] for point in second]
    names = ["fused, RMSNorm before the head", "plain PyTorch", "plain PyTorch, blocks compiled"]
    assert [(row["model"], row["n_loops"]) for row in record["speeds"]] == [(n, k) for n in names for k in (1, 2, 3, 4)]
    assert [row["tokens_per_second"] for row in record["speeds"][:4]] == [p["tokens_per_second"] for p in first]


def test_page_and_figure_are_written_beside_the_record(finished):
    """What the page says is seen in the committed one; but for a condition that it does not have."""
    out = finished / "out"
    record, page = json.loads(written(out).read_text()), written(out, "md").read_text()
    assert page == markdown(record, written(out).stem)
    assert f"![perplexity against tokens per second]({written(out, 'png').name})" in page
    assert plt.imread(written(out, "png")).shape[1] > 1200
    assert "read those loops without it" not in page
    record["points"][0]["condition"] = "per-loop-final-only"
    assert "read those loops without it" in markdown(record, "name")


def test_report_without_bytes_and_with_one_document(runs, tmp_path):
    """A tokenizer that loses text has no bits per byte; one document has no interval. Neither stops the figure."""
    cut_validation(runs, None, [0, -1])
    record = measured(runs, tmp_path / "out")
    for point in record["points"]:
        assert point["bits_per_byte"] is None
        assert (point["ppl"]["low"], point["ppl"]["high"]) == (None, None)
    lines = written(tmp_path / "out", "md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| `{NAMES[0]}` | 1 |")).split(" | ")
    assert row[2:6] == [f"{record['points'][0]['ppl']['mean']:.4g}", "1", "-", "-"]
    assert "No intervals" in "\n".join(lines)


def test_perplexities_far_apart(finished, tmp_path):
    """As of a model that was trained at its last loop alone, far off at K = 1, or at infinity."""
    record = json.loads(written(finished / "out").read_text())
    for point, factor in zip(record["points"], (1, 1, 1, 1, 1e4, 10, 1, 1), strict=True):
        for name in ("mean", "low", "high"):
            point["ppl"][name] *= factor
    record["points"][5]["ppl"] |= {"mean": None, "low": None, "high": None}
    draw_frontier(tmp_path / "wide.png", record)
    assert (tmp_path / "wide.png").stat().st_size > 10_000
    assert "| - |" in markdown(record, "name")


def rejected(runs: Path, out: Path, message: str, capsys, *options: str) -> None:
    assert_rejected(["frontier", "--runs", str(runs), "--out", str(out), *options], message, capsys, out)


def test_rejects_what_is_no_sweep(runs, tmp_path, capsys):
    out = tmp_path / "out"
    rejected(tmp_path, out, "runs must be a sweep with a complete run.* has none", capsys)
    rejected(runs, out, "of the conditions per-loop-raw", capsys, "--conditions", "per-loop-raw")
    (runs / NAMES[1] / "seed-7" / "validation.safetensors").unlink()
    rejected(runs, out, "terminal-rmsnorm/seed-7/validation.safetensors cannot be used", capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "tokens must be at least 1. Got tokens=0"),
        (["--batches", "4", "0"], r"batches must be at least 1. Got batches=\(4, 0\)"),
        (["--seeds", "1", "1"], "seeds must be at least one, and each only once. Got 1 1"),
        (["--batches", "4", "4"], "batches must be at least one, and each only once. Got 4 4"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--conditions", "raw"], "invalid choice 'raw' for argument '--conditions'"),
        (["--runs", "somewhere", "--", "--steps", "3"], "only without --runs"),
        (["--out", "/proc/page"], "out must be a directory that can be written. Got out=/proc/page"),
    ],
)
def test_rejects_options(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_rejected(["frontier", *options], message, capsys, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rejects_runs_that_do_not_compare(runs, tmp_path, capsys):
    other, out = runs / NAMES[1] / "seed-7", tmp_path / "out"
    path, validation = other / "config.json", other / "validation.safetensors"
    config = path.read_text()
    path.write_text(config.replace('"n_loops": 4', '"n_loops": 2'))
    rejected(runs, out, "runs must have one n_loops. Got 4 in .* and 2 in .*terminal-rmsnorm", capsys)
    path.write_text(config.replace('"dtype": "fp32"', '"dtype": "bf16"'))
    rejected(runs, out, "runs must have one dtype. Got fp32 in .* and bf16 in", capsys)
    path.write_text(config)
    split = safetensors.numpy.load_file(validation)
    validation.write_bytes(safetensors.numpy.save(split | {"tokens": split["tokens"][::-1].copy()}))
    rejected(runs, out, "runs must have one validation text", capsys)


def test_rejects_a_validation_text_without_a_window(runs, tmp_path, capsys):
    cut_validation(runs, SEQ_LEN, [0, 5, SEQ_LEN])
    rejected(runs, tmp_path / "out", r"must hold a window of seq_len \+ 1 = 17 tokens. Got 16", capsys)


def cut_validation(runs: Path, n_tokens: int | None, bounds: list[int]) -> None:
    """Have every run validate on its first tokens, in documents with these bounds, and not know their bytes."""
    for path in runs.rglob("validation.safetensors"):
        tokens = safetensors.numpy.load_file(path)["tokens"][:n_tokens]
        ends = np.array([bound if bound >= 0 else len(tokens) for bound in bounds], dtype=np.int32)
        path.write_bytes(safetensors.numpy.save({"tokens": tokens, "bounds": ends}))
