"""Folders and files that commands write."""

import os
import runpy
import subprocess
import sys

import pytest

from tvm_ref.cli import files
from tvm_ref.cli.files import LOCK, hold, require_free, require_new, write_atomically


def test_a_system_without_locks_of_files_can_read_and_write(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert "write_atomically" in runpy.run_path(files.__file__)


def test_new_and_empty_folders_are_free(tmp_path):
    require_free(tmp_path, ("config.json",))
    require_free(tmp_path / "a" / "b", ("config.json",))
    assert not (tmp_path / "a").exists()


def test_a_run_is_given_up_only_when_asked(tmp_path):
    for name in ("config.json", "train.jsonl"):
        (tmp_path / name).write_text("")
    marks = ("config.json", "train.jsonl")
    with pytest.raises(ValueError, match="already holds a run: --resume, or another --out"):
        require_free(tmp_path, marks, ways="--resume")
    with pytest.raises(ValueError, match="already holds images: choose another --out"):
        require_free(tmp_path, marks, "images")
    require_free(tmp_path, marks, overwrite=True)


def test_other_things_are_never_given_up(tmp_path):
    (tmp_path / "config.json").write_text("of another program")
    with pytest.raises(ValueError, match="holds something that is not a run"):
        require_free(tmp_path, ("config.json", "train.jsonl"), overwrite=True)


@pytest.mark.parametrize("below", ["", "run", "runs/toy/moons"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        require_free(tmp_path / "file" / below, ("config.json",), overwrite=True)


@pytest.mark.parametrize("check", [lambda p: require_free(p, ("config.json",)), require_new])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, check):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode & os.W_OK))  # root may anywhere
    with pytest.raises(ValueError, match="cannot be written to"):
        check(tmp_path / "run")


def test_a_file_is_never_replaced_unasked(tmp_path):
    require_new(None)
    require_new(tmp_path / "new" / "a.json")
    (tmp_path / "a.json").write_text("")
    with pytest.raises(ValueError, match=r"a\.json exists already"):
        require_new(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is a file"):
        require_new(tmp_path / "a.json" / "b.json")


def test_files_are_written_whole_and_readable_by_others(tmp_path):
    for content in ("text\n", b"bytes"):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {p.name for p in tmp_path.iterdir()} == {"file", "plain"}


HOLD = """
import sys, pathlib
from tvm_ref.cli.files import hold
with hold(pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    input()
"""


def test_a_folder_is_held_by_one_process(tmp_path, capsys):
    """Two once resumed a run side by side, and each removed what the other wrote."""
    folder = tmp_path / "new" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match=rf"run is in use by process {other.pid} on {os.uname().nodename}"):
            hold(folder).__enter__()
        other.kill()
    with hold(folder):  # what a kill leaves is reported, and in nobody's way
        assert f"process {other.pid} on {os.uname().nodename} left" in capsys.readouterr().out
        assert str(os.getpid()) in (folder / LOCK).read_text()
        require_free(folder, ("config.json",))
    assert not (folder / LOCK).exists()


def test_a_folder_that_was_made_to_be_held_is_gone_if_nothing_is_in_it(tmp_path):
    with hold(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new").exists()
    with hold(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "config.json").write_text("")
    assert (tmp_path / "new" / "run" / "config.json").exists()
