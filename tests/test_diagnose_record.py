"""diagnosis.json: what is written is read, and a record that cannot serve is told from one that is damaged."""

import dataclasses
import json
import math
import os

import pytest
from diagnosed_models import halting, measurements

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


def test_the_diagnosis_of_a_run_serves_as_long_as_it_is_of_its_weights(tmp_path):
    assert read_diagnosis_of_run(tmp_path, n_tokens=1, horizon=1) is None
    path = record_of_run(tmp_path)
    write_record([diagnosis()], path)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    for age, serves in ((-1, True), (1, False)):
        written = path.stat().st_mtime
        os.utime(weights, (written + age, written + age))
        assert (read_diagnosis_of_run(tmp_path, n_tokens=512, horizon=5) == diagnosis()) == serves


def test_a_diagnosis_of_a_run_that_cannot_serve(tmp_path):
    path = record_of_run(tmp_path)
    write_record([diagnosis()], path)
    assert read_diagnosis_of_run(tmp_path, n_tokens=513, horizon=5) is None
    assert read_diagnosis_of_run(tmp_path, n_tokens=512, horizon=6) is None
    write_record([diagnosis(), diagnosis("other")], path)
    assert read_diagnosis_of_run(tmp_path, n_tokens=1, horizon=1) is None
    path.write_text(to_json([diagnosis()]).replace(f'"format": {FORMAT}', '"format": 1'))
    assert read_diagnosis_of_run(tmp_path, n_tokens=1, horizon=1) is None
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_diagnosis_of_run(tmp_path, n_tokens=1, horizon=1)
