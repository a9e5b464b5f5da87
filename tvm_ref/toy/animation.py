"""Animate a run: noise falling through the exact flow in many steps, beside one jump of the model to the same time.

    python -m tvm_ref.toy.animation runs/toy/moons                      writes runs/toy/moons/animation.gif
    python -m tvm_ref.toy.animation runs/toy/moons --out moons.gif

On the left every frame goes one step on from the frame before. On the right every frame is one single evaluation of the
network, from the noise to the time s that the frame shows, and s sweeps from 1 to 0.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from PIL import Image
from torch import Tensor

from tvm_ref.command_line import OneLineParser
from tvm_ref.command_line import run as run_command
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.sampling import sample_path
from tvm_ref.toy.config import use_one_thread
from tvm_ref.toy.plots import BLUE, GREY, ORANGE, STYLE, make_figure, scatter
from tvm_ref.toy.run import load_run

POINTS = 600
STEPS = 40  # of the left picture: one per frame
FRAME, HOLD = 80, 1200  # milliseconds that a frame stays, and that the first and the last stay
COLOURS = 32  # of the GIF: dots, lines and words need few


def paths(run: Path) -> tuple[list[float], Tensor, Tensor]:
    """Times [S + 1] from 1 to 0, and at each the same noise by the exact flow and by one jump: [S + 1, N, 2].

    Raises:
        ValueError, OSError: a folder without a finished run, or one with classes or without jumps.
    """
    config, distribution, model = load_run(run)
    if config.conditional:
        raise ValueError(f"{run} is conditioned on classes; this animation shows runs without --conditional")
    if not OBJECTIVES[config.objective].learns_jumps:
        raise ValueError(f"{run} was trained by --objective {config.objective}, which teaches no jumps")
    noise = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(2**40))
    times = [1 - i / STEPS for i in range(STEPS + 1)]
    exact = torch.stack(sample_path(distribution.jump, noise, times))
    start = torch.ones(POINTS)
    with torch.no_grad():
        jumps = torch.stack([model.jump(noise, start, torch.full((POINTS,), s)) for s in times])
    return times, exact, jumps


@matplotlib.rc_context(STYLE)
def draw_frame(times: list[float], exact: Tensor, jumps: Tensor, step: int) -> Image.Image:
    """Draw one frame: both clouds at times[step]."""
    figure, axes = make_figure(2, 4.0)
    figure.set_dpi(85)
    titles = f"exact flow: step {step} of {STEPS}", f"model: one jump to time {times[step]:.2f}"
    # tails of the last steps on the left; on the right, for some points, the straight way that the jump skips
    lines = exact[max(0, step - 6) : step + 1].transpose(0, 1), jumps[[0, step], ::8].transpose(0, 1)
    for ax, title, cloud, line, colour in zip(axes, titles, (exact, jumps), lines, (BLUE, ORANGE), strict=True):
        ax.set_title(title)
        ax.add_collection(LineCollection(list(line.numpy()), colors=GREY, linewidths=0.7, alpha=0.6, zorder=0))
        scatter(ax, cloud[step], s=7, c=colour, linewidths=0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def animate(run: Path, out: Path) -> None:
    """Write the animation of a run as a GIF that repeats forever.

    Raises:
        ValueError, OSError: see paths; a file that cannot be written.
    """
    times, exact, jumps = paths(run)
    frames = [draw_frame(times, exact, jumps, step) for step in range(len(times))]
    # one palette for all frames, so that colours do not flicker
    palette = frames[len(frames) // 2].quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [HOLD if i in (0, len(small) - 1) else FRAME for i in range(len(small))]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    small[0].save(partial, "GIF", save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)
    partial.replace(out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = OneLineParser("python -m tvm_ref.toy.animation", __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="file to write, replaced if it is there (default: RUN/animation.gif)")
    options = parser.parse_args(argv)
    out = options.out or options.run / "animation.gif"
    use_one_thread()
    with parser.bad_input():
        animate(options.run, out)
    print(f"{out}: {out.stat().st_size / 1e3:,.0f} kB")
    return 0


if __name__ == "__main__":
    run_command(main)
