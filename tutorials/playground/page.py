"""Write a page to play with: a trained model and the exact flow in one HTML file, which opens by double click.

    python tutorials/playground/page.py runs/toy/moons                       writes runs/toy/moons/page.html
    python tutorials/playground/page.py runs/toy/moons runs/toy/moons-fm     several runs on the same data, to compare
    python tutorials/playground/page.py runs/toy/points --out points.html    your own points, from tvm_ref.toy --data

The page needs nothing else: no server, no network, no Python. It holds the weights (at the end of training and at a few
earlier steps) and computes jumps, their derivatives and the exact flow itself, as tests compare with PyTorch.
"""

import base64
import html
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvm_ref.cli.errors import UserError, require, user_files
from tvm_ref.cli.files import require_suffix, write_atomically
from tvm_ref.cli.options import OneLineParser
from tvm_ref.cli.options import run as run_command
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.seeding import EVALUATION
from tvm_ref.toy.config import use_one_thread
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.run import load_run, load_snapshots, read_config, steps_done

PARTS = Path(__file__).parent / "web"  # the page, its style and its scripts
POINTS = 512  # noise points; a page computes all of them for every frame
START = (1.5, 1.6)  # the noise of the point that is followed at first


def encode(numbers: Tensor) -> str:
    """Base64 of numbers as little-endian float32."""
    return base64.b64encode(numbers.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def flatten(weights: dict[str, Tensor], depth: int) -> Tensor:
    """List a ToyNetwork's numbers as model.js takes them: the projection, then each layer's weight and bias."""
    layers = [*(f"hidden.{i}" for i in range(depth)), "output"]
    names = ["projection", *(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))]
    return torch.cat([weights[name].flatten() for name in names])


def describe_run(folder: Path, blobs: list[str]) -> tuple[GaussianMixture, dict[str, Any]]:
    """Describe a run's data, and what the page holds of the run; weights that `blobs` lacks are added to it.

    Raises:
        ValueError, OSError: a folder without a finished run, or one that is conditioned on classes.
    """
    config, distribution, model = load_run(folder)
    require(not config.conditional, f"{folder} is conditioned on classes; this page shows runs without --conditional")
    done = steps_done(folder)
    done = config.steps if done is None else done
    snapshots = {step: weights for step, weights in load_snapshots(folder).items() if step < done}
    snapshots[done] = model.network.state_dict()
    method = OBJECTIVES[config.objective].method
    entries = []
    for step, weights in snapshots.items():
        blob = encode(flatten(weights, config.depth))
        if blob not in blobs:
            blobs.append(blob)
        entries.append({"step": step, "weights": blobs.index(blob)})
    return distribution, {
        "folder": folder.name,
        "objective": config.objective,
        "name": method.title + (" (detached)" if config.settings.get("detach_jvp") else ""),
        "help": method.summary,
        "learns_jumps": OBJECTIVES[config.objective].learns_jumps,
        "width": config.width,
        "depth": config.depth,
        "steps": config.steps,
        "snapshots": entries,
    }


def make_page(folders: list[Path]) -> str:
    """Write the page of one or more runs on the same data, as HTML.

    Raises:
        ValueError, OSError: see describe_run; runs on different data.
    """
    blobs: list[str] = []
    distributions, runs = zip(*(describe_run(folder, blobs) for folder in folders), strict=True)
    for folder, distribution in zip(folders, distributions, strict=True):
        if not torch.equal(distribution.centres, distributions[0].centres):
            raise UserError(f"{folder} and {folders[0]} were trained on different data; a page shows one")
    if len({run["name"] for run in runs}) < len(runs):
        for run in runs:
            run["name"] += f": {run['folder']}"
    distribution = distributions[0]
    data = {
        "sigma": distribution.sigma,
        "centres": encode(torch.cat([distribution.centres, distribution.log_weights[:, None]], dim=1)),
        "noise": encode(torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(EVALUATION))),
        "start": START,
        "runs": runs,
        "weights": blobs,
    }
    page, config = (PARTS / "page.html").read_text(encoding="utf-8"), read_config(folders[0])
    parts = {
        "name": html.escape(Path(config.data).stem if config.data is not None else config.dist.replace("_", " ")),
        "points": str(POINTS),
        **{p.name: p.read_text(encoding="utf-8") for p in PARTS.iterdir() if p.suffix in (".css", ".js")},
        "data": json.dumps(data).replace("<", "\\u003c"),  # a name must not open or end a script
    }
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineParser("python tutorials/playground/page.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs on the same data")
    parser.add_argument("--out", type=Path, help="file to write, replaced if it is there (default: RUN/page.html)")
    options = parser.parse_args(argv)
    out = options.out or options.runs[0] / "page.html"
    use_one_thread()
    with parser.errors(), user_files():
        require_suffix(out, ".html")
        page = make_page(options.runs)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    print(f"{out}: {len(page.encode()) / 1e3:,.0f} kB; open it in a browser")
    return 0


if __name__ == "__main__":
    run_command(main)
