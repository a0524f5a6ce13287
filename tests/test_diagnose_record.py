"""diagnosis.json: what is written is read, and a record that cannot serve is told from one that is damaged."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from diagnosed_models import halting, measurements

from looped.checkpoint import WEIGHTS, Progress, seal, weights_hash
from looped.diagnose import Diagnosis, read_diagnosis_of_run, read_record, write_record
from looped.diagnose.record import FORMAT, OtherFormatError, record_of_run, to_json
from looped.diagnose.verdict import judge


def diagnosis(name: str = "mine", **changes) -> Diagnosis:
    measured = measurements(**changes)
    return Diagnosis(name, 512, measured, judge(measured), {"date": "2026-01-01"})


def test_a_record_is_read_as_it_was_written(tmp_path):
    never = dataclasses.replace(halting(4.0).as_trained, tau=None)
    no_bytes = dataclasses.replace(measurements().depth, bits_per_byte=[math.nan] * 5)
    written = [diagnosis(), diagnosis("other", halting=dataclasses.replace(halting(1.5), as_trained=never))]
    written.append(diagnosis("third", depth=no_bytes, penalty=0.5))
    path = tmp_path / "made" / "diagnosis.json"
    write_record(written, path)
    assert [file.name for file in path.parent.iterdir()] == ["diagnosis.json"]
    read = read_record(path)
    assert read[:2] == written[:2]
    assert to_json(read) == path.read_text()
    assert isinstance(read[0].measured.weights, tuple)
    assert read[1].measured.halting.as_trained.tau is None  # null where no token may leave early
    assert all(map(math.isnan, read[2].measured.depth.bits_per_byte))  # null where there is no number


def test_a_verdict_is_judged_again(tmp_path):
    path = tmp_path / "diagnosis.json"
    content = json.loads(to_json([diagnosis()]))
    content["diagnoses"][0]["verdict"] = "of another day"
    path.write_text(json.dumps(content))
    assert read_record(path) == [diagnosis()]


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1, None])
def test_another_format_is_not_read(number, tmp_path):
    path = tmp_path / "diagnosis.json"
    path.write_text(json.dumps({"format": number, "diagnoses": [{"name": "x"}]}))
    with pytest.raises(OtherFormatError, match=f"must be of format {FORMAT}. Got format {number}"):
        read_record(path)


def damaged(old: str, new: str) -> str:
    text = to_json([diagnosis()])
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (damaged('"response"', '"answer"'), "response"),
        (damaged('"diagnoses"', '"others"'), "diagnoses"),
        (damaged('"origin"', '"source"'), "origin"),
        (damaged('"n_loops": 4', '"n_loops": 9'), "IndexError"),
        (json.dumps({"format": FORMAT, "diagnoses": {}}), "must be a list"),
        (json.dumps({"format": FORMAT, "diagnoses": ["mine"]}), "TypeError"),
        (to_json([diagnosis()])[:-20], "JSONDecodeError"),
        ("[]", "TypeError"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_damaged_record_is_named_in_one_line(text, message, tmp_path):
    path = tmp_path / "diagnosis.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"^\S*diagnosis\.json cannot be read \([^\n]*{message}[^\n]*\)\. Remove it\.$"
    ):
        read_record(path)


def trained(run: Path, weights: bytes) -> Diagnosis:
    """A run's checkpoint with these weights, and a diagnosis of them."""
    checkpoint = run / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / WEIGHTS).write_bytes(weights)
    seal(checkpoint, Progress(8, "text"))
    one = diagnosis()
    return Diagnosis(one.name, one.n_tokens, one.measured, one.verdict, {"weights": weights_hash(run) or ""})


def test_the_diagnosis_of_a_run_serves_as_long_as_it_is_of_its_weights(tmp_path):
    """Whatever the files' times are: a copy of the run has others."""
    run = tmp_path / "run"
    run.mkdir()
    assert read_diagnosis_of_run(run, n_tokens=1, horizon=1) is None
    of_weights = trained(run, b"weights")
    write_record([of_weights], record_of_run(run))
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    os.utime(copied / "checkpoint" / WEIGHTS, (2e9, 2e9))
    assert read_diagnosis_of_run(copied, n_tokens=512, horizon=5) == of_weights
    trained(run, b"others")
    os.utime(run / "checkpoint" / WEIGHTS, (1, 1))
    assert read_diagnosis_of_run(run, n_tokens=512, horizon=5) is None


def test_a_diagnosis_of_a_run_that_cannot_serve(tmp_path):
    path, of_weights = record_of_run(tmp_path), trained(tmp_path, b"weights")
    write_record([of_weights], path)
    assert read_diagnosis_of_run(tmp_path, n_tokens=512, horizon=5) == of_weights
    assert read_diagnosis_of_run(tmp_path, n_tokens=513, horizon=5) is None
    assert read_diagnosis_of_run(tmp_path, n_tokens=512, horizon=6) is None
    write_record([of_weights, of_weights], path)
    assert read_diagnosis_of_run(tmp_path, n_tokens=1, horizon=1) is None
    path.write_text(to_json([of_weights]).replace(f'"format": {FORMAT}', '"format": 1'))
    assert read_diagnosis_of_run(tmp_path, n_tokens=1, horizon=1) is None
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_diagnosis_of_run(tmp_path, n_tokens=1, horizon=1)
