"""The recipes are scripts whose commands parse, for the machines that they name."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from imagenet import train
from imagenet.config import PRESETS, Config
from tvm_ref.cli.options import given

RECIPES = sorted((Path(train.__file__).parent / "recipes").glob("*.sh"))
COMMAND = re.compile(r"torchrun (?P<launch>(?:--\S+ \S+ )*)imagenet/train\.py ?(?P<options>[^\n]*)")


def test_recipes_are_found():
    machines = {path.stem.rpartition("_")[2] for path in RECIPES}
    assert {"8x80gb", "8x40gb", "1x24gb", "32x80gb"} <= machines


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_on_its_machine(recipe):
    text = re.sub(r"\\\n\s*", "", recipe.read_text())
    assert subprocess.run(["bash", "-n", recipe], timeout=60).returncode == 0
    assert text.splitlines()[1].startswith("# ")  # says for which machine it is
    commands = list(COMMAND.finditer(text))
    assert commands
    for command in commands:
        launch = dict(re.findall(r"--(\S+) (\S+)", command["launch"]))
        processes = int(launch.get("nnodes", 1)) * int(launch.get("nproc-per-node", 1))
        if machine := re.search(r"_(\d+)x(\d+)gb$", recipe.stem):
            assert processes == int(machine[1])
            assert f"# {machine[1]} x {machine[2]} GB" in text
        options = command["options"].replace('"$@"', "").replace('"', "").split()
        arguments = train.parser().parse_args(options)
        config = replace(PRESETS[arguments.preset or train.DEFAULT], **given(arguments, Config))
        assert config.batch_size % (processes * config.accumulate) == 0
