"""All commands: `python -m tvm_ref` names them, and none loads what it does not need."""

import pytest

from tests.processes import ROOT, python
from tvm_ref.__main__ import main


@pytest.mark.parametrize("command", ["tvm_ref.toy", "tvm_ref.bound", "tvm_ref.experiments.compare", "imagenet.train"])
def test_every_command_is_listed_with_what_it_does(command, capsys):
    main()
    (line,) = (a for a in capsys.readouterr().out.splitlines() if a.startswith(f"python -m {command} "))
    assert len(line.split(maxsplit=3)[3]) > 20


SLOW = (
    "ot", "pytorch_optimizer", "matplotlib", "scipy", "sklearn", "psutil", "triton", "sympy", "torch._dynamo",
    "torch.distributed.tensor", "torchvision", "timm", "diffusers", "torch_fidelity",
)  # fmt: skip
IMAGES = ("train", "sample", "evaluate", "encode", "convert", "average", "benchmark", "digit_seeds", "norms",
          "cost.table", "experiments.random_guidance", "experiments.differences", "experiments.fashion",
          "experiments.oracle", "experiments.memory")  # fmt: skip
COMMANDS = {
    "tvm_ref.toy": ["--lr", "-1"],
    "tvm_ref.bound": ["nowhere"],
    "tvm_ref.experiments.layers": ["--colour"],
    "tvm_ref.experiments.compare": ["--steps", "0"],
    "tvm_ref.experiments.seeds": ["--points", "1"],
    "tvm_ref.experiments.family": ["--samples", "1"],
    "tvm_ref.experiments.causes": ["--colour"],
    "tvm_ref.experiments.relatives": ["--colour"],
    "tvm_ref.experiments.bound_over_training": ["--grid", "7"],
    "tutorials.playground.page": ["nowhere"],
    **{f"imagenet.{name}": ["--colour"] for name in IMAGES},
}


@pytest.mark.slow
def test_help_and_bad_options_answer_without_slow_imports():
    """Together they took three of five seconds. One command after the other, so that the first culprit shows."""
    code = f"""
import runpy, sys
for name, options in {COMMANDS}.items():
    for sys.argv in (["command", "--help"], ["command", *options]):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            assert stop.code == (0 if "--help" in sys.argv else 2), (name, stop.code)
        needless = {SLOW} if name.startswith("imagenet") else {(*SLOW, "PIL")}
        loaded = {{*needless}} & {{*sys.modules}}
        assert not loaded, (name, sys.argv, loaded)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(COMMANDS)
    folders = [ROOT / name for name in ("tvm_ref", "imagenet", "tutorials/playground")]
    sources = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    assert sum('__name__ == "__main__"' in source for source in sources) == len(COMMANDS) + 1  # the list of them
