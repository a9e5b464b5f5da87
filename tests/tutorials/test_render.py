"""tutorials/render.py: pages with outputs, a picture of the tagged cell, an index; errors in one line."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from matplotlib.image import imread

TUTORIALS = Path(__file__).parents[2] / "tutorials"
FIGURE = "import matplotlib.pyplot as plt\nplt.figure(figsize=(20, 4))\nplt.plot([1, 2])\nplt.show()"


@pytest.fixture
def render(tmp_path, monkeypatch):
    """The module, at work on a folder with two notebooks."""
    specification = importlib.util.spec_from_file_location("render", TUTORIALS / "render.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("01_one", "02_two"):
        drawing = nbformat.v4.new_code_cell(FIGURE, metadata={"tags": ["gallery"]})
        cells = [nbformat.v4.new_markdown_cell("[next](02_two.ipynb)"), nbformat.v4.new_code_cell("6 * 7"), drawing]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter client
def test_pages_hold_results_and_figures_and_lead_to_each_other(render, tmp_path, monkeypatch):
    """Also where the environment asks matplotlib for another backend; pages had no figures there."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    out = tmp_path / "pages"
    assert render.main([str(out), "--pictures"]) == 0
    page = (out / "01_one.html").read_text()
    assert "42" in page
    assert "data:image/png" in page
    assert 'href="02_two.html"' in page
    assert 'href="02_two.html"' in (out / "index.html").read_text()
    assert imread(tmp_path / "pictures" / "01_one.png").shape[1] == render.WIDTH


def test_only_the_notebooks_asked_for_are_rendered(render, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(render, "execute", lambda path: done.append(path.name) or nbformat.read(path, 4))
    assert render.main([str(tmp_path / "pages"), "--only", "02"]) == 0
    assert done == ["02_two.ipynb"]
    assert not (tmp_path / "pictures" / "02_two.png").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_notebook_that_fails_is_named(render, tmp_path, capsys):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "01_one.ipynb")
    assert render.main([str(tmp_path / "pages"), "--only", "01"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("01_one.ipynb failed")
    assert "ZeroDivisionError" in error


def test_an_unknown_notebook_is_an_error_in_one_line(render, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        render.main([str(tmp_path / "pages"), "--only", "09"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("render.py: error: no such notebook: 09")
    assert error.count("\n") == 1


def test_every_tutorial_has_a_picture_of_modest_size():
    for notebook in TUTORIALS.glob("*.ipynb"):
        picture = TUTORIALS / "pictures" / f"{notebook.stem}.png"
        assert picture.stat().st_size < 100_000, picture.name


def test_its_switch_is_off_whatever_the_caller_has(render, monkeypatch):
    monkeypatch.setenv("TVM_FAST", "1")
    assert "TVM_FAST" not in render.environment()
