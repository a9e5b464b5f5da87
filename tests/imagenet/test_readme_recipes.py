"""The README's commands for GPUs fit the machines that they are said to be for."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from imagenet import train
from imagenet.config import PRESETS, Config
from imagenet.cost.memory import fits
from tvm_ref.cli.options import given

README = Path(train.__file__).with_name("README.md").read_text()


def recipes() -> list[tuple[str, int, int]]:
    """Of each command for GPUs: its preset's options, processes, and the machine: cards and their GB."""
    section = README.split("## Commands")[1].split("\n## ")[0].replace("\\\n", " ")
    found = []
    for line in section.splitlines():
        command = re.search(r"train\.py ((?:cifar10|imagenet\S+|synthetic)[^#']*)", line)
        if command:
            machine = re.search(r"#.*?(\d+) x (\d+) GB", line)
            assert machine, f"no machine is named: {line}"
            nodes = int((re.search(r"--n(?:nodes|odes) (\d+)", line) or [0, 1])[1])
            processes = nodes * int((re.search(r"--nproc-per-node (\d+)", line) or [0, 1])[1])
            assert processes == int(machine[1]), line
            found.append((command[1], processes, int(machine[2])))
    return found


def test_recipes_are_found():
    machines = {(cards, size) for _, cards, size in recipes()}
    assert {(8, 80), (8, 40), (1, 24), (32, 80)} <= machines


@pytest.mark.parametrize(("options", "processes", "size"), recipes())
def test_a_recipe_fits_its_machine(options, processes, size):
    arguments = train.parser().parse_args(options.split())
    config = replace(PRESETS[arguments.preset], **given(arguments, Config))
    assert fits(config, size * 1e9, processes)
    assert config.batch_size % (processes * config.accumulate) == 0
