"""The frames of the moving picture: noise falling through the exact flow beside one jump, and the file of them."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from PIL import Image
from torch import Tensor

from tvm_ref.toy.report.plots import BLUE, GREY, ORANGE, STYLE, make_figure, scatter

FRAME, HOLD = 80, 1200  # milliseconds that a frame stays, and that the first and the last stay
COLOURS = 32  # of the GIF: dots, lines and words need few
TAIL = 6  # steps of the exact flow that a frame still shows
EVERY = 8  # of how many points one's jump is drawn


@matplotlib.rc_context(STYLE)
def draw_frame(times: Sequence[float], exact: Tensor, jumps: Tensor, step: int) -> Image.Image:
    """Draw one frame: both clouds at times[step]; see animation.paths for the arguments."""
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


def write_gif(frames: Sequence[Image.Image], out: Path) -> None:
    """Write frames as a GIF that repeats forever; OSError for a file that cannot be written."""
    # one palette for all frames, so that colours do not flicker
    palette = frames[len(frames) // 2].quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [HOLD if i in (0, len(small) - 1) else FRAME for i in range(len(small))]
    partial = out.with_name(out.name + ".partial")
    small[0].save(partial, "GIF", save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)
    partial.replace(out)
