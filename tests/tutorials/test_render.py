"""tutorials/render.py: notebooks keep the outputs of their code."""

import base64
import io

import nbformat
import numpy as np
import pytest
from PIL import Image

from tutorials import render


def test_a_figure_is_small_whatever_it_shows():
    """The least compressible figure: noise."""
    noise, png = np.random.default_rng(0).integers(0, 256, (300, 1600, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    small = base64.b64decode(render.smaller(base64.b64encode(png.getvalue()).decode()))
    assert len(small) < render.BYTES
    assert Image.open(io.BytesIO(small)).size == (1000, 188)


def test_the_hash_is_that_of_the_code_alone():
    cells = [nbformat.v4.new_markdown_cell("one"), nbformat.v4.new_code_cell("1 + 1")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    before = render.digest(notebook)
    cells[0].source = "two"
    assert render.digest(notebook) == before
    cells[1].source = "1 + 2"
    assert render.digest(notebook) != before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter client
def test_a_notebook_is_executed_in_full_and_keeps_its_outputs(tmp_path, monkeypatch):
    """Also where the environment asks for short trainings and for another backend; figures were empty there."""
    monkeypatch.setenv("TVM_FAST", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    bar = "import sys, tqdm\nfor _ in tqdm.tqdm(range(3), file=sys.stdout, leave=False):\n    pass"
    plot = "import os\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nassert 'TVM_FAST' not in os.environ"
    cells = [nbformat.v4.new_code_cell(source) for source in (bar, plot)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01_one.ipynb")
    notebook = render.execute(tmp_path / "01_one.ipynb")
    assert notebook.metadata.executed == render.digest(notebook)
    assert notebook.cells[0].outputs == []
    (png,) = (output.data["image/png"] for output in notebook.cells[1].outputs if "image/png" in output.data)
    assert Image.open(io.BytesIO(base64.b64decode(png))).width > 300
