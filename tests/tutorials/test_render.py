"""tutorials/render.py: the picture of a notebook's tagged cell."""

import base64
import importlib.util
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

TUTORIALS = Path(__file__).parents[2] / "tutorials"


@pytest.fixture(scope="module")
def render():
    specification = importlib.util.spec_from_file_location("render", TUTORIALS / "render.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_picture_is_small_whatever_the_figure(render):
    """The least compressible figure: noise."""
    noise, png = np.random.default_rng(0).integers(0, 256, (400, 1600, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    data = {"image/png": base64.b64encode(png.getvalue()).decode()}
    cell = nbformat.v4.new_code_cell(metadata={"tags": ["gallery"]})
    cell.outputs = [nbformat.v4.new_output("display_data", data)]
    picture = render.figure(nbformat.v4.new_notebook(cells=[cell]))
    assert len(picture) < render.BYTES
    assert Image.open(io.BytesIO(picture)).size == (1000, 250)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter client
def test_a_notebook_is_executed_in_full_and_keeps_its_figures(render, tmp_path, monkeypatch):
    """Also where the environment asks for short trainings and for another backend; pictures were empty there."""
    monkeypatch.setenv("TVM_FAST", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    source = "import os\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nassert 'TVM_FAST' not in os.environ"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["gallery"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "01_one.ipynb")
    assert Image.open(io.BytesIO(render.figure(render.execute(tmp_path / "01_one.ipynb")))).width > 300


def test_every_tutorial_has_a_picture_of_modest_size():
    for notebook in TUTORIALS.glob("*.ipynb"):
        picture = TUTORIALS / "pictures" / f"{notebook.stem}.png"
        assert picture.stat().st_size < 100_000, picture.name
