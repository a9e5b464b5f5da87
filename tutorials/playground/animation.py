"""Animate a run: noise falling through the exact flow in many steps, next to one jump of the model to the same time.

    python tutorials/playground/animation.py runs/toy/moons                      writes runs/toy/moons/animation.gif
    python tutorials/playground/animation.py runs/toy/moons --out moons.gif

On the left every frame goes one step on from the frame before. On the right every frame is one single evaluation of the
network, from the noise to the time s that the frame shows, and s sweeps from 1 to 0.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tvm_ref.cli.errors import require, user_files
from tvm_ref.cli.files import require_suffix
from tvm_ref.cli.options import OneLineParser
from tvm_ref.cli.options import run as run_command
from tvm_ref.cli.progress import progress
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.sampling import sample_path
from tvm_ref.seeding import EVALUATION
from tvm_ref.toy.config import use_one_thread
from tvm_ref.toy.run import load_run

if TYPE_CHECKING:
    from PIL import Image

POINTS = 600
STEPS = 40  # of the left picture: one per frame
FRAME, HOLD = 80, 1200  # milliseconds that a frame stays, and that the first and the last stay
COLOURS = 32  # of the GIF: dots, lines and words need few
TAIL = 6  # steps of the exact flow that a frame still shows
EVERY = 8  # of how many points one's jump is drawn


def paths(run: Path) -> tuple[list[float], Tensor, Tensor]:
    """Return times [S + 1] from 1 to 0, and at each the same noise by the exact flow and by one jump: [S + 1, N, 2].

    Raises:
        UserError, OSError: a folder without a finished run, or one with classes or without jumps.
    """
    config, distribution, model = load_run(run)
    require(not config.conditional, f"{run} is conditioned on classes; this animation shows runs without --conditional")
    learns_jumps = OBJECTIVES[config.objective].learns_jumps
    require(learns_jumps, f"{run} was trained by --objective {config.objective}, which teaches no jumps")
    noise = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(EVALUATION))
    times = [1 - i / STEPS for i in range(STEPS + 1)]
    print(f"carrying {POINTS} points by the exact flow, in {STEPS} steps")
    exact = torch.stack(sample_path(distribution.jump, noise, times))
    start = torch.ones(POINTS)
    with torch.no_grad():
        jumps = torch.stack([model.jump(noise, start, torch.full((POINTS,), s)) for s in times])
    return times, exact, jumps


def draw_frame(times: Sequence[float], exact: Tensor, jumps: Tensor, step: int) -> "Image.Image":
    """Draw one frame: both clouds at times[step]; see `paths` for the arguments."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of CPU, which --help need not wait for
    from matplotlib.collections import LineCollection
    from PIL import Image

    from tvm_ref.toy.report.plots import BLUE, GREY, ORANGE, make_figure, scatter

    figure, axes = make_figure(2, 4.0)
    figure.set_size_inches(8.0, 4.7)
    figure.set_dpi(95)
    figure.set_layout_engine("constrained", h_pad=0.1)
    s = f"from t = 1 to s = {times[step]:.2f}"
    titles = f"exact flow: {step} of {len(times) - 1} small steps\n{s}", f"model: one jump, one evaluation\n{s}"
    notes = f"grey: the last {TAIL} steps", f"grey: where the jump came from (every {EVERY}th point)"
    lines = exact[max(0, step - TAIL) : step + 1].transpose(0, 1), jumps[[0, step], ::EVERY].transpose(0, 1)
    colours = BLUE, ORANGE
    for ax, title, note, cloud, line, colour in zip(axes, titles, notes, (exact, jumps), lines, colours, strict=True):
        ax.set_title(title)
        ax.annotate(note, (0.5, 0), xycoords="axes fraction", ha="center", va="top", fontsize=11, color="#555555")
        ax.add_collection(LineCollection(list(line.numpy()), colors=GREY, linewidths=0.7, alpha=0.6, zorder=0))
        scatter(ax, cloud[step], s=7, c=colour, linewidths=0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def write_gif(frames: Sequence["Image.Image"], out: Path) -> None:
    """Write frames as a GIF that repeats forever; OSError for a file that cannot be written."""
    from PIL import Image

    # one palette for all frames, so that colours do not flicker
    palette = frames[len(frames) // 2].quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [HOLD if i in (0, len(small) - 1) else FRAME for i in range(len(small))]
    partial = out.with_name(out.name + ".partial")
    small[0].save(partial, "GIF", save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)
    partial.replace(out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineParser("python tutorials/playground/animation.py", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="file to write, replaced if it is there (default: RUN/animation.gif)")
    options = parser.parse_args(argv)
    out = options.out or options.run / "animation.gif"
    use_one_thread()
    with parser.errors(), user_files():
        require_suffix(out, ".gif")
        times, exact, jumps = paths(options.run)
        out.parent.mkdir(parents=True, exist_ok=True)
        steps = progress(range(len(times)), desc="drawing", unit="frame", file=sys.stdout)
        write_gif([draw_frame(times, exact, jumps, step) for step in steps], out)
    print(f"{out}: {out.stat().st_size / 1e3:,.0f} kB")
    return 0


if __name__ == "__main__":
    run_command(main)
