"""Execute notebooks in full and store their outputs in them: GitHub and the site show what is stored.

    python tutorials/render.py        all of them, which takes a while
    python tutorials/render.py 02 04  some

To be done after every change of a notebook's code: a test finds notebooks whose code is not the code that was executed.
"""

import base64
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIDTH, BYTES = 1000, 60_000  # of a figure, at most


def digest(notebook: Any) -> str:
    """Return a hash of the code cells, which is stored with the outputs."""
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def smaller(png: str) -> str:
    """Return a figure, as base64 of a PNG, at most WIDTH pixels wide and in as many colours as BYTES allow."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    for colours in (256, 64, 16, 4):
        small = io.BytesIO()
        image.quantize(colours, Image.Quantize.MAXCOVERAGE).save(small, "PNG", optimize=True)
        if small.tell() < BYTES:
            break
    return base64.b64encode(small.getvalue()).decode()


def execute(path: Path) -> Any:
    """Return the notebook with its outputs and the hash of its code.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell that fails.
    """
    import nbformat
    from nbclient import NotebookClient

    # without the switch for short trainings, and without a choice of where figures are shown
    environment = {name: value for name, value in os.environ.items() if name not in ("TVM_FAST", "MPLBACKEND")}
    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": 3600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": HERE}}, **options).execute(env=environment)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
        if cell.cell_type == "code":  # a progress bar that was cleared leaves blanks
            cell.outputs = [output for output in cell.outputs if output.get("text", "a").strip()]
    notebook.metadata.language_info = {"name": "python"}  # not the version of this machine
    notebook.metadata.executed = digest(notebook)
    return notebook


if __name__ == "__main__":
    import nbformat

    for path in sorted(HERE.glob("*.ipynb")):
        if path.stem[:2] in sys.argv[1:] or len(sys.argv) == 1:
            nbformat.write(execute(path), path)
            print(path.stem, flush=True)
