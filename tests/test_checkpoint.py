import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from tiny_run import reseal
from torch import nn

from looped.checkpoint import KINDS, RECORD, file_name
from train.checkpoint import CheckpointError, Progress, load, save, step_of

FILES = [file_name(kind) for kind in KINDS]


def make(seed: int = 0, width: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after two steps of its optimiser."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(11, width), nn.Dropout(0.5), nn.Linear(width, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        take_step(model, optimizer)
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.arange(11)).square().sum()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_continues_bit_for_bit(tmp_path):
    model, optimizer = make()
    save(tmp_path, model, optimizer, Progress(2, "text"))
    expected = [take_step(model, optimizer) for _ in range(3)]
    other, other_optimizer = make(seed=1)
    assert load(tmp_path, other, other_optimizer) == Progress(2, "text")
    assert [take_step(other, other_optimizer) for _ in range(3)] == expected
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_what_is_written_in_the_background_is_a_copy(tmp_path, monkeypatch):
    """Weights, moments and generators go on before the first file is written."""
    model, optimizer = make()
    changed, write = threading.Event(), safetensors.torch.save_file

    def late(*arguments):
        assert changed.wait(30)
        write(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", late)
    saving = save(tmp_path, model, optimizer, Progress(2, "text"), in_background=True)
    expected = [take_step(model, optimizer) for _ in range(3)]
    assert not (tmp_path / "checkpoint").exists()
    changed.set()
    saving.wait()
    other, other_optimizer = make(seed=1)
    load(tmp_path, other, other_optimizer)
    assert [take_step(other, other_optimizer) for _ in range(3)] == expected


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    model, optimizer = make()
    save(tmp_path, model, optimizer, Progress(2, "text"))
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    load(tmp_path, model, optimizer)
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["checkpoint.json", *FILES]


class Killed(BaseException):
    pass


WRITING = ((os, "rename"), (os, "fsync"), (safetensors.torch, "save_file"), (Path, "write_text"))


def raise_at(call: int, error: BaseException, functions, monkeypatch, *, ever_after: bool = False) -> None:
    """Make the ``call``-th of all calls of the functions raise, before it does anything.

    ever_after: all that follow, too, as where the process has ended.
    """
    calls = iter(range(call + 1))

    def wrap(function):
        def wrapped(*args, **kwargs):
            if next(calls, call if ever_after else None) == call:
                raise error
            return function(*args, **kwargs)

        return wrapped

    for module, name in functions:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


def test_killed_at_any_moment_leaves_a_loadable_checkpoint(tmp_path, monkeypatch):
    survived: list[int] = []
    for call in range(100):
        run = tmp_path / str(call)
        run.mkdir()
        model, optimizer = make()
        save(run, model, optimizer, Progress(2, "text"))
        expected = {2: [value.clone() for value in model.parameters()]}
        take_step(model, optimizer)
        expected[3] = [value.clone() for value in model.parameters()]
        with monkeypatch.context() as context:
            changing = (*WRITING, (shutil, "rmtree"), (Path, "mkdir"))
            raise_at(call, Killed(), changing, context, ever_after=True)
            try:
                save(run, model, optimizer, Progress(3, "text"))
                finished = True
            except Killed:
                finished = False

        other, other_optimizer = make(seed=1)
        step = load(run, other, other_optimizer).step
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), expected[step], strict=True))
        survived.append(step)
        # Whatever was left behind, the next checkpoint is written and read.
        save(run, model, optimizer, Progress(4, "text"))
        assert load(run, other, other_optimizer).step == 4
        assert os.listdir(run) == ["checkpoint"]
        if finished:
            break
    assert finished
    assert len(survived) > 12  # every stage was reached
    assert survived == sorted(survived)
    assert set(survived) == {2, 3}


@pytest.mark.parametrize("name", [*FILES, "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_torn_checkpoints_are_recognised(tmp_path, name, damage):
    model, optimizer = make()
    save(tmp_path, model, optimizer, Progress(2, "text"))
    path = tmp_path / "checkpoint" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-1])
    before = [value.clone() for value in model.parameters()]
    take_step(model, optimizer)
    after = [value.clone() for value in model.parameters()]
    with pytest.raises(CheckpointError, match="is torn") as error:
        load(tmp_path, model, optimizer)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), after, strict=True))
    assert not torch.equal(before[0], after[0])


