import importlib
import re
import shlex
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest

from imagenet import evaluate
from imagenet.data.image_files import write_npz
from tests.commands import one_line
from tests.processes import ROOT

PAGES = [ROOT / "imagenet" / "README.md", *(ROOT / "tutorials" / "site").glob("imagenet_*.md")]
COMMANDS = ("train", "sample", "evaluate", "encode", "convert", "benchmark", "digit_seeds", "norms")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "train"])
def test_help_teaches(command):
    """It begins with commands to copy, and says what every option means."""
    parser = importlib.import_module(f"imagenet.{command}").parser()
    assert parser.format_help().count(f"imagenet/{command}.py ") >= 2
    assert all(action.help for action in parser._actions)


def test_no_module_hides_another():
    """torchrun puts imagenet/ first on sys.path: a file named like a library would take its place."""
    ours = {path.stem for path in (ROOT / "imagenet").glob("*.py")}
    others = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "imagenet", ROOT / "tests")]
    for name in ours:
        assert name not in sys.stdlib_module_names
        assert PathFinder.find_spec(name, others) is None, name


def test_a_library_that_is_not_there_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    write_npz(tmp_path / "a.npz", 10, [np.zeros((10, 4, 4, 3), np.uint8)], np.arange(10))
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2), sigma=np.eye(2))
    arguments = [tmp_path / "a.npz", "--reference", tmp_path / "reference.npz", "--device", "cpu"]
    assert "FID needs torch-fidelity" in one_line(capsys, evaluate.main, list(map(str, arguments)))


def commands_to_copy() -> list[str]:
    """Return the commands of the README, its pages and each script, without comments."""
    texts = [
        *(path.read_text() for path in PAGES),
        *(importlib.import_module(f"imagenet.{c}").__doc__ for c in COMMANDS),
    ]
    found = re.findall(r"imagenet/(\w+\.py(?: [^\n#`']+)?)", "\n".join(texts).replace("\\\n", ""))
    return sorted({re.split(r"\s{2,}", command)[0].strip() for command in found})


@pytest.mark.parametrize("command", commands_to_copy())
def test_commands_to_copy_parse(command):
    name, *options = shlex.split(command)
    module = importlib.import_module(f"imagenet.{name.removesuffix('.py')}")
    if "--help" not in options and hasattr(module, "parser"):
        module.parser().parse_args(options)


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().split()) <= 900
