"""The README tells the truth: its equation table, its file tree, its options."""

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch

from tvm_ref.objectives import OBJECTIVES, PID
from tvm_ref.toy import __main__ as toy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "tutorials" / "site" / "own_network.md").read_text()
ROOM, TOY, FAMILY = ((ROOT / "tvm_ref" / room / "README.md").read_text() for room in ("", "toy", "objectives"))
PAGES = [p for p in ROOT.rglob("README.md") if not {".venv", "runs", "build"} & {*p.relative_to(ROOT).parts}]
PAGES += sorted((ROOT / "tutorials" / "site").glob("*.md"))


def equation_table() -> list[tuple[str, str]]:
    """(paper's place, dotted name) of every entry."""
    section = ROOM.split("## Equations and functions")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| ") and "`" in line]
    return [
        (place.strip(), name)
        for places, _, names in rows
        for place in places.split(",")
        for name in re.findall("`(.+?)`", names)
    ]


def test_the_equation_table_is_read():
    assert len(equation_table()) > 20


@pytest.mark.parametrize(("place", "name"), equation_table())
def test_every_function_of_the_equation_table_exists_and_cites_its_place(place, name):
    found = resolve_name(name)
    documentation, module = (inspect.getdoc(a) or "" for a in (found, inspect.getmodule(found)))
    kind, _, number = place.partition(" ")
    assert kind in ("eq.", "sec.", "fig.", "appendix", "algorithm"), place
    cited = rf"{re.escape(kind)}[^()]*?(?<![\d.]){re.escape(number)}(?!\d)"  # also "eq. 4 and 20", "eq. 12 and 15"
    assert re.search(cited, documentation) or re.search(cited, module), f"{name} does not cite {place}"


def test_every_toy_command_of_the_readme_parses():
    pages = "".join(page.read_text() for page in PAGES)
    commands = re.findall(r"python -m tvm_ref\.toy ([^#\n`]*)", pages)
    assert len(commands) >= 12
    for options in commands:
        if "--help" not in options:
            toy.parser().parse_args(options.split())


def test_the_quoted_lines_are_those_of_the_code():
    """The five lines that the README shows stand in TVM.forward, word for word."""
    from tvm_ref.objectives import TVM

    quoted = README.split("class `TVM`")[1].split("```python")[1].split("```")[0]
    source = {line.strip() for line in inspect.getsource(TVM.forward).splitlines()}
    assert all(line.strip() in source for line in quoted.strip().splitlines())


class Network(torch.nn.Module):
    """The smallest network that reads everything it is given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)
        self.classes = torch.nn.Embedding(11, 3)

    def forward(self, x, t, s, condition):
        if condition is not None:
            x = x + (self.classes(condition.label) * condition.beta[:, None])[:, :, None, None]
        return self.layer(x * (1 + t - s)[:, None, None, None])


def snippet(opening: str, page: str = README) -> str:
    """The first block of Python after some words of a page."""
    return page.split(opening)[1].split("```python")[1].split("```")[0]


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_training_loop_runs(classes, device):
    """The loops of the README and of the guide, as printed, on two batches of images and a network of one layer.

    Data lie on the CPU; that nothing else does shows with a network elsewhere.
    """
    network = Network().to(device)
    before = network.layer.weight.detach().clone()
    x0 = torch.randn(2, 4, 3, 8, 8)
    batches = zip(x0, torch.arange(8).view(2, 4), strict=True) if classes else x0
    scope = {"network": network, "batches": batches}
    exec(snippet("## Classes and guidance", GUIDE) if classes else snippet("## In your own training loop"), scope)
    assert scope["images"].shape == (64, 3, 32, 32)
    assert scope["images"].device.type == device
    assert device == "meta" or not torch.equal(network.layer.weight, before)


def test_a_run_is_loaded_and_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(snippet("Sample it;"), scope)
    assert scope["points"].shape == (1000, 2)
    assert scope["points"].isfinite().all()


@pytest.mark.slow
def test_own_points_are_sampled_in_their_units(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savetxt("points.csv", np.random.default_rng(0).normal([1e4, 0], 1, (50, 2)), delimiter=";")
    assert toy.main(["--data", "points.csv", "--steps", "3", "--width", "16", "--points", "20"]) == 0
    scope: dict[str, object] = {}
    exec(TOY.split("## Your own points")[1].split("```python")[1].split("```")[0], scope)
    assert scope["points"].shape == (1000, 2)
    assert abs(float(scope["points"][:, 0].median()) - 1e4) < 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name == "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_readme_is_short(page):
    text = page.read_text()
    assert len(text.split()) <= 900
    assert text.count("\n") <= 200


def test_the_table_of_the_family_names_every_objective_and_its_settings():
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in FAMILY.splitlines() if row.startswith("| `")]
    settings = {row[0]: row[2].split(", ") for row in rows}
    for key, kind in OBJECTIVES.items():
        known = [name for name in inspect.signature(kind).parameters if name not in ("flow_map", "null_label")]
        assert settings.pop(key) in (known or [""], ["as tvm"] * (kind is PID)), key
    assert list(settings) == ["--objective"]  # the head
