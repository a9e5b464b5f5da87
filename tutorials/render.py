"""Execute the notebooks in full and write them as a site: an index, a page each with figures, the pages to play with.

    python tutorials/render.py runs/tutorials               all of them
    python tutorials/render.py runs/tutorials --only 02 04  some; the index leads to those that are there
    python tutorials/render.py runs/tutorials --pictures    also renew tutorials/pictures/, a figure of each

Pages hold all that they show and load nothing: formulas are MathML, which browsers set themselves. With --repository
OWNER/NAME (on GitHub by default its GITHUB_REPOSITORY) pages also lead to copies of the notebooks in Colab, whose first
cell installs that repository there.
"""

import argparse
import base64
import copy
import functools
import html
import io
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tvm_ref.cli.options import OneLineParser

HERE = Path(__file__).resolve().parent
GALLERY = "gallery"  # the tag of the cell whose figure goes into pictures/
PLOT = "plot"  # the tag of cells that only draw, whose code pages fold
WIDTH, BYTES = 1000, 100_000  # of those pictures, at most
CODE_OR_FORMULA = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL)
QUESTION = re.compile(r"\*\*The question: (.*?)\*\*", re.DOTALL)
PLAY = {  # of tutorials/pages/
    "moons.html": "Two moons to play with: drag the times of a jump, and see it beside the exact flow",
    "heart.html": "The same on points drawn by hand",
}
BRANCH = "gh-pages"  # where the workflow puts the site, and Colab finds the copies
STYLE = """<style>
math[display=block] { overflow-x: auto; margin: 1em 0 }
body.jp-Notebook { padding: 8px max(8px, calc(50vw - 520px)); min-width: 0 }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto; max-width: 100% }
.jp-RenderedHTMLCommon :not(pre) > code { overflow-wrap: anywhere }
.jp-RenderedHTMLCommon { overflow-wrap: break-word }
.jp-OutputArea-output img, .jp-RenderedHTMLCommon img { max-width: 100%; height: auto }
.jp-OutputArea-output pre, .highlight pre { overflow-x: auto; white-space: pre }
.jp-Cell-inputWrapper, .jp-OutputArea-child, .jp-InputArea-editor { min-width: 0; max-width: 100% }
.jp-InputPrompt, .jp-OutputPrompt { display: none }
nav.top { display: flex; flex-wrap: wrap; gap: 4px 20px; font: 16px/1.6 sans-serif; padding: 8px }
nav.top a { color: #0072B2; text-decoration: underline }
</style>"""
FOLDED = f"""{{%- extends "lab/index.html.j2" -%}}
{{%- block input -%}}
{{%- if "{PLOT}" in cell.metadata.tags -%}}
<details><summary>Code of the figure</summary>{{{{ super() }}}}</details>
{{%- else -%}}
{{{{ super() }}}}
{{%- endif -%}}
{{%- endblock input -%}}
"""
INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Terminal Velocity Matching: tutorials</title>
<style>
body {{ font: 17px/1.5 sans-serif; margin: 0 auto; max-width: 1000px; padding: 12px; color: #222 }}
article {{ border-top: 1px solid #ccc; padding: 12px 0 }}
img {{ max-width: 100%; height: auto }}
h2 {{ margin: 4px 0 }}
a {{ color: #0072B2 }}
</style></head><body>
<h1>Terminal Velocity Matching, from the start</h1>
<p>{lead}</p>
{items}
</body></html>
"""


def environment() -> dict[str, str]:
    """Return the caller's environment without the fast switch, and without a choice of where figures are shown."""
    return {name: value for name, value in os.environ.items() if name not in ("TVM_FAST", "MPLBACKEND")}


def execute(path: Path) -> Any:
    """Return the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell that fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=3600,
        resources={"metadata": {"path": HERE}},
        coalesce_streams=True,  # of a progress bar, only its end
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute(env=environment())
    return notebook


def set_formulas(text: str, formulas: dict[str, str]) -> str:
    """Put a mark in the place of each $formula$ and $$formula$$ of Markdown text, and its MathML into `formulas`.

    Code keeps its dollars. Marks, and not MathML, go through Markdown, which would take its signs for its own.

    Raises:
        ValueError: a formula that MathML is not known for, in whole or in part.
    """
    from latex2mathml.converter import convert

    def mark(match: re.Match[str]) -> str:
        if match["code"]:
            return match["code"]
        latex = match["block"] or match["inline"]
        try:
            mathml = convert(latex, display="block" if match["block"] else "inline")
        except Exception as error:  # latex2mathml has a dozen classes of its own
            raise ValueError(f"no MathML for the formula {latex!r}: {error!r}") from None
        mathml = mathml.replace(r">\|<", ">&#x02016;<")  # of \big\|, where it forgets to
        if "\\" in mathml:  # what it does not know it leaves as it is
            raise ValueError(f"no MathML for a command in the formula {latex!r}")
        name = f"FORMULA{len(formulas)}X"
        formulas[name] = mathml
        return name

    return CODE_OR_FORMULA.sub(mark, text)


@functools.cache
def exporter() -> Any:
    """Make nbconvert's writer of HTML, once: its templates take a second to load."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    return HTMLExporter(extra_loaders=[DictLoader({"folded.html.j2": FOLDED})], template_file="folded.html.j2")


def write_page(notebook: Any, name: str, links: str = "") -> str:
    """Return a notebook, with its outputs, as HTML that loads nothing and whose links lead to pages; `links` on top.

    Raises:
        ValueError: a formula that cannot be set.
    """
    formulas: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = set_formulas(cell.source, formulas)
    page, _ = exporter().from_notebook_node(notebook, {"metadata": {"name": name}})
    page = re.sub(
        r"<script\b.*?</script>", "", page, flags=re.DOTALL
    )  # MathJax, require.js and mermaid, from elsewhere
    for mark, mathml in formulas.items():
        page = page.replace(mark, mathml)
    page = page.replace('.ipynb"', '.html"').replace('href="README.md"', 'href="index.html"')
    page = re.sub(r"(<body\b[^>]*>)", lambda body: f'{body[1]}<nav class="top">{links}</nav>', page, count=1)
    return page.replace("</head>", f"{STYLE}</head>", 1)


def figure(notebook: Any) -> bytes:
    """Return the gallery's figure as PNG, at most WIDTH pixels wide, in as many colours as BYTES allow.

    Raises:
        ValueError: none, or several.
    """
    from PIL import Image

    outputs = [o for cell in notebook.cells if GALLERY in cell.metadata.get("tags", []) for o in cell.outputs]
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    if len(found) != 1:
        raise ValueError(f"{len(found)} figures in cells tagged {GALLERY!r}, and it must be one")
    image = Image.open(io.BytesIO(base64.b64decode(found[0]))).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    for colours in (256, 64, 16, 4):
        small = io.BytesIO()
        image.quantize(colours, Image.Quantize.MAXCOVERAGE).save(small, "PNG", optimize=True)
        if small.tell() < BYTES:
            break
    return small.getvalue()


def colab_copy(notebook: Any, repository: str) -> Any:
    """Return a notebook without outputs whose first cell installs the repository, at this commit, if run in Colab."""
    import nbformat

    commit = os.environ.get("GITHUB_SHA")
    address = f"git+https://github.com/{repository}" + (f"@{commit}" if commit else "")
    install = nbformat.v4.new_code_cell(
        "# In Colab: install the project, which may take some minutes. Elsewhere: do nothing.\n"
        f'import sys\n\nif "google.colab" in sys.modules:\n    %pip install -q scikit-learn {address}',
        id="colab",
    )
    result = copy.deepcopy(notebook)
    result.cells = [install, *result.cells]
    return result


def colab_link(name: str, repository: str) -> str:
    """Return a link that opens the published copy of a notebook in Colab."""
    address = f"https://colab.research.google.com/github/{repository}/blob/{BRANCH}/notebooks/{name}.ipynb"
    return f'<a href="{address}">Open in Colab</a>'


def top_links(path: Path, repository: str | None) -> str:
    """Return the links on top of a notebook's page: the index, its neighbours, and Colab."""
    links = ['<a href="index.html">All tutorials</a>']
    paths = sorted(HERE.glob("*.ipynb"))
    place = paths.index(path)
    for word, other in (("Before", place - 1), ("Next", place + 1)):
        if 0 <= other < len(paths):
            links.append(f'<a href="{paths[other].stem}.html">{word}: {title_and_question(paths[other])[0]}</a>')
    return " ".join(links + ([colab_link(path.stem, repository)] if repository else []))


def title_and_question(path: Path) -> tuple[str, str]:
    """Return a notebook's title and the question that it asks in its first cell."""
    import nbformat

    first = nbformat.read(path, as_version=4).cells[0].source
    heading, asked = re.match(r"# (.*)", first), QUESTION.search(first)
    plain = " ".join(asked[1].replace("*", "").split()) if asked else ""
    return heading[1] if heading else path.stem, plain[:1].upper() + plain[1:]


def write_index(out: Path, repository: str | None = None) -> None:
    """Write the page that leads to all others: of each notebook in the folder its question and its picture."""
    items = []
    for path in sorted(HERE.glob("*.ipynb")):
        if not (out / f"{path.stem}.html").is_file():
            continue
        title, asked = (html.escape(text) for text in title_and_question(path))
        colab = f"<p>{colab_link(path.stem, repository)}</p>" if repository else ""
        picture = f'<img src="pictures/{path.stem}.png" alt="A figure of this notebook" loading="lazy">'
        link = f'<a href="{path.stem}.html">'
        items.append(f"<article><h2>{link}{title}</a></h2><p>{asked}</p>{colab}{link}{picture}</a></article>")
    for name, text in PLAY.items():
        if (HERE / "pages" / name).is_file():
            (out / "pages").mkdir(exist_ok=True)
            shutil.copy(HERE / "pages" / name, out / "pages" / name)
            items.append(f'<article><h2><a href="pages/{name}">{text}</a></h2></article>')
    lead = "From straight lines between points to what it takes to train on ImageNet. Each notebook asks one question."
    if repository:
        lead += f' <a href="https://github.com/{repository}">The code</a>.'
    (out / "index.html").write_text(INDEX.format(lead=lead, items="\n".join(items)))


def write_site(path: Path, notebook: Any, out: Path, repository: str | None) -> None:
    """Write the page of an executed notebook, its picture, its copy for Colab, and the index anew.

    Raises:
        ValueError: a formula that cannot be set, or no figure in a cell with the gallery's tag.
    """
    import nbformat

    (out / f"{path.stem}.html").write_text(write_page(notebook, path.stem, top_links(path, repository)))
    (out / "pictures").mkdir(exist_ok=True)
    (out / "pictures" / f"{path.stem}.png").write_bytes(figure(notebook))
    if repository:
        (out / "notebooks").mkdir(exist_ok=True)
        stored = nbformat.read(path, as_version=4)
        nbformat.write(colab_copy(stored, repository), out / "notebooks" / f"{path.stem}.ipynb")
    write_index(out, repository)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser(
        "render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("out", type=Path, help="folder to write pages into; pages of that name are replaced")
    p.add_argument("--only", nargs="+", metavar="NUMBER", help="of notebooks, 01 to 09 (default: all)")
    p.add_argument("--pictures", action="store_true", help="also renew tutorials/pictures/")
    p.add_argument(
        "--repository", metavar="OWNER/NAME", default=os.environ.get("GITHUB_REPOSITORY"),
        help="where the project lies on GitHub, for links to Colab (default: GITHUB_REPOSITORY, else no such links)",
    )  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    options = command.parse_args(argv)
    if options.repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository):
        command.error(f"--repository must read OWNER/NAME, got {options.repository}")
    paths = [p for p in sorted(HERE.glob("*.ipynb")) if not options.only or p.stem[:2] in options.only]
    if not paths:
        command.error(f"no such notebook: {' '.join(options.only)}")
    try:
        import latex2mathml  # noqa: F401
        import nbconvert  # noqa: F401  both are for write_page
        from nbclient.exceptions import CellExecutionError
    except ImportError:
        command.error("this needs the package's extra 'tutorials': pip install -e '.[tutorials]'")
    options.out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        begun, before = time.perf_counter(), os.times()
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            print(f"{path.name} failed:\n{error}", file=sys.stderr)
            return 1
        if options.pictures:
            (HERE / "pictures" / f"{path.stem}.png").write_bytes(figure(notebook))
        try:
            write_site(path, notebook, options.out, options.repository)
        except ValueError as error:
            print(f"{path.name} failed: {error}", file=sys.stderr)
            return 1
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        print(f"{path.stem}: {time.perf_counter() - begun:.0f} s, {cpu:.0f} s of one core", flush=True)
    print(f"open {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
