"""The site: guide, notebooks with their outputs, measurements, and a reference of the three packages.

    python -m sphinx -c tutorials/site . runs/site    then open runs/site/index.html

Notebooks have the outputs that are stored in them (tutorials/render.py). Sphinx reads the repository itself, so that a
link which leads somewhere on GitHub does so here, too. Pages load nothing from elsewhere: formulas are MathML, which
browsers set themselves.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"tvm_ref": ROOT / "tvm_ref", "jvp_attention": ROOT / "kernels/jvp_attention", "imagenet": ROOT / "imagenet"}

project = "Terminal Velocity Matching"
author = "the contributors of tvm-ref"
root_doc = "tutorials/site/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    ".github/CHANGELOG.md",
    "tvm_ref/**",
    "kernels/**",
    "imagenet/**",
    "tutorials/**",
]
exclude_patterns = ["**/.ipynb_checkpoints", "tutorials/pictures/**", "**/api/*/modules.rst"]
extensions = ["myst_nb", *(f"sphinx.ext.{name}" for name in ("apidoc", "autodoc", "napoleon", "viewcode"))]
html_theme = "furo"
html_title = "tvm-ref"
html_show_copyright = False
highlight_language = "text"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_extra_path = ["index.html"]  # which leads to root_doc
if (ROOT / "runs/play/moons.html").is_file():  # see tutorials/playground/README.md
    html_extra_path.append("../../runs/play")
    tags.add("play")  # noqa: F821  Sphinx hands it over

nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}  # nothing from elsewhere
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

# Reference: a page for each module
apidoc_modules = [
    {"path": folder, "destination": f"tutorials/site/api/{name}", "separate_modules": True, "module_first": True}
    for name, folder in PACKAGES.items()
]
autodoc_default_options = {"ignore-module-all": True}  # each name where it is defined
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
html_math_renderer = "mathml"


def mathml(latex: str, display: str) -> str:
    """Set a formula as MathML.

    Raises:
        ValueError: a formula, or a command in it, that MathML is not known for.
    """
    result = convert(latex, display=display).replace(r">\|<", ">&#x02016;<")  # of \big\|, where it forgets to
    if "\\" in result:  # what it does not know it leaves as it is
        raise ValueError(f"no MathML for a command in the formula {latex!r}")
    return result


def visit_inline(translator: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of its own."""
    translator.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def as_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn a docstring, which is plain text, into reStructuredText: indented lines are shown as they are."""
    result: list[str] = []
    literal = section = False  # within indented lines; within Args and the like, which napoleon reads
    for line in lines:
        indented = line.startswith("    ")
        if indented and not section and not literal:
            result += ["", "::", ""]
            literal = True
        elif line and not indented:
            result += [""] * literal
            literal, section = False, line in ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:")
        if not literal and not line.startswith(">>>"):
            parts = re.split(r"(`[^`]+`)", line)  # code is between single ticks
            line = "".join(f"`{p}`" if i % 2 else re.sub(r"([*|]|_\b)", r"\\\1", p) for i, p in enumerate(parts))
        result.append(line)
    lines[:] = result


def without_folders(app: Sphinx, docname: str, source: list[str]) -> None:
    """Keep only the text of links to folders, which GitHub shows and a site does not have."""
    here = Path(app.srcdir, docname).parent

    def text(link: re.Match[str]) -> str:
        return link[1] if (here / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^\[\]]+)\]\(([\w./-]+)\)", text, source[0])


def setup(app: Sphinx) -> None:
    """Register the formulas, and how links and docstrings are read."""
    app.connect("source-read", without_folders)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("autodoc-process-docstring", as_text, priority=100)  # before napoleon
