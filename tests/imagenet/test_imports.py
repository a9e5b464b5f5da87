import importlib
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "sample", "convert", "digits", "encode", "evaluate", "benchmark")
OPTIONAL = ("torchvision", "timm", "diffusers", "torch_fidelity", "sklearn", "jvp_attention")


def test_commands_start_without_what_only_some_need():
    """Libraries that are optional are loaded where they are used; one by one, so that the first culprit shows."""
    check = f"loaded = {{*sys.modules}} & {{*{OPTIONAL}}}; assert not loaded, loaded"
    code = "\n".join(["import sys", *(f"import {command}; {check}" for command in COMMANDS)])
    env = {"PYTHONPATH": f"{ROOT / 'imagenet'}:{ROOT}", "PATH": "", "HOME": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["sample", "convert", "encode", "evaluate", "benchmark"])
def test_help_teaches(command):
    """It begins with commands to copy, and says what every option means."""
    parser = importlib.import_module(command).parser()
    assert parser.format_help().count(f"imagenet/{command}.py ") >= 2
    assert all(action.help for action in parser._actions)


def test_no_module_hides_another():
    """torchrun puts imagenet/ first on sys.path: a file named like a library would take its place."""
    ours = {path.stem for path in (ROOT / "imagenet").glob("*.py")}
    others = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "imagenet", ROOT / "tests")]
    for name in ours:
        assert name not in sys.stdlib_module_names
        assert PathFinder.find_spec(name, others) is None, name
