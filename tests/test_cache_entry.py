"""Entries whose list of digests is damaged, and processes that want one at the same moment."""

import os
import shutil
from pathlib import Path

import pytest
from hostile import bounded

from looped.whole_file import digest_of
from train.text import cache_entry
from train.text.cache_entry import is_whole, make_entry


def fill(directory: Path) -> dict[str, str]:
    (directory / "tokens").write_bytes(b"1234")
    return {"tokens": digest_of(directory / "tokens")}


def fail(directory: Path) -> dict[str, str]:
    (directory / "half").touch()
    raise ValueError("no")


@pytest.fixture
def entry(tmp_path) -> Path:
    make_entry(tmp_path / "cache" / "entry", fill)
    return tmp_path / "cache" / "entry"


@pytest.mark.parametrize("content", [b"[1]", b"5", b"null", b"[" * 100_000, b'[["x", "y"]]', b"\xff", b"{}"])
def test_digests_that_are_none(entry, content, capsys):
    (entry / "digests.json").write_bytes(content)
    make_entry(entry, fill)
    assert capsys.readouterr().err == f"the cached tokens in {entry} are damaged; the text is encoded again\n"
    assert is_whole(entry)


@pytest.mark.parametrize("name", ["digests.json", "tokens"])
def test_a_pipe_is_no_file_of_an_entry(entry, name):
    (entry / name).unlink()
    os.mkfifo(entry / name)
    with bounded(5):
        make_entry(entry, fill)
    assert (entry / "tokens").read_bytes() == b"1234"


@pytest.mark.parametrize("moment", ["has removed its files", "has let go"])
def test_who_fails_leaves_the_next_process_its_directory(tmp_path, monkeypatch, moment):
    """Another may begin to fill the entry at once."""
    place = tmp_path / "unfinished-entry"
    hold, rmtree, close, held = cache_entry.hold, shutil.rmtree, os.close, []

    def removing(*arguments: object, **options: object) -> None:
        rmtree(*arguments, **options)
        if moment == "has removed its files":
            place.mkdir(exist_ok=True)

    def closing(handle: int) -> None:
        close(handle)
        if moment == "has let go" and handle in held:
            held.clear()
            place.mkdir(exist_ok=True)
            (place / "theirs").touch()

    monkeypatch.setattr(cache_entry, "hold", lambda path: held.append(hold(path)) or held[-1])
    monkeypatch.setattr(shutil, "rmtree", removing)
    monkeypatch.setattr(os, "close", closing)
    with pytest.raises(ValueError, match=r"^no$"):
        make_entry(tmp_path / "entry", fail)
    monkeypatch.undo()
    assert [path.name for path in place.iterdir()] == (["theirs"] if moment == "has let go" else [])


def test_nothing_is_said_to_be_kept_that_is_not(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=r"^cache .*cache cannot be written \(Not a directory\)\.$"):
        make_entry(tmp_path / "cache" / "entry", fill)
