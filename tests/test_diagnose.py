import base64
import dataclasses
import importlib.metadata
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from diagnosed_models import N_LOOPS, Recurrence, batches
from safetensors.torch import load_file, save_file
from tiny_run import arguments, reseal

from looped import LoopedConfig, LoopedLM
from looped.diagnose import LoopedModel, diagnose, diagnose_run, from_decoder, write_diagnosis
from looped.diagnose.__main__ import main, run_names
from looped.diagnose.diagnosis import Diagnosis, DivergedError
from looped.diagnose.dynamics import Norms, Updates
from looped.diagnose.figures import FIGURES, colours_of
from looped.diagnose.findings import findings
from looped.diagnose.page import STYLE
from looped.diagnose.page import page as render
from looped.diagnose.record import read_record
from looped.diagnose.verdict import judge
from looped.run_directory import load_run
from train.gate import gated_copy
from train.run import main as train


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two trained runs: a blind readout at the last loop only, and a raw one at every loop."""
    directory = tmp_path_factory.mktemp("runs")
    terminal = ["--supervision", "terminal", "--penalty", "0"]
    for name, options in (("terminal/seed-1", terminal), ("raw/seed-1", ["--readout", "raw", "--penalty", "0.02"])):
        assert train(arguments(directory, *options, "--out", str(directory / name))) == 0
    return directory / "terminal" / "seed-1", directory / "raw" / "seed-1"


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "out"
    assert main([*map(str, runs), "--out", str(out), "--tokens", "256", "--loops", "9"]) == 0
    return out


@pytest.mark.parametrize("options", [{}, {"inter_loop_norm": True, "positions": "rotary"}, {"readout": "final-only"}])
def test_a_decoder_seen_as_a_model_is_the_decoder(options):
    config = LoopedConfig(
        vocab_size=23, d_model=16, n_heads=2, n_layers=2, d_ff=24, max_seq_len=8, n_loops=3, **options
    )
    torch.manual_seed(0)
    decoder = LoopedLM(config).eval()
    if decoder.loop_norm is not None:
        torch.nn.init.uniform_(decoder.loop_norm.weight, 0.5, 2)
    tokens, targets = torch.randint(23, (2, 2, 8))
    model = from_decoder(decoder, penalty=0.1)
    states = model.states(tokens, 5)
    for state, expected in zip(states, decoder(tokens, n_loops=5).states, strict=True):
        assert torch.equal(state, expected)
    read_as_last = torch.stack([model.cross_entropy(state, targets, final=True) for state in states])
    torch.testing.assert_close(read_as_last, decoder.evaluation_losses(states, targets))
    as_trained = [model.cross_entropy(state, targets, final=loop == 2).mean() for loop, state in enumerate(states[:3])]
    torch.testing.assert_close(torch.stack(as_trained), decoder(tokens, targets).per_loop)


def test_dropout_is_not_diagnosed():
    config = LoopedConfig(vocab_size=23, d_model=16, n_heads=2, n_layers=1, d_ff=24, max_seq_len=8)
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        from_decoder(LoopedLM(config))


def test_a_model_of_ones_own(tmp_path):
    """Not a LoopedLM: input injection, and a norm that this project does not know."""
    model = Recurrence()
    own = model.described(norm=lambda state: state / state.norm(dim=-1, keepdim=True))
    diagnosis = diagnose(own, batches(), name="mine & <yours>", horizon=8)
    assert diagnosis.n_tokens == 15
    assert diagnosis.verdict.control == "free"
    assert diagnosis.verdict.blind == [True] * N_LOOPS
    assert len(diagnosis.measured.norms.mean) == 8
    assert len(diagnosis.measured.depth.ce) == 16  # at least, and four times the trained depth
    assert set(diagnosis.origin) == {"date", "commit", "versions", "device"}
    raw = diagnose(model.described(norm=None), batches(), name="raw", horizon=8)
    assert raw.verdict.control == "visible"
    final_only = diagnose(model.described(norm_every_loop=False), batches(), name="last", horizon=8)
    write_diagnosis([diagnosis, raw, final_only], tmp_path)
    html = (tmp_path / "index.html").read_text()
    assert html.count('<th class="model" colspan="5">mine &amp; &lt;yours&gt;</th>') == 1  # in the table of depths
    depth = final_only.measured.depth
    for k, (ce, as_trained) in enumerate(zip(depth.ce[:N_LOOPS], depth.as_trained, strict=True), start=1):
        reading = "the same" if k == N_LOOPS else f"{as_trained:.4g}"
        assert f"<td>{k}</td><td>{ce:.4g}</td><td>{reading}</td>" in html
    # Halting has a row for each half of the text; a model that is read in two ways has twice as many.
    assert html.count("<tr><td>as trained</td>") == 6
    assert html.count("<tr><td>as the last</td>") == 2
    assert "mine &amp; &lt;yours&gt;" in html
    assert "<yours>" not in html


def test_a_model_in_bf16():
    model = Recurrence(torch.bfloat16)
    model.norm.eps = 1e-6
    diagnosis = diagnose(model.described(), batches(), horizon=6)
    double = Recurrence(torch.float64)
    double.load_state_dict(model.state_dict())
    expected = diagnose(double.described(), batches(), horizon=6)
    assert diagnosis.measured.norms.mean == pytest.approx(expected.measured.norms.mean, rel=0.02)
    assert diagnosis.measured.clamp.free == pytest.approx(expected.measured.clamp.free, rel=0.02)
    assert diagnosis.measured.clamp.change == pytest.approx(expected.measured.clamp.change, abs=0.02)
    assert max(diagnosis.measured.radial.exact) < 1e-5 < min(diagnosis.measured.radial.immediate) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_loops": 0}, "n_loops must be at least 1. Got n_loops=0"),
        ({"weights": (0.5, 0.5)}, r"weights must be n_loops=3 numbers .* Got \(0.5, 0.5\)"),
        ({"weights": (0.0, 0.0, 0.0)}, "one of them above"),
        ({"weights": (1.0, 1.0, -1.0)}, "at least 0"),
        ({"penalty": -1.0}, "penalty must be at least 0. Got penalty=-1.0"),
        ({"backprop_loops": 0}, "backprop_loops must be at least 1. Got backprop_loops=0"),
    ],
)
def test_models_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        Recurrence().described(**changes)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "at least one batch"),
        ([(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))], {}, r"Got inputs \[1, 3\]"),
        ([(torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), -100))], {}, "must not be negative.*Got -100"),
        (batches(sizes=(1,)), {}, "must hold two windows.* Got 1"),
        (batches(), {"horizon": 3}, "horizon must be above the n_loops=3 .* Got horizon=3"),
    ],
)
def test_bad_batches_are_rejected(given, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(Recurrence().described(), given, **options)


def test_a_model_that_has_diverged_is_rejected():
    model: LoopedModel = Recurrence().described(loop=lambda state, embedded, done: state * torch.nan)
    with pytest.raises(ValueError, match="model has diverged: its cross-entropy at K = 3 is nan"):
        diagnose(model, batches())


def test_the_loop_that_has_diverged_is_named():
    """The last one is read through its norm, and is finite."""
    model = Recurrence().described(norm_every_loop=False, unnormed=lambda state: state * math.nan)
    with pytest.raises(DivergedError, match="its cross-entropy at K = 2 is nan"):
        diagnose(model, batches(), horizon=5)


def test_a_saved_run_is_diagnosed_as_it_was_trained(runs):
    terminal, raw = (diagnose_run(load_run(run), n_tokens=256, horizon=6) for run in runs)
    assert terminal.measured.weights == (0, 0, 1)
    assert (terminal.verdict.control, raw.verdict.control) == ("free", "visible")
    assert raw.measured.weights == (1 / 3,) * 3
    assert (terminal.measured.penalty, raw.measured.penalty) == (0, 0.02)
    assert raw.measured.radial.training != raw.measured.radial.total
    assert terminal.measured.radial.immediate_float64 == pytest.approx(terminal.measured.radial.exact, rel=1e-6)
    summary = json.loads((runs[0] / "summary.json").read_text())["evaluation"]
    assert terminal.n_tokens == 256
    depth = terminal.measured.depth
    for loop, row in enumerate(summary):
        assert depth.ce[loop] == pytest.approx(row["ce"], rel=1e-4)
        assert depth.bits_per_byte[loop] == pytest.approx(row["bits_per_byte"], rel=1e-4)
        assert terminal.measured.norms.mean[loop] == pytest.approx(row["state_norm"], rel=1e-4)


@pytest.mark.parametrize(("backprop_loops", "weights"), [(None, (0.4, 0.24, 0.36)), (2, (0.0, 0.4, 0.6))])
def test_the_weights_of_gated_supervision_are_the_mean_exit_probabilities(runs, backprop_loops, weights):
    """As a gate starts. Nobody exits at a loop without gradient: the later ones share all of the probability."""
    run = load_run(runs[1])
    model = gated_copy(run.model, fused=True)
    train = run.config["train"] | {"supervision": "gated", "backprop_loops": backprop_loops}
    changed = dataclasses.replace(run, model=model, config={"train": train, "model": run.config["model"]})
    assert diagnose_run(changed, n_tokens=256, horizon=6).measured.weights == pytest.approx(weights)


def test_loops_without_gradient_have_no_weight(runs):
    run = load_run(runs[1])
    for supervision, expected in (("per-loop", (0, 0.5, 0.5)), ("terminal", (0, 0, 1))):
        changed = run.config["train"] | {"supervision": supervision, "backprop_loops": 2}
        config = {"train": changed, "model": run.config["model"]}
        found = diagnose_run(dataclasses.replace(run, config=config), n_tokens=256, horizon=6)
        assert found.measured.weights == expected


class Page(HTMLParser):
    """What a page refers to, its pictures, its tables (rows of the texts of their cells), and all of its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.pictures: list[bytes] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe")
        self.references += [attributes[name] for name in ("href", "src", "srcset") if name in attributes]
        if tag == "img":
            self.pictures.append(base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,")))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.tables[-1][-1] += [""] * int(attributes.get("colspan", 1))

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data


def test_the_page_holds_everything_and_needs_no_network(out):
    text = (out / "index.html").read_text()
    page = Page(text)
    assert len(page.pictures) == len(FIGURES) == 8
    for name, picture in zip(FIGURES, page.pictures, strict=True):
        assert picture == (out / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert len(page.tables) == 13  # the comparison, two verdicts, the main numbers, eight sections, the origin
    for table in page.tables:
        assert len({len(row) for row in table}) == 1  # as many cells in every row as in the header
        assert len(table) > 2
    for diagnosis, verdict in zip(read_record(out / "diagnosis.json"), page.tables[1:3], strict=True):
        assert diagnosis.name in page.text
        assert diagnosis.verdict.advice in page.text
        assert verdict[1:] == [
            [finding.question, finding.answer, finding.number + finding.threshold, finding.action]
            for finding in findings(diagnosis.measured)
        ]


def test_every_measured_number_is_on_the_page(out):
    """Of the loops that were trained; the figures show those beyond."""
    tables = Page((out / "index.html").read_text()).tables
    cells = {cell.replace("e-", "e-0") for table in tables for row in table for cell in row}
    cells |= {part for cell in cells for part in cell.replace(" ± ", " / ").split(" / ")}
    for diagnosis in read_record(out / "diagnosis.json"):
        measured = diagnosis.measured
        numbers = list(measured.response)
        for values in (
            measured.norms.mean, measured.norms.scale, measured.norms.entered, measured.norms.within,
            *measured.norms.percentiles[:3], *dataclasses.astuple(measured.updates),
            *dataclasses.astuple(measured.radial), measured.clamp.free, measured.alpha.ranges,
            measured.depth.ce, measured.depth.ppl, measured.depth.bits_per_byte,
        ):  # fmt: skip
            numbers += values[: measured.n_loops]
        missing = [number for number in numbers if f"{number:.4g}".replace("nan", "-") not in cells]
        assert not missing


@pytest.mark.parametrize("size", [1.2345e5, 1.2345e-5])
def test_no_table_is_wider_than_a_window_of_1100_pixels(size):
    """By the longest piece of every column that a browser cannot break, in the widest of the usual fonts."""
    measured = diagnose(Recurrence().described(), batches(), horizon=30).measured
    values = [size] * 30
    enormous = dataclasses.replace(
        measured,
        norms=Norms(values, [[size] * 9] * 30, values, values, values),
        updates=Updates(*[[-size] * 29] * 8),
    )
    name = "a-run/with/rather-a-long-name"
    diagnosis = Diagnosis(name, 10**6, enormous, judge(enormous), {"commit": "0123456789" * 4 + "-dirty"})
    page = Page(render([diagnosis, dataclasses.replace(diagnosis, name="b")], dict.fromkeys(FIGURES, b"")))
    for table in page.tables:
        pieces = [[max(map(len, re.split(r"[\s/-](?!\d)", cell))) for cell in row] for row in table]
        longest = [max(column) for column in zip(*pieces, strict=True)]
        breakable = len(longest) if "question" in table[0] or "fact" in table[0] else 1  # columns, anywhere in a word
        widths = [min(15, width) for width in longest[:breakable]] + longest[breakable:]
        assert sum(8.2 * width + 11.2 for width in widths) <= 1024, table[0]
    assert "nowrap" not in re.sub(r"\.whole \{.*?\}", "", STYLE)


def test_the_numbers_as_json(out, runs):
    content = json.loads((out / "diagnosis.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    first, second = content["diagnoses"]
    assert (first["name"], second["name"]) == ("terminal/seed-1", "raw/seed-1")
    measured = diagnose_run(load_run(runs[0]), n_tokens=256, horizon=9).measured
    assert first["measured"]["norms"]["mean"] == pytest.approx(measured.norms.mean, rel=1e-5)
    assert first["measured"]["halting"]["skipped"]["margin"]["speed"] > 0  # timed for the page, and else if asked for
    assert math.isnan(measured.halting.skipped["margin"].speed)
    assert first["clamp_change"] == pytest.approx(measured.clamp.change, abs=1e-6)
    assert first["alpha_ranges"] == pytest.approx(measured.alpha.ranges, abs=1e-5)
    assert second["measured"]["radial"]["exact"] == [None] * 3
    assert set(dataclasses.asdict(measured)) == set(first["measured"])


def test_one_run_is_diagnosed_in_its_own_directory(runs, capsys):
    assert main([str(runs[1]), "--tokens", "64", "--loops", "5"]) == 0
    assert (runs[1] / "diagnosis" / "index.html").exists()
    output = capsys.readouterr().out
    assert "seed-1: Consider a larger norm penalty: the loss sees how large the state is" in output
    assert re.search(r"\n  Can the loss see how large the state is\? +Yes\n", output)
    assert output.endswith(f"page {runs[1] / 'diagnosis' / 'index.html'}\n")
    shutil.rmtree(runs[1] / "diagnosis")


def test_a_run_that_has_diverged_is_found_before_anything_is_measured(runs, tmp_path, capsys, monkeypatch):
    torn = tmp_path / "torn"
    shutil.copytree(runs[1], torn)
    weights = load_file(torn / "checkpoint" / "model.safetensors")
    reseal(torn / "checkpoint")
    save_file({name: value * torch.nan for name, value in weights.items()}, torn / "checkpoint" / "model.safetensors")
    reseal(torn / "checkpoint")
    monkeypatch.setattr("looped.diagnose.__main__.diagnose_run", None)
    assert main([str(runs[0]), str(torn), "--out", str(tmp_path / "o"), "--tokens", "64"]) == 2
    assert capsys.readouterr().err == "error: torn has diverged: its cross-entropy at K = 3 is nan.\n"
    assert not (tmp_path / "o").exists()


def test_the_page_says_where_its_numbers_are_from(out, runs):
    (first, second) = (one["origin"] for one in json.loads((out / "diagnosis.json").read_text())["diagnoses"])
    assert (first["run"], first["step"], first["data"], first["tokenizer"]) == ("seed-1", "8", "text.txt", "bpe")
    assert second["device"].startswith(
        "cuda: " if torch.cuda.is_available() else "cpu: "
    )  # where --device auto measures
    text = (out / "index.html").read_text()
    for fact in (*first.values(), f"torch {importlib.metadata.version('torch')}"):
        assert fact in text
    origin = {tuple(row[:2]): row[2] for row in Page(text).tables[-1]}
    assert origin["run", "seed-1"] == "all"
    assert origin["tokenizer", "bpe"] == "all"
    assert "<title>Diagnosis: 2 models</title>" in text


def test_a_model_keeps_its_colour_where_others_are_missing():
    every = dict(zip("abcd", colours_of("abcd"), strict=True))
    assert len(set(every.values())) == 4
    assert colours_of(["d", "b"], every) == [every["d"], every["b"]]
    assert colours_of(["b"]) != colours_of(["b"], every)


def test_names_tell_runs_apart(tmp_path):
    a, b, c = tmp_path / "x" / "seed-1", tmp_path / "y" / "seed-1", tmp_path / "y" / "seed-2"
    assert run_names([b, c]) == ["seed-1", "seed-2"]
    assert run_names([a, b, c]) == ["x/seed-1", "y/seed-1", "y/seed-2"]
    with pytest.raises(ValueError, match=r"given once\. Got .*seed-1 again"):
        run_names([a, b, tmp_path / "x" / ".." / "x" / "seed-1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{run}", "{run}", "--out", "{tmp}/o"], "every run may be given once"),
        (["{run}", "{raw}"], "out must be given for a page of several runs. Got 2 runs"),
        (["{tmp}/nowhere"], "a run must be a directory that training wrote"),
        (["{tmp}"], "config.json cannot be used"),
        (["{run}", "--out", "{run}/config.json"], "out must be a directory that can be written"),
        (["{run}", "--out", "/proc/diagnosis"], "out must be a directory that can be written"),
        (["{run}", "--tokens", "3"], "tokens must be at least two windows of seq_len=16, .* Got tokens=3"),
        (["{run}", "{raw}", "--out", "{tmp}/o", "--tokens", "20"], "tokens must be at least two windows"),
        (["{run}", "--device", "cuda"], "device must be one that PyTorch finds here. Got device=cuda"),
        (["{run}", "--loops", "3"], "horizon must be above the n_loops=3 .* Got horizon=3"),
        (["{run}", "--rounds", "-1"], "rounds must be at least 0. Got rounds=-1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"run": runs[0], "raw": runs[1], "tmp": tmp_path}
    before = sorted([*runs[0].rglob("*"), *tmp_path.rglob("*")])
    assert main([option.format(**places) for option in options]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", printed.err)
    assert printed.out == ""
    assert sorted([*runs[0].rglob("*"), *tmp_path.rglob("*")]) == before


@pytest.mark.parametrize("options", [[], ["run", "--tokens", "many"], ["run", "--loop", "4"]])
def test_bad_command_lines(options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(options)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err
