"""tutorials/render.py: pages with outputs, a picture of the tagged cell, an index; errors in one line."""

import importlib.util
import re
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
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
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
    assert "colab" not in page  # without an address there is nothing to open
    assert imread(tmp_path / "pictures" / "01_one.png").shape[1] == render.WIDTH
    assert imread(out / "pictures" / "02_two.png").shape[1] == render.WIDTH


def test_only_the_notebooks_asked_for_are_rendered(render, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(render, "execute", lambda path: done.append(path.name) or nbformat.read(path, 4))
    monkeypatch.setattr(render, "figure", lambda notebook: b"")
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


def test_an_address_that_is_none_is_an_error_in_one_line(render, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        render.main([str(tmp_path / "pages"), "--repository", "https://github.com/a/b"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("render.py: error: --repository must read OWNER/NAME")


def test_a_notebook_without_its_figure_is_named(render, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render, "execute", lambda path: nbformat.read(path, 4))  # no outputs
    assert render.main([str(tmp_path / "pages"), "--only", "01"]) == 1
    assert capsys.readouterr().err == "01_one.ipynb failed: 0 figures in cells tagged 'gallery', and it must be one\n"


def test_every_tutorial_has_a_picture_of_modest_size():
    for notebook in TUTORIALS.glob("*.ipynb"):
        picture = TUTORIALS / "pictures" / f"{notebook.stem}.png"
        assert picture.stat().st_size < 100_000, picture.name


def test_its_switch_is_off_whatever_the_caller_has(render, monkeypatch):
    monkeypatch.setenv("TVM_FAST", "1")
    assert "TVM_FAST" not in render.environment()


# Formulas -------------------------------------------------------------------------------------------------------------

FORMULAS = r"""Inline $\frac{d}{ds} f_\theta(x_t, t, s)$, and $a_1 * b_1 * c_1$, whose stars and bars _must_ stay.

$$\big\|\int_0^t g\, ds\big\|^2 \le t \int_0^t \|g\|^2 ds \qquad (7)$$

| symbol | |
| --- | --- |
| $\lambda(s)$ | a weight |

<details><summary>Solution</summary>

$m < 0$; the shell's `$HOME` stays.

```python
title = "$x$"
```

</details>
"""


def test_formulas_become_mathml_and_the_page_loads_nothing(render):
    cells = [nbformat.v4.new_markdown_cell(FORMULAS), nbformat.v4.new_code_cell('"$y$"')]
    page = render.write_page(nbformat.v4.new_notebook(cells=cells), "page")
    prose = re.sub(r"<(pre|code|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "$" not in prose
    assert "FORMULA" not in page
    assert prose.count("<math ") == 5
    assert prose.count('display="block"') == 1
    assert "<mfrac>" in prose
    assert "$HOME" in page
    assert "<script" not in page
    assert not re.search(r"""<(?!a\b)[^>]*\b(?:src|href)=["']?https?:""", page)  # a link to click is no load
    assert not re.search(r"@import|url\(['\"]?https?:", page)


def test_code_that_only_draws_is_folded_and_its_figure_is_not(render):
    cells = [
        nbformat.v4.new_code_cell("first = 1"),
        nbformat.v4.new_code_cell("second = 2", metadata={"tags": ["plot"]}),
    ]
    for cell in cells:
        cell.outputs = [nbformat.v4.new_output("stream", text="output of a cell")]
    page = render.write_page(nbformat.v4.new_notebook(cells=cells), "page")
    (folded,) = re.findall(r"<details><summary>Code of the figure</summary>(.*?)</details>", page, re.DOTALL)
    assert "second" in folded
    assert "first" not in folded
    assert "output" not in folded
    assert page.count("output of a cell") == 2


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_formula_of_the_tutorials_can_be_set(render, path):
    formulas = {}
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    left = " ".join(render.set_formulas(cell.source, formulas) for cell in cells)
    assert len(formulas) >= 5
    assert "$" not in re.sub(r"```.*?```|`[^`\n]+`", "", left, flags=re.DOTALL)


@pytest.mark.parametrize("latex", [r"\nosuchcommand{x}", r"\left( x"])
def test_a_formula_that_cannot_be_set_is_named(render, tmp_path, monkeypatch, capsys, latex):
    monkeypatch.setattr(
        render, "execute", lambda path: nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"${latex}$")])
    )
    assert render.main([str(tmp_path / "pages"), "--only", "01"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("01_one.ipynb failed: no MathML for")
    assert error.count("\n") == 1
