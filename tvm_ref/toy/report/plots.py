"""The pictures of a run, as figures: samples, trajectories, losses (map_plot.py: the map).

A model that learned no jumps is given as an EulerStep, and is shown with several Euler steps.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tvm_ref.exact_flow import exact_path
from tvm_ref.guidance import Condition
from tvm_ref.sampling import EulerStep, Jump, sample, sample_path
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.points import OwnPoints, units_of
from tvm_ref.toy.report.metrics import EULER_STEPS, Reference, exact_samples

# Okabe and Ito's palette, distinguishable with every common colour blindness
BLUE, ORANGE, GREEN, PINK, SKY, GREY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#D55E00"
CLASSES = (BLUE, ORANGE, GREEN, PINK, SKY, GREY, RED, "#000000")
LINES = (BLUE, SKY, RED, PINK, GREEN, GREY, ORANGE, "#000000")
EXTENT = 2.6  # half width of the window in 2D; data have unit variance
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 120,
    "savefig.bbox": "tight",
}


def make_figure(columns: int, size: float = 4.0, *, plane: bool = True) -> tuple[Figure, list[Axes]]:
    """Make a row of panels in the project's style; `plane` panels show the window of the data without axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size * columns, size), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
    if plane:
        for ax in axes:
            ax.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal")
            ax.set_axis_off()
    return figure, list(axes)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)


def scatter(ax: Axes, x: Tensor, **options: Any) -> None:
    """Draw points x [N, 2]."""
    ax.scatter(x[:, 0].numpy(), x[:, 1].numpy(), **options)


def dot_size(x: Tensor) -> float:
    """Choose the area of the dots of a cloud [N, 2], so that few are visible and many do not merge."""
    return min(40.0, max(4.0, 4.0 * math.sqrt(4000 / len(x))))


def name_steps(jump: Jump, steps: int) -> str:
    """Name a number of steps of a model."""
    return f"{steps} {'Euler ' if isinstance(jump, EulerStep) else ''}step{'s' if steps > 1 else ''}"


def name_data(reference: Reference) -> str:
    """Name the points that are drawn next to a model's: with guidance they are the exact guided flow's, not data."""
    if reference.condition is not None and reference.guided:
        return f"samples of the exact flow, w = {1 / float(reference.condition.beta[0]):g}"
    return "your points, blurred" if isinstance(reference.distribution, OwnPoints) else "data"


def colours_of(condition: Condition | None, n: int) -> list[str]:
    """Choose the colours of n points: by class, if there are any."""
    return [BLUE] * n if condition is None else [CLASSES[c % len(CLASSES)] for c in condition.label.tolist()]


def set_window(axes: Sequence[Axes], *clouds: Tensor) -> None:
    """Widen the window of some panels to show all but the outermost 0.5 % of the points of each cloud [N, 2]."""
    far = max(float(x.double().abs().amax(1).quantile(0.995)) for x in clouds)
    extent = max(EXTENT, 1.05 * far)
    for ax in axes:
        ax.set(xlim=(-extent, extent), ylim=(-extent, extent))


@matplotlib.rc_context(STYLE)
def plot_samples(
    distribution: GaussianMixture,
    jump: Jump,
    reference: Reference,
    nfes: Sequence[int] | None = None,
    points: int = 4000,
) -> Figure:
    """Draw noise, data and samples of the model, classes in colour; with guidance, the exact flow instead of data.

    Own points are drawn as they are, and all in their own units. By default in 1, 2 and 4 steps, or in 1, 8 and 64
    Euler steps.
    """
    if nfes is None:
        nfes = (1, 8, EULER_STEPS) if isinstance(jump, EulerStep) else (1, 2, 4)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(points, distribution.dim, generator=generator)
    data, label = distribution.sample(points, generator)
    name, condition = "data", None
    if reference.condition is not None:
        condition = Condition(label, reference.condition.beta[:1].expand(points))
    if condition is not None and reference.guided:
        data = exact_samples(distribution, noise, condition)
        name = f"exact flow, w = {1 / float(condition.beta[0]):g}"
    if isinstance(distribution, OwnPoints):
        name, data = f"your {len(distribution.centres):,} points", distribution.centres
    panels = {"noise": noise, name: data}
    panels |= {f"model, {name_steps(jump, n)}": sample(jump, noise, n, condition) for n in nfes}
    figure, axes = make_figure(len(panels), 3.6)
    set_window(axes[1:], data)
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        ax.set_title(title)
        if ax is not axes[0]:
            use_units(ax, distribution)
            x = units_of(distribution).restore(x)
        scatter(ax, x, s=dot_size(x), c=colours_of(condition, len(x)), alpha=0.5, linewidths=0, rasterized=True)
    if condition is not None:
        for c in range(distribution.num_classes):
            axes[1].scatter([], [], s=25, color=CLASSES[c % len(CLASSES)], label=f"class {c}")
        axes[1].legend(loc="lower left", fontsize=9, ncols=2, handletextpad=0, columnspacing=0.5)
    return figure


