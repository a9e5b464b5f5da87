import dataclasses
import errno
import traceback
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from tests.commands import one_line
from tests.processes import python
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.options import (
    OneLineParser,
    add_options,
    check_types,
    given,
    option,
    read_settings,
    require_at_least,
    run,
)

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


def test_types_and_choices_come_from_annotations():
    words = "--steps 5 --rate 2 --name x --share 0.25 --kind b --size large --loud --no-norm"
    arguments = parser().parse_args(words.split(" "))
    settings = Settings(**given(arguments, Settings))
    assert settings == Settings(5, 2.0, "x", 0.25, "b", "large", True, False)
    assert isinstance(settings.rate, float)
    assert arguments.count == 7


@dataclasses.dataclass(frozen=True)
class Words:
    words: Mapping[str, Any] = option({}, "words")


def method(
    model, *, power: float = 1.0, steps: int = 3, stops: str = "all", learned: bool = False, c: float | None = 1
):
    """Take keyword-only arguments, as an objective does."""


def test_named_values_are_read_by_the_annotations_of_a_function(capsys):
    p = OneLineParser("program")
    add_options(p, Words)
    arguments = p.parse_args(["--words", "power=0.5", "steps=4", "stops=none", "learned=true", "c=none"])
    words = Words(**given(arguments, Words))
    assert hash(words) == hash(Words())  # the dict is compared and not hashed
    assert words != Words()
    expected = {"power": 0.5, "steps": 4, "stops": "none", "learned": True, "c": None}
    assert read_settings("--words", method, words.words) == expected
    assert read_settings("--words", method, expected) == expected
    for bad, message in (
        ({"model": 1}, "--words has no 'model'; it has power, steps, stops, learned, c"),
        ({"power": "x"}, "--words power must be a number, got 'x'"),
        ({"steps": "1.5"}, "--words steps must be a whole number, got '1.5'"),
        ({"learned": "yes"}, "--words learned must be true or false, got 'yes'"),
        ({"stops": None}, "--words stops must be text, got None"),
    ):
        with pytest.raises(UserError, match=message):
            read_settings("--words", method, bad)
    assert "--words: must read NAME=VALUE ..., got 'power'" in one_line(capsys, p.parse_args, ["--words", "power"])


def test_options_that_are_not_given_stay_absent():
    assert given(parser().parse_args(["--steps", "5"]), Settings) == {"steps": 5}


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "1.5"], ["--rate", "x"], ["--kind", "c"], ["--size", "huge"], ["--no-loud"], ["--step", "1"]],
)
def test_what_the_annotation_does_not_allow_is_refused(arguments, capsys):
    assert one_line(capsys, parser().parse_args, arguments).startswith("program: error: ")


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


def test_least_values_name_their_option():
    require_at_least(1, batch_size=1)
    for bad in (0, float("nan")):
        with pytest.raises(ValueError, match="--batch-size must be at least 1"):
            require_at_least(1, batch_size=bad)


NO_FILE = FileNotFoundError(errno.ENOENT, "No such file or directory", "x.csv")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--rate must be positive\nand more"), 2, "error: --rate must be positive"),
        (NO_FILE, 2, "error: x.csv: No such file or directory"),
        (FloatingPointError("step 3: the loss is NaN"), 1, "error: step 3: the loss is NaN"),  # and no advice to go on
        (KeyboardInterrupt(), 130, "stopped; go on"),
    ],
    ids=["the user's", "a file that the user named", "diverged", "Ctrl-C"],
)
def test_what_is_no_bug_ends_with_one_line(error, status, line, capsys):
    def work():
        with parser().errors("go on"), user_files():
            raise error

    assert one_line(capsys, work, status=status) == f"program: {line}\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("a bug"),
        OSError(errno.ENOSPC, "No space left on device"),  # after hours it is no bad input
    ],
)
def test_every_other_error_keeps_its_traceback_and_the_hint_stands_after_it(error):
    with pytest.raises(type(error)) as raised, parser().errors("the same command goes on"):
        raise error
    assert raised.value is error
    lines = "".join(traceback.format_exception(error)).splitlines()
    assert "raise error" in "\n".join(lines)
    assert lines[-1] == "the same command goes on"


def test_a_network_that_is_edited_wrongly_shows_file_and_line(tmp_path):
    """Its RuntimeError once became one line, without either."""
    code = """
from tvm_ref.toy import __main__ as command, network
from tvm_ref.toy.network import ToyNetwork

def forward(self, x, t, s, condition):
    return self.layers_that_are_missing(x)

ToyNetwork.forward = forward
command.run(lambda: command.main(["--steps", "3", "--out", "run"]))
"""
    (tmp_path / "edited.py").write_text(code)
    done = python("edited.py", cwd=tmp_path)
    assert done.returncode == 1
    assert f'File "{tmp_path}/edited.py", line 6, in forward' in done.stderr
    assert "--resume" in done.stderr.splitlines()[-1]


def test_of_several_processes_the_first_one_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop, parser().errors():
        raise UserError("broken")
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        parser().error("bad")
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("result", "status"), [(0, 0), (1, 1), (KeyboardInterrupt(), 130), (SystemExit(2), 2)])
def test_run_exits_with_the_status(result, status, capsys):

    def main():
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == status
    assert capsys.readouterr().err == ("\nstopped\n" if status == 130 else "")
