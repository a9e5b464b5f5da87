import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tvm_ref.cli.command_line import (
    OneLineParser,
    add_options,
    check_types,
    first_line,
    given,
    option,
    require_at_least,
    require_free,
    require_new,
    run,
    write_atomically,
)

ROOT = Path(__file__).parents[2]
KINDS = {"a": 1, "b": 2}  # a registry


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = option(3, "steps")
    rate: float = option(0.5, "rate, of 100 %")
    name: str | None = option(None, "name (default: none)")
    share: float | None = option(None, "share")
    kind: str = option("a", "kind", choices=tuple(KINDS))
    size: Literal["small", "large"] = option("small", "size")
    loud: bool = option(False, "loud")
    norm: bool = option(True, "norm")


def parser(**keywords):
    p = OneLineParser("program", "First line.\n  indented", **keywords)
    add_options(p, Settings)
    p.add_argument("--count", type=int, default=7, help="count")
    p.add_argument("--rates", type=float, nargs="+", default=[0.1, 2], help="rates")
    p.add_argument("--quiet", action="store_true", help="quiet")
    p.add_argument("place", nargs="?", default="here", help="the default is here")
    return p


def ending(capsys):
    """The line on stderr with which the last SystemExit came."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.strip()


# Options ------------------------------------------------------------------------------------------------------------


def test_types_and_choices_come_from_annotations():
    words = "--steps 5 --rate 2 --name x --share 0.25 --kind b --size large --loud --no-norm"
    arguments = parser().parse_args(words.split(" "))
    settings = Settings(**given(arguments, Settings))
    assert settings == Settings(5, 2.0, "x", 0.25, "b", "large", True, False)
    assert isinstance(settings.rate, float)
    assert arguments.count == 7


def test_options_that_are_not_given_stay_absent():
    assert given(parser().parse_args(["--steps", "5"]), Settings) == {"steps": 5}


def test_only_some_fields_become_options():
    p = OneLineParser("program")
    add_options(p.add_argument_group("of a group"), Settings, ["rate"])
    assert vars(p.parse_args([])) == {}
    assert vars(p.parse_args(["--rate", "3"])) == {"rate": 3.0}


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "1.5"], ["--rate", "x"], ["--kind", "c"], ["--size", "huge"], ["--no-loud"], ["--step", "1"]],
)
def test_what_the_annotation_does_not_allow_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    assert stop.value.code == 2
    assert ending(capsys).startswith("program: error: ")


def test_help_states_every_default_once_and_keeps_lines():
    text = parser().format_help()
    flat = " ".join(text.split())
    assert "First line.\n  indented" in text
    for part in (
        "steps (default: 3)", "rate, of 100 % (default: 0.5)", "kind (default: a)", "size (default: small)",
        "norm (default: yes)", "count (default: 7)", "rates (default: 0.1 2)", "name (default: none)",
        "the default is here", "{small,large}",
    ):  # fmt: skip
        assert part in flat
    assert flat.count("(default") == 8
    assert "quiet (" not in flat
    assert "loud (" not in flat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1.0}, "--steps must be a whole number"),
        ({"steps": True}, "--steps must be a whole number"),
        ({"rate": "fast"}, "--rate must be a number"),
        ({"rate": None}, "--rate must be a number"),
        ({"loud": 1}, "--loud must be true or false"),
        ({"kind": "c"}, "--kind must be one of a, b"),
        ({"size": "huge"}, "--size must be one of small, large"),
        ({"name": 3}, "--name must be text"),
    ],
)
def test_values_from_a_file_are_held_to_the_annotations(changes, message):
    with pytest.raises(ValueError, match=message):
        check_types(Settings(**changes))


def test_what_fits_the_annotations_passes():
    check_types(Settings())
    check_types(Settings(rate=1, share=0.5, name="x"))


def test_least_values_name_their_option():
    require_at_least(1, batch_size=1)
    for bad in (0, float("nan")):
        with pytest.raises(ValueError, match="--batch-size must be at least 1"):
            require_at_least(1, batch_size=bad)


# Errors -------------------------------------------------------------------------------------------------------------

MISSING = FileNotFoundError(errno.ENOENT, "No such file or directory", "x.csv")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad\nand more"), "bad"),
        (ValueError("--rate must be positive"), "--rate must be positive"),
        (MISSING, "x.csv: No such file or directory"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("out of memory\n  at frame"), "out of memory"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(error, line, capsys):
    with pytest.raises(SystemExit) as stop, parser().bad_input():
        raise error
    assert stop.value.code == 2
    assert ending(capsys) == f"program: error: {line}" + " (--help lists all options)" * ("--" in line)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (FloatingPointError("step 3: NaN"), 1, "error: step 3: NaN"),  # it would recur
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device; go on"),
        (RuntimeError("broken\n  at frame"), 1, "error: broken; go on"),
        (KeyboardInterrupt(), 130, "stopped; go on"),
    ],
)
def test_failures_end_with_one_line_and_their_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as stop, parser().failures("go on"):
        raise error
    assert stop.value.code == status
    assert ending(capsys) == f"program: {line}"


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ValueError, match="a bug"), parser().failures():
        raise ValueError("a bug")
    with pytest.raises(TypeError), parser().bad_input():
        raise TypeError


def test_of_several_processes_the_first_one_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop, parser().failures():
        raise OSError("broken")
    assert stop.value.code == 1
    with pytest.raises(SystemExit) as stop:
        parser().error("bad")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


def test_first_line_of_an_error_without_words():
    assert first_line(RuntimeError()) == "RuntimeError"


# Ctrl-C -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("result", "status"), [(0, 0), (1, 1), (KeyboardInterrupt(), 130), (SystemExit(2), 2)])
def test_run_exits_with_the_status(result, status, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def main():
        if isinstance(result, BaseException):
            raise result
        return result

    try:
        with pytest.raises(SystemExit) as stop:
            run(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == status
    assert capsys.readouterr().err == ("\nstopped\n" if status == 130 else "")


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals; run it on Linux or macOS")
@pytest.mark.parametrize(
    ("command", "imported"),
    [
        ("-m tvm_ref.toy", "tvm_ref.cli.stopping"),
        ("-m tvm_ref.toy", "torch._C"),
        ("-m tvm_ref.toy", "tvm_ref.objectives"),
        ("-m imagenet.train", "torch._C"),
        ("imagenet/sample.py", "torch._C"),  # so torchrun starts it
        ("imagenet/train.py", "imagenet.model.dit"),
        ("-m jvp_attention.bench", "torch._C"),
    ],
)
@pytest.mark.slow
def test_ctrl_c_while_a_command_starts_shows_no_traceback(command, imported):
    """-X importtime writes a line per import, so the signal comes before, amid and after PyTorch's."""
    line = [sys.executable, "-X", "importtime", *command.split(), "--help"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(line, **pipes) as process:
        for line in process.stderr:
            if line.rstrip().endswith(imported):
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.endswith("\nstopped\n")


@pytest.mark.slow
def test_a_program_that_uses_the_library_keeps_its_own_ctrl_c():
    own = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"import signal; {own}; import tvm_ref; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals; run it on Linux or macOS")
@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once():
    """The first is noted; the second one comes in a step that would take a minute."""
    code = """
import time
from tvm_ref.cli.command_line import OneLineParser, run
from tvm_ref.cli.stopping import Interruption

def main():
    with OneLineParser("program").failures("go on"), Interruption() as interruption:
        print("training", flush=True)
        while not interruption.requested:
            time.sleep(0.01)
        print("noted", flush=True)
        time.sleep(60)
    return 0

run(main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for expected in ("training\n", "noted\n"):
            assert process.stdout.readline() == expected
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "program: stopped; go on\n"
    assert out == ""


# Files --------------------------------------------------------------------------------------------------------------


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
