"""The README tells the truth: its equation table, its file tree, its options."""

import importlib
import inspect
import re
from functools import reduce
from pathlib import Path

import pytest
import torch

from tvm_ref.toy import __main__ as toy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def equation_table() -> list[tuple[str, str]]:
    """(paper's place, dotted name) of every entry."""
    section = README.split("## Equations and functions")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| ") and "`" in line]
    return [
        (place.strip(), name)
        for places, _, names in rows
        for place in places.split(",")
        for name in re.findall("`(.+?)`", names)
    ]


def resolve(name: str):
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[i:], module)
    raise AssertionError(f"{name} does not exist")


def test_the_equation_table_is_read():
    assert len(equation_table()) > 20


@pytest.mark.parametrize(("place", "name"), equation_table())
def test_every_function_of_the_equation_table_exists_and_cites_its_place(place, name):
    documentation = inspect.getdoc(resolve(name)) or ""
    module = inspect.getdoc(inspect.getmodule(resolve(name))) or ""
    kind, _, number = place.partition(" ")
    assert kind in ("eq.", "sec.", "fig.", "appendix", "algorithm"), place
    cited = rf"{re.escape(kind)}[^()]*?(?<![\d.]){re.escape(number)}(?!\d)"  # also "eq. 4 and 20", "eq. 12 and 15"
    assert re.search(cited, documentation) or re.search(cited, module), f"{name} does not cite {place}"


def test_the_file_tree_is_complete():
    section = README.split("## Files")[1].split("```")[1]
    listed, stack = set(), []
    for line in section.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4
        stack = [*stack[:depth], name.rstrip("/")]
        path = ROOT.joinpath(*stack)
        assert path.exists(), f"{path.relative_to(ROOT)} is listed and does not exist"
        listed.add(path)
    modules = {p for p in (ROOT / "tvm_ref").rglob("*.py") if p.name != "__init__.py"}
    assert modules <= listed, f"not listed: {sorted(str(p.relative_to(ROOT)) for p in modules - listed)}"


def test_every_toy_command_of_the_readme_parses():
    commands = re.findall(r"python -m tvm_ref\.toy ([^#\n`]*)", README)
    assert len(commands) >= 6
    for options in commands:
        if "--help" not in options:
            toy.parser().parse_args(options.split())


def test_the_quoted_lines_are_those_of_the_code():
    """The five lines that the README shows stand in TVM.forward, word for word."""
    from tvm_ref.objectives import TVM

    quoted = README.split("class `TVM`:")[1].split("```python")[1].split("```")[0]
    source = {line.strip() for line in inspect.getsource(TVM.forward).splitlines()}
    assert all(line.strip() in source for line in quoted.strip().splitlines())


def test_the_training_loop_runs():
    """The README's own loop, on two batches of random images and a network of one layer."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x, t, s, condition):
            return self.layer(x * (1 + t - s)[:, None, None, None])

    network = Network()
    before = network.layer.weight.detach().clone()
    scope = {"network": network, "batches": torch.randn(2, 4, 3, 8, 8)}
    loop = README.split("In your own training loop:")[1].split("```python")[1].split("```")[0]
    exec(loop, scope)
    assert scope["images"].shape == (64, 3, 32, 32)
    assert not torch.equal(network.layer.weight, before)


def test_pictures_exist():
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", README):
        assert (ROOT / picture).is_file()
