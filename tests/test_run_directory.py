import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from tiny_run import arguments, reseal

from looped.checkpoint import weights_hash
from looped.config import LoopedConfig
from looped.run_directory import load_run
from train.run import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run = directory / "run"
    assert main(arguments(directory, "--out", str(run), "--inter-loop-norm", "--vocab-size", "320")) == 0
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_an_early_run_lacks_what_came_later(run):
    config = json.loads((run / "config.json").read_text())
    later = {name: config["train"].pop(name) for name in ("backprop_loops", "gate_beta", "gate_prior")}
    (run / "config.json").write_text(json.dumps(config))
    train = load_run(run).config["train"]
    assert {name: train[name] for name in later} == later


def test_the_run_is_read_back(finished):
    before = torch.get_rng_state()
    loaded = load_run(finished)
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.name, loaded.directory) == ("run", finished)
    assert loaded.config == json.loads((finished / "config.json").read_text())
    assert loaded.model.config == LoopedConfig(**loaded.config["model"])
    assert not loaded.model.training
    weights = safetensors.torch.load_file(finished / "checkpoint" / "model.safetensors")
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights[name])


def test_its_losses_are_those_that_the_run_reported(finished):
    loaded = load_run(finished)
    tokens = loaded.validation.tokens
    windows = tokens[: (len(tokens) - 1) // 16 * 16 + 1]
    inputs, targets = windows[:-1].view(-1, 16), windows[1:].view(-1, 16)
    summary = json.loads((finished / "summary.json").read_text())["evaluation"]
    chosen = np.arange(16) * len(inputs) // 16  # 256 tokens, spread as the trainer spreads them
    with torch.no_grad():
        losses = loaded.model.evaluation_losses(loaded.model(inputs[chosen]).states, targets[chosen])
    assert losses.flatten(1).mean(1).tolist() == pytest.approx([row["ce"] for row in summary], rel=1e-4)
    sizes = loaded.validation.bytes_per_token
    bits = losses[-1].sum().item() / np.log(2) / sizes[targets[chosen]].sum().item()
    assert bits == pytest.approx(summary[-1]["bits_per_byte"], rel=1e-4)


def test_the_validation_split(finished):
    validation = load_run(finished).validation
    kept = safetensors.numpy.load_file(finished / "validation.safetensors")
    for name in ("tokens", "bounds"):
        assert getattr(validation, name).dtype == torch.int64
        assert getattr(validation, name).tolist() == kept[name].tolist()


def test_sizes_reach_the_models_vocabulary(run):
    path = run / "validation.safetensors"
    kept = safetensors.numpy.load_file(path)
    assert len(kept["bytes_per_token"]) == 320
    path.write_bytes(safetensors.numpy.save(kept | {"bytes_per_token": kept["bytes_per_token"][:300]}))
    sizes = load_run(run).validation.bytes_per_token
    assert sizes.tolist() == [*kept["bytes_per_token"][:300].tolist(), *[0] * 20]
    path.write_bytes(safetensors.numpy.save({name: kept[name] for name in ("tokens", "bounds")}))
    assert load_run(run).validation.bytes_per_token is None


def test_the_previous_checkpoint_serves_while_the_new_one_is_put_in_place(run):
    (run / "checkpoint").rename(run / "checkpoint.old")
    load_run(run)


def replaced(name: str, value) -> dict:
    return {"tokens": np.arange(9, dtype=np.uint8), "bounds": np.array([0, 4, 9], dtype=np.uint8), name: value}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json cannot be used .*FileNotFoundError"),
        ("config.json", b"[]", "config.json cannot be used"),
        ("config.json", b'{"model": {"d_model": 4}}', "config.json cannot be used"),
        ("checkpoint/model.safetensors", None, "checkpoint is torn: FileNotFoundError"),
        ("checkpoint/model.safetensors", b"torn", "torn: model.safetensors is not what was written"),
        ("checkpoint/checkpoint.json", None, "checkpoint is torn: FileNotFoundError"),
        ("checkpoint/checkpoint.json", b'{"step": 8}', "checkpoint is torn: KeyError"),
        ("validation.safetensors", None, "validation.safetensors cannot be used .*FileNotFoundError"),
        ("validation.safetensors", b"torn", "validation.safetensors cannot be used"),
        (
            "validation.safetensors",
            safetensors.numpy.save({"tokens": np.zeros(3, dtype=np.uint8)}),
            "cannot be used .*bounds",
        ),
        (
            "validation.safetensors",
            safetensors.numpy.save(replaced("tokens", np.array([1, 320], dtype=np.uint16))),
            "tokens below vocab_size=320. Got 320",
        ),
        (
            "validation.safetensors",
            safetensors.numpy.save(replaced("bounds", np.array([0, 4, 8], dtype=np.uint8))),
            r"rise from 0 to its 9 tokens. Got \[0, 4, 8\]",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(run, name, content, message):
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_run(run)


def test_weights_of_another_model_are_rejected(run):
    config = json.loads((run / "config.json").read_text())
    config["model"]["d_ff"] = 32
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"blocks.0.mlp.w1.weight is \[64, 32\] in the checkpoint and \[32, 32\] in the model"
    ):
        load_run(run)


def test_weights_that_changed_under_their_seal_are_not_read(run):
    path = run / "checkpoint" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 64  # one bit of one weight
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is torn: model\.safetensors is not what was written"):
        load_run(run)
    reseal(run / "checkpoint")
    load_run(run)


def test_weights_are_told_by_their_hash_and_not_by_times(finished, run, tmp_path):
    assert load_run(run).step == 8
    assert load_run(run).weights_hash == weights_hash(run) == weights_hash(finished)
    assert main(["--resume", str(run), "--steps", "9"]) == 0
    assert load_run(run).step == 9
    assert weights_hash(run) not in (None, weights_hash(finished))
    assert weights_hash(tmp_path) is None
    (run / "checkpoint" / "checkpoint.json").write_text("[]")
    assert weights_hash(run) is None


def test_a_run_without_a_checkpoint(run):
    shutil.rmtree(run / "checkpoint")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_run(run)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match=r"must be a directory that training wrote\. .*nowhere is none"):
        load_run(tmp_path / "nowhere")