def test_no_flipped_bit_of_the_record_goes_unseen(tmp_path):
    """But for one in the name of its digest, which is all that it changes."""
    model, optimizer = make()
    save(tmp_path, model, optimizer, Progress(2, "text"))
    path = tmp_path / "checkpoint" / RECORD
    content = path.read_bytes()
    name = content.index(b'"digest"')
    for position in range(len(content)):
        if name < position < name + 7 or chr(content[position]).isspace():
            continue
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert step_of(tmp_path) is None, content[: position + 1]
    path.write_bytes(content)
    assert step_of(tmp_path) == 2
    record = json.loads(content)
    del record["digest"]  # as older ones are
    path.write_text(json.dumps(record))
    assert step_of(tmp_path) == 2


def test_missing_checkpoint(tmp_path):
    model, optimizer = make()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load(tmp_path, model, optimizer)


def test_another_shape_names_the_first_difference(tmp_path):
    model, optimizer = make()
    save(tmp_path, model, optimizer, Progress(2, "text"))
    with pytest.raises(CheckpointError, match=r"0.weight is \[11, 8\] in the checkpoint and \[11, 16\] in the model"):
        load(tmp_path, *make(width=16))
    with pytest.raises(CheckpointError, match=r"2.bias is \[3\] in the checkpoint and missing in the model"):
        load(tmp_path, model[:2], optimizer)
    with pytest.raises(CheckpointError, match=r"3.weight is missing in the checkpoint and \[2, 3\] in the model"):
        load(tmp_path, nn.Sequential(*model, nn.Linear(3, 2)), optimizer)


def damaged(checkpoint: Path, name: str, change) -> None:
    path = checkpoint / name
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    reseal(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "optimizer.safetensors",
            lambda tensors: tensors | {"2.weight.exp_avg": torch.zeros(3, 9)},
            r"optimizer's exp_avg of 2.weight is \[3, 9\] torch.float32 in the checkpoint and \[3, 8\] ",
        ),
        (
            "optimizer.safetensors",
            lambda tensors: tensors | {"7.bias.exp_avg_sq": torch.zeros(3)},
            "the optimizer has 7.bias.exp_avg_sq, and the model no 7.bias",
        ),
        (
            "optimizer.safetensors",
            lambda tensors: {name: tensors[name] for name in tensors if name != "2.weight.step"},
            "must hold exp_avg, exp_avg_sq, step of AdamW for 2.weight. Got exp_avg without step",
        ),
        ("rng.safetensors", lambda tensors: {}, "CPU's random generator. It has none"),
        ("rng.safetensors", lambda tensors: {"cpu": torch.zeros(5, dtype=torch.uint8)}, r"cpu is \[5\] torch.uint8"),
        ("rng.safetensors", lambda tensors: {"cpu": tensors["cpu"].float()}, "torch.float32 in the checkpoint"),
    ],
)
def test_nothing_changes_unless_everything_fits(tmp_path, name, change, message):
    """Weights, moments and generators are looked at before any of them is restored."""
    model, optimizer = make()
    save(tmp_path, model, optimizer, Progress(2, "text"))
    damaged(tmp_path / "checkpoint", name, change)
    other, other_optimizer = make(seed=1)
    moments = [value for state in other_optimizer.state.values() for value in state.values()]
    before = [value.detach().clone() for value in (*other.parameters(), *moments)]
    generator = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, other, other_optimizer)
    moments = [value for state in other_optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, (*other.parameters(), *moments), strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_what_cannot_be_written_leaves_the_checkpoint_before_and_nothing_else(tmp_path, monkeypatch, error):
    model, optimizer = make()
    save(tmp_path, model, optimizer, Progress(2, "text"))
    take_step(model, optimizer)
    steps = []
    for call in range(100):
        with monkeypatch.context() as context:
            raise_at(call, error, WRITING, context)
            try:
                save(tmp_path, model, optimizer, Progress(3 + call, "text"))
                said, finished = "", True
            except CheckpointError as failure:
                said, finished = str(failure), False
        assert finished or "checkpoint.new could not be written" in said
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint", "checkpoint.old"}
        steps.append(load(tmp_path, *make(seed=1)).step)
        assert step_of(tmp_path) == steps[-1]
        if finished:
            break
    assert len(steps) > 9
    assert steps[:9] == [2] * 9
    assert steps[-1] == 3 + len(steps) - 1
