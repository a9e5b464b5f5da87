"""The notebooks run from top to bottom, their exercises' solutions too, and show a reader no error and no warning."""

import ast
import collections
import importlib
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tutorials import render

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SECONDS = 60  # on two idle cores; a slow or busy machine gets more before a cell is given up
FOLDED = re.compile(r"<details><summary>Solution</summary>\n\n(.*?)\n</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def solutions(notebook: NotebookNode) -> list[str]:
    return [text for cell in notebook.cells if cell.cell_type == "markdown" for text in FOLDED.findall(cell.source)]


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """The notebook with the code of every folded solution as a cell after it."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            blocks = [code for text in FOLDED.findall(cell.source) for code in CODE.findall(text)]
            cells += [nbformat.v4.new_code_cell(code, id=f"{cell.id}-solution-{i}") for i, code in enumerate(blocks)]
    notebook.cells = cells
    return notebook


def complaints(notebook: NotebookNode) -> list[str]:
    """List what a reader should not see: anything on stderr, results that are not a number, paths of some machine."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            if output.get("name") == "stderr" or re.search(r"Warning|Traceback|\bnan\b| at 0x|(?<![\w.])/\w+/\w", text):
                found.append(f"{cell.id}: {text}")
    return found


@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter client; the kernel has filters of its own
@pytest.mark.slow
def test_it_runs_and_a_reader_sees_no_warning(path):
    notebook = with_solutions(read(path))
    client = NotebookClient(notebook, timeout=10 * SECONDS, resources={"metadata": {"path": path.parent}})
    client.execute(env=os.environ | {"TVM_FAST": "1"})
    assert complaints(notebook) == []
    assert len(figures(notebook)) >= 2


def figures(notebook: NotebookNode) -> list[NotebookNode]:
    return [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


@each
def test_its_outputs_are_those_of_its_code(path):
    """If not: `python tutorials/render.py` and its number."""
    notebook = read(path)
    assert notebook.metadata.executed == render.digest(notebook)
    assert complaints(notebook) == []
    assert figures(notebook)
    assert path.stat().st_size <= 400_000  # GitHub shows no larger ones


@each
def test_it_is_stored_as_it_should_be(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= 30
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert 'FAST = bool(os.environ.get("TVM_FAST"))' in code[0].source


@each
def test_it_imports_what_exists(path):
    """Its solutions, too: nobody executes nine notebooks for each name that moves."""
    for cell in with_solutions(read(path)).cells:
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(source if cell.cell_type == "code" else "")):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@each
def test_it_asks_answers_and_sends_on(path):
    notebook = read(path)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert re.search(r"\*\*The question: .*?\?\*\*", first.source, re.DOTALL)
    assert len(solutions(notebook)) == 3
    assert all(CODE.findall(text) for text in solutions(notebook))
    assert last.source.startswith("## What we left out, and where to read it")
    assert "arxiv.org" in last.source
    prose = sum(len(cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose > sum(len(cell.source) for cell in notebook.cells if cell.cell_type == "code")


@each
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).is_file(), target
    for named in re.findall(r"`((?:tvm_ref|kernels|imagenet|tests|tutorials)/[\w./]+)`", text):
        assert (ROOT / named).exists(), named


def test_a_quoted_loop_is_that_of_the_code():
    """Each line that notebook 3 quotes stands in the toy's train_step, in this order."""
    (source,) = (c.source for c in read(NOTEBOOKS[2]).cells if c.id == "recipe")
    (quoted,) = CODE.findall(source)
    step = (ROOT / "tvm_ref/toy/training.py").read_text().split("def train_step")[1].split("\n    def ")[0]
    places = [step.find(line) for line in quoted.splitlines()]
    assert -1 not in places
    assert places == sorted(places)


def test_notebook_7_says_what_was_measured():
    """Its section on rates at which something breaks, against the curves of `python imagenet/norms.py`."""
    runs = json.loads((ROOT / "tutorials/pictures/norms.json").read_text())["runs"]
    usual = [run for run in runs if run["variant"] != "semi-lipschitz"]
    assert max(max(run["flow_matching"]) for run in usual if run["case"] == "64:0.02") < 5
    broken = [max(run["flow_matching"]) for run in usual if run["case"] != "64:0.02"]
    assert (round(min(broken)), round(max(broken), -6)) == (13, 2e7)
    assert 1e16 < max(max(run["gradient_norm"]) for run in usual) < 1e17
    for width, most in (("64", 10), ("128", 27)):
        ours = [run for run in runs if run["variant"] == "semi-lipschitz" and run["case"].startswith(width)]
        assert max(max(run["flow_matching"]) for run in ours) < most
    ends = collections.defaultdict(list)
    for run in runs:
        ends[run["case"], run["seed"]].append((run["embedding"][-1], run["variant"]))
    assert (sum(max(end)[1] == "semi-lipschitz" for end in ends.values()), len(ends)) == (14, 18)


def test_commands_are_understood():
    """Every command on imagenet/ that its README shows, where notebook 9 sends its readers, has options that exist."""
    text = (ROOT / "imagenet" / "README.md").read_text()
    commands = re.findall(r"^(?:python|torchrun)[^#\n]*? imagenet/(\w+)\.py ([^#\n]*)", text, re.MULTILINE)
    assert len(commands) >= 6
    for module, options in commands:
        importlib.import_module(f"imagenet.{module}").parser().parse_args(options.split())
