"""Execute notebooks in full and renew their pictures: a figure of each goes into tutorials/pictures/.

    python tutorials/render.py        all of them, which takes a while
    python tutorials/render.py 02 04  some

The figure is that of the cell with the tag `gallery`. The site is built by Sphinx (tutorials/site/conf.py).
"""

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIDTH, BYTES = 1000, 100_000  # of a picture, at most


def execute(path: Path) -> Any:
    """Return the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell that fails.
    """
    import nbformat
    from nbclient import NotebookClient

    # without the switch for short trainings, and without a choice of where figures are shown
    environment = {name: value for name, value in os.environ.items() if name not in ("TVM_FAST", "MPLBACKEND")}
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": HERE}}).execute(env=environment)
    return notebook


def figure(notebook: Any) -> bytes:
    """Return the gallery's figure as PNG, at most WIDTH pixels wide, in as many colours as BYTES allow."""
    from PIL import Image

    outputs = [o for cell in notebook.cells if "gallery" in cell.metadata.get("tags", []) for o in cell.outputs]
    (png,) = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    for colours in (256, 64, 16, 4):
        small = io.BytesIO()
        image.quantize(colours, Image.Quantize.MAXCOVERAGE).save(small, "PNG", optimize=True)
        if small.tell() < BYTES:
            break
    return small.getvalue()


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        if path.stem[:2] in sys.argv[1:] or len(sys.argv) == 1:
            (HERE / "pictures" / f"{path.stem}.png").write_bytes(figure(execute(path)))
            print(path.stem, flush=True)
