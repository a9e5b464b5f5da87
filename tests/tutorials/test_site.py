"""The site of tutorials/site/conf.py: complete, readable on a phone, and the workflow that publishes it."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = [
    "tutorials/site/index", "README", "tvm_ref/README", "tvm_ref/objectives/README", "imagenet/README",
    "kernels/jvp_attention/README", "tutorials/site/api/tvm_ref/tvm_ref.objectives.tvm",
    *(f"tutorials/site/{path.stem}" for path in sorted((ROOT / "tutorials/site").glob("[!i]*.md"))),
    *(f"tutorials/{path.stem}" for path in NOTEBOOKS),
]  # fmt: skip
PHONE = {"width": 390, "height": 844}
CODE_OR_FORMULA = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL)


@pytest.fixture(scope="module")
def conf():
    pytest.importorskip("sphinx")
    specification = importlib.util.spec_from_file_location("site_conf", ROOT / "tutorials" / "site" / "conf.py")
    module = importlib.util.module_from_spec(specification)
    module.tags = set()  # which Sphinx hands over
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_formula_of_the_notebooks_can_be_set(conf, path):
    prose = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    formulas = [match["block"] or match["inline"] for match in CODE_OR_FORMULA.finditer(prose) if not match["code"]]
    assert len(formulas) >= 5
    for latex in formulas:
        assert conf.mathml(latex, "inline").startswith("<math")


def test_the_dictionary_is_right():
    page = (ROOT / "tutorials" / "site" / "dictionary.md").read_text()
    exec(page.split("```python")[1].split("```")[0], {})


@pytest.mark.parametrize("latex", [r"\nosuchcommand{x}", r"\left( x"])
def test_a_formula_that_cannot_be_set_is_an_error(conf, latex):
    with pytest.raises(Exception, match=r"formula|Delimiter|Missing|Extra|^$"):
        conf.mathml(latex, "inline")


def test_a_docstring_is_shown_as_it_reads(conf):
    """Stars and bars are no markup, indented lines are code, and napoleon finds its sections."""
    lines = ["A norm |F - u*| by `f(x)`.", "", "    a * b", "and", "", "Args:", "    x: a *point*."]
    conf.as_text(None, "function", "f", None, None, lines)
    shown = ["A norm \\|F - u\\*\\| by ``f(x)``.", "", "", "::", "", "    a * b", "", "and", "", "Args:"]
    assert lines == [*shown, "    x: a \\*point\\*."]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site; a warning is an error."""
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-d", str(out / ".doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, "-c", "tutorials/site", ".", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site):
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            assert re.match(r"https?:|mailto:|data:", link) or (page.parent / unquote(link)).exists(), (page, link)


@pytest.mark.slow
def test_every_module_is_in_the_reference(site):
    for package, folder in {"tvm_ref": ROOT, "imagenet": ROOT, "jvp_attention": ROOT / "kernels"}.items():
        for path in (folder / package).rglob("*.py"):
            name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            if not name.endswith("__main__"):
                assert (site / "tutorials/site/api" / package / f"{name}.html").is_file(), name


@pytest.fixture(scope="module")
def phone(new_page):
    """A window as narrow as a phone's, and the list of what should not happen in it."""
    return new_page(viewport=PHONE)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_on_a_phone(site, phone, name):
    """No error, nothing fetched, no sideways scrolling, no raw formula, every picture there; fractions have a height.

    MathML that the browser does not know is as high as a line of text.
    """
    page, complaints = phone
    complaints.clear()
    page.goto((site / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    widths = page.evaluate("""async () => {
        const late = new Promise((_, reject) => setTimeout(() => reject(new Error("a picture does not load")), 60000));
        for (const image of document.images) { image.loading = "eager"; await Promise.race([image.decode(), late]); }
        return [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]);
    }""")
    assert all(natural > 0 and shown <= PHONE["width"] for natural, shown in widths)
    prose = page.evaluate("""() => {
        const copy = document.querySelector("article").cloneNode(true);
        copy.querySelectorAll("pre, code, math").forEach(e => e.remove());
        return copy.textContent;
    }""")
    assert "$" not in prose
    heights = page.evaluate("[...document.querySelectorAll('mfrac')].map(m => m.getBoundingClientRect().height)")
    assert all(height == 0 or height > 15 for height in heights)  # 0: within a folded solution
    assert complaints == []


@pytest.fixture(scope="module")
def steps():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tutorials.yml").read_text())
    assert workflow["permissions"] == {"contents": "write"}
    return {step["name"]: step for step in workflow["jobs"]["site"]["steps"] if "name" in step}


def test_the_workflow_s_commands_exist(steps):
    from tvm_ref.toy import __main__ as toy

    *trainings, page = [shlex.split(line) for line in steps["Play"]["run"].splitlines()]
    for command in trainings:
        toy.parser().parse_args(command[3:])
    assert (ROOT / page[1]).is_file()
    build = shlex.split(steps["Build"]["run"])
    assert (ROOT / build[build.index("-c") + 1] / "conf.py").is_file()
    assert steps["Publish"]["run"].startswith(f"cd {build[-1]}\n")