def use_units(ax: Axes, distribution: GaussianMixture) -> None:
    """Turn a panel of own points, standardised, into one in their own units, with its axes; leave others."""
    if not isinstance(distribution, OwnPoints):
        return
    corners = units_of(distribution).restore(torch.tensor([*zip(ax.get_xlim(), ax.get_ylim(), strict=True)]))
    ax.set(aspect="auto", box_aspect=1, xlim=corners[:, 0].tolist(), ylim=corners[:, 1].tolist())
    ax.set_axis_on()
    ax.tick_params(labelsize=8)
    for axis, column in zip((ax.xaxis, ax.yaxis), units_of(distribution).columns, strict=True):
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axis.set_label_text(column, fontsize=9)


@matplotlib.rc_context(STYLE)
def plot_trajectories(distribution: GaussianMixture, jump: Jump, reference: Reference) -> Figure:
    """Draw paths from noise to data: the exact flow, and the model's jumps from t = 1 to every s, with the exact ends.

    An EulerStep's path is a chain of 64 small steps.
    """
    grid, condition = torch.linspace(1, 0, 65), reference.condition
    inside = (reference.noise.abs() < 0.95 * EXTENT).all(1).nonzero().flatten()[:40]
    noise, n = reference.noise[inside].float(), len(inside)
    # every path at every time in one batch, ordered by time: [65 * n, 2]
    x1, s = noise.repeat(len(grid), 1), grid.repeat_interleave(n)
    many = None if condition is None else Condition(*(a[inside].repeat(len(grid)) for a in condition))
    first = None if condition is None else Condition(*(a[inside] for a in condition))
    exact = exact_path(distribution, noise.double(), grid.double().flip(0), distribution.time_scale, first).flip(0)
    panels = {"exact flow": exact}
    if isinstance(jump, EulerStep):
        panels[f"model: {EULER_STEPS} Euler steps"] = torch.stack(sample_path(jump, noise, grid.tolist(), first))
    else:
        with torch.no_grad():
            panels["model: one jump from t = 1 to each s"] = jump(x1, torch.ones(len(x1)), s, many).view(-1, n, 2)
    figure, axes = make_figure(2, 5.0)
    set_window(axes, reference.data)
    colours = colours_of(first, n)
    restore = units_of(distribution).restore
    data = restore(reference.data)
    for ax, (title, path_states) in zip(axes, panels.items(), strict=True):
        use_units(ax, distribution)
        states = restore(path_states)
        scatter(ax, data, s=dot_size(data), c=GREY, alpha=0.4, linewidths=0, label=name_data(reference))
        for path, colour in zip(states.transpose(0, 1), colours, strict=True):
            ax.plot(*path.T.numpy(), color=colour, lw=1, alpha=0.7)
        scatter(ax, states[0], s=18, c="white", edgecolors=colours, zorder=3, label="noise (t = 1)")
        scatter(ax, states[-1], s=18, c=colours, zorder=3, label="end (t = 0)")
        ax.set_title(title)
    circles = {"c": "none", "edgecolors": "black", "linewidths": 0.8, "zorder": 4}
    scatter(axes[1], restore(exact[-1]), s=60, label="end of the exact flow", **circles)
    figure.set_size_inches(10, 5.5)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=11)
    return figure


@matplotlib.rc_context(STYLE)
def plot_losses(log: Sequence[dict[str, float]], least: float | None = None) -> Figure:
    """Draw the terms of the objective over the steps, as the lines of train.jsonl have them.

    A jump term may rise at first: the untrained network is the exact flow map of Gaussian data, whose jumps fit its
    velocity.

    Args:
        log: the lines, each the mean of some steps.
        least: the flow-matching loss of the exact velocity, below which none falls in expectation.
    """
    panels = {"jump": "jump term", "flow_matching": "flow-matching term"}
    shown = [key for key in panels if any(line[key] for line in log)] or list(panels)
    figure, axes = make_figure(len(shown), 4.5, plane=False)
    figure.set_size_inches(6 * len(shown), 4)
    for ax, key in zip(axes, shown, strict=True):
        values = [line[key] for line in log]
        ax.plot([line["step"] for line in log], values, color=BLUE, marker="o" if len(log) < 5 else "")
        ax.set(xlabel="step", ylabel="loss per dimension", title=panels[key])
        ax.grid(alpha=0.3)
        if key == "jump":
            ax.set_ylim(bottom=0)
        elif least is not None:
            ax.axhline(least, color=ORANGE, ls="--")
            figure.supxlabel("Dashed: the loss of the exact velocity; none is lower on average.", fontsize=11)
    return figure
