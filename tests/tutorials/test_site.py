"""The site of tutorials/render.py in a browser, and the workflow that publishes it.

Notebooks are not executed here (test_tutorials.py does that): each gets one figure and a long line of text as outputs.
"""

import base64
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from PIL import Image

pytestmark = pytest.mark.slow  # ten seconds of rendering
ROOT = Path(__file__).parents[2]
NAMES = [path.stem for path in sorted((ROOT / "tutorials").glob("*.ipynb"))]
REPOSITORY = "someone/some-fork"
PHONE = {"width": 390, "height": 844}
CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def with_outputs(path):
    """The notebook as if executed: a wide figure and a line without a space in the gallery's cell."""
    png = io.BytesIO()
    Image.new("RGB", (1600, 500), "teal").save(png, "PNG")
    data = {"image/png": base64.b64encode(png.getvalue()).decode()}
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "gallery" in cell.metadata.get("tags", []))
    cell.outputs = [
        nbformat.v4.new_output("stream", text=300 * "0" + "\n"),
        nbformat.v4.new_output("display_data", data),
    ]
    return notebook


@pytest.fixture(scope="module")
def render():
    """The module."""
    specification = importlib.util.spec_from_file_location("render", ROOT / "tutorials" / "render.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.execute = with_outputs
    return module


@pytest.fixture(scope="module")
def site(render, tmp_path_factory):
    """The folder of the site, all nine notebooks."""
    out = tmp_path_factory.mktemp("site")
    assert render.main([str(out), "--repository", REPOSITORY]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield instance
        instance.close()


@pytest.fixture(scope="module")
def phone(browser):
    """A window as narrow as a phone's, and the list of what should not happen in it."""
    page, complaints = browser.new_context(viewport=PHONE).new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    yield page, complaints
    page.context.close()


@pytest.mark.parametrize("name", ["index", *NAMES])
def test_a_page_can_be_read_on_a_phone(site, phone, name):
    """No error, nothing fetched, no sideways scrolling, no raw formula, every picture there, every link alive."""
    page, complaints = phone
    complaints.clear()
    page.goto((site / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    widths = page.evaluate("""async () => {
        const images = [...document.images];
        for (const image of images) { image.loading = "eager"; await image.decode(); }
        return images.map(image => [image.naturalWidth, image.getBoundingClientRect().width]);
    }""")
    assert len(widths) >= (len(NAMES) if name == "index" else 1)
    assert all(natural > 0 and 200 < shown <= PHONE["width"] for natural, shown in widths)
    prose = page.evaluate("""() => {
        const copy = document.body.cloneNode(true);
        copy.querySelectorAll("pre, code").forEach(e => e.remove());
        return copy.textContent;
    }""")
    assert "$" not in prose
    assert "FORMULA" not in prose
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))")
    for link in links:
        target = link.split("#")[0]
        assert not target or target.startswith("https://") or (site / target).is_file(), link
    assert complaints == []


@pytest.mark.parametrize("name", NAMES[1::4])  # 02, 06
def test_formulas_are_set_by_the_browser(site, phone, name):
    """MathML that the browser does not know has no height of its own; a fraction is higher than a line of text."""
    page, _ = phone
    page.goto((site / f"{name}.html").as_uri())
    heights = page.evaluate("[...document.querySelectorAll('mfrac')].map(m => m.getBoundingClientRect().height)")
    assert len(heights) >= 1
    assert max(heights) > 20


def test_the_index_asks_every_question(site):
    text = (site / "index.html").read_text()
    assert text.count("<article>") == len(NAMES) + len(list((site / "pages").iterdir()))
    assert len(re.findall(r"<p>[A-Z][^<*]*\?</p>", text)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_colab_opens_a_copy_that_installs_the_project(site, name):
    """The link leads to a file of the published branch, whose first cell installs there, and here does nothing."""
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/gh-pages/notebooks/{name}.ipynb"
    assert f'href="{link}"' in (site / f"{name}.html").read_text()
    assert f'href="{link}"' in (site / "index.html").read_text()
    copied = nbformat.read(site / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(copied)
    stored = nbformat.read(ROOT / "tutorials" / f"{name}.ipynb", as_version=4)
    assert [cell.source for cell in copied.cells[1:]] == [cell.source for cell in stored.cells]
    first = copied.cells[0].source
    assert f"git+https://github.com/{REPOSITORY}" in first
    asked = []
    plain = re.sub(r"%pip (.*)", lambda command: f"asked.append({command[1]!r})", first)
    exec(plain, {"asked": asked})
    assert asked == []
    sys.modules["google.colab"] = None
    try:
        exec(plain, {"asked": asked})
    finally:
        del sys.modules["google.colab"]
    assert len(asked) == 1


def test_the_address_stands_nowhere_in_the_project():
    """It is what GitHub tells the workflow."""
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        assert "colab" not in path.read_text(), path.name


# The workflow --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tutorials.yml").read_text())
    assert workflow[True] == {"push": {"branches": ["main"]}, "workflow_dispatch": None}  # YAML reads "on" as true
    assert workflow["permissions"] == {"contents": "write"}
    return {step["name"]: step for step in workflow["jobs"]["site"]["steps"] if "name" in step}


def test_the_workflow_s_commands_exist(steps, render):
    command = shlex.split(steps["Build"]["run"])
    assert command[:2] == ["python", "tutorials/render.py"]
    assert render.parser().parse_args(command[2:]).out == Path("site")
    assert steps["Publish"]["run"].startswith("cd site\n")
    extras = re.search(r"\.\[(.*)\]", steps["Install"]["run"])[1].split(",")
    assert set(extras) <= {"tutorials", "kernels", "imagenet", "test"}


def test_the_workflow_publishes_the_folder_that_it_built(steps, tmp_path):
    """Its script, with a folder in GitHub's place."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "--quiet", "--bare", remote], check=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("hello")
    script = re.sub(r'"https://x-access-token:[^"]*"', f"'{remote}'", steps["Publish"]["run"])
    assert str(remote) in script
    environment = os.environ | {"GITHUB_ACTOR": "someone", "GITHUB_SHA": "abc"}
    for _ in range(2):  # the second push replaces the first
        subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, check=True, env=environment)
        shutil.rmtree(tmp_path / "site" / ".git")
    listed = subprocess.run(
        ["git", "--git-dir", remote, "ls-tree", "--name-only", "gh-pages"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == [".nojekyll", "index.html"]
