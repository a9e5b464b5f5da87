"""Pickles that ask for more than their size tells are refused, by one line, before they cost anything."""

import json
import subprocess
import sys

import pytest

from imagenet.convert import main
from imagenet.foreign.pickle_scan import shown
from imagenet.foreign.pickled_arrays import read_arrays
from imagenet.foreign.pickled_tensors import read_module, tensors_of
from tests.imagenet.foreign.hostile_pickles import ESCAPE, HOSTILE, HOSTILE_ARRAYS, HOSTILE_MODULES, write

pytestmark = pytest.mark.bad_shapes  # a check of types may look at all that a pickle asks for


def tensors(path):
    return tensors_of(read_module(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile")
    write(path)
    return path


@pytest.mark.parametrize(
    ("read", "kind", "title", "said"),
    [
        *((tensors, "any", title, said) for title, (_, said) in HOSTILE.items()),
        *((read_arrays, "any", title, said) for title, (_, said) in HOSTILE.items()),
        *((tensors, "modules", title, said) for title, (_, said) in HOSTILE_MODULES.items()),
        *((read_arrays, "arrays", title, said) for title, (_, said) in HOSTILE_ARRAYS.items()),
    ],
)
@pytest.mark.slow
def test_what_it_asks_for_is_said_in_one_printable_line(folder, read, kind, title, said):
    path = folder / kind / f"{title}.pkl"
    if said is None:
        read(path)
        return
    with pytest.raises(ValueError, match=r"refused|no sound pickle|text|module|deep") as error:
        read(path)
    message = str(error.value)
    assert said in message
    assert message.isprintable()
    assert len(message) < 300 + len(str(path))


@pytest.mark.slow
def test_none_takes_a_second_or_200_megabytes(folder):
    """In a process of its own, whose memory at its largest is compared with that before the first."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.imagenet.foreign.hostile_pickles", folder],
        check=True,
        capture_output=True,
        text=True,
    )
    costs, grown = json.loads(done.stdout)
    assert grown < 200e6
    assert {title: cost for title, cost in costs.items() if cost >= 1} == {}
    assert len(costs) == len(HOSTILE | HOSTILE_MODULES | HOSTILE_ARRAYS)


@pytest.mark.parametrize("title", HOSTILE_MODULES)
@pytest.mark.slow
def test_converting_says_it_in_one_line_too(folder, tmp_path, capsys, title):
    out = tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as stop:
        main([str(folder / "modules" / f"{title}.pkl"), str(out), "--preset", "digits"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert HOSTILE_MODULES[title][1] in err
    assert not out.exists()


def test_names_are_printed_short_and_escaped():
    assert shown("torch.nn") == "torch.nn"
    assert shown(ESCAPE) == r"\x1b]0;owned\x07\x1b[2J\u202e"
    assert shown("a" * 1000) == "a" * 80 + "..."
