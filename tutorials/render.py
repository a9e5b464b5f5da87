"""Execute the notebooks in full and write them as pages for a browser, with outputs and figures.

    python tutorials/render.py runs/tutorials               all of them, and an index.html
    python tutorials/render.py runs/tutorials --only 02 04  some
    python tutorials/render.py runs/tutorials --pictures    also renew tutorials/pictures/, a figure of each

Pages hold all that they show and load nothing: formulas are MathML, which browsers set themselves.
"""

import argparse
import base64
import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from tvm_ref.command_line import OneLineParser

HERE = Path(__file__).resolve().parent
GALLERY = "gallery"  # the tag of the cell whose figure goes into pictures/
WIDTH, BYTES = 1000, 100_000  # of those pictures, at most
CODE_OR_FORMULA = re.compile(r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL)
STYLE = "<style>math[display=block] { overflow-x: auto; margin: 1em 0 }</style>"  # long ones scroll on a phone


def environment() -> dict[str, str]:
    """Return the caller's environment without the fast switch, and without a choice of where figures are shown."""
    return {name: value for name, value in os.environ.items() if name not in ("TVM_FAST", "MPLBACKEND")}


def execute(path: Path) -> Any:
    """The notebook with its outputs.

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


def write_page(notebook: Any, name: str) -> str:
    """Return a notebook, with its outputs, as HTML that loads nothing and whose links lead to pages.

    Raises:
        ValueError: a formula that cannot be set.
    """
    from nbconvert import HTMLExporter

    formulas: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = set_formulas(cell.source, formulas)
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": name}})
    page = re.sub(
        r"<script\b.*?</script>", "", page, flags=re.DOTALL
    )  # MathJax, require.js and mermaid, from elsewhere
    for mark, mathml in formulas.items():
        page = page.replace(mark, mathml)
    page = page.replace('.ipynb"', '.html"').replace('href="README.md"', 'href="index.html"')
    return page.replace("</head>", f"{STYLE}</head>", 1)


def figure(notebook: Any) -> bytes:
    """The gallery's figure as PNG, at most WIDTH pixels wide, in as many colours as BYTES allow."""
    from PIL import Image

    (cell,) = (cell for cell in notebook.cells if GALLERY in cell.metadata.get("tags", []))
    (png,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    for colours in (256, 64, 16, 4):
        small = io.BytesIO()
        image.quantize(colours, Image.Quantize.MAXCOVERAGE).save(small, "PNG", optimize=True)
        if small.tell() < BYTES:
            break
    return small.getvalue()


def write_index(out: Path) -> None:
    """A page that leads to those in the folder."""
    pages = sorted(page.stem for page in out.glob("0*.html"))
    items = "\n".join(f'<li><a href="{page}.html">{page[3:].replace("_", " ")}</a></li>' for page in pages)
    (out / "index.html").write_text(f"<!doctype html><title>Tutorials</title><h1>Tutorials</h1><ol>{items}</ol>\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineParser(
        "render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="folder to write pages into; pages of that name are replaced")
    parser.add_argument("--only", nargs="+", metavar="NUMBER", help="of notebooks, 01 to 07 (default: all)")
    parser.add_argument("--pictures", action="store_true", help="also renew tutorials/pictures/")
    options = parser.parse_args(argv)
    paths = [p for p in sorted(HERE.glob("*.ipynb")) if not options.only or p.stem[:2] in options.only]
    if not paths:
        parser.error(f"no such notebook: {' '.join(options.only)}")
    try:
        import latex2mathml  # noqa: F401
        import nbconvert  # noqa: F401  both are for write_page
        from nbclient.exceptions import CellExecutionError
    except ImportError:
        parser.error("this needs the package's extra 'tutorials': pip install -e '.[tutorials]'")
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
            page = write_page(notebook, path.stem)
        except ValueError as error:
            print(f"{path.name} failed: {error}", file=sys.stderr)
            return 1
        (options.out / f"{path.stem}.html").write_text(page)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        print(f"{path.stem}: {time.perf_counter() - begun:.0f} s, {cpu:.0f} s of one core", flush=True)
        write_index(options.out)
    print(f"open {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
