"""The pictures of a run, as figures: samples, trajectories, the one-step map as a deformed grid, losses."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tvm_ref.guidance import Condition
from tvm_ref.sampling import Jump, sample, sample_path
from tvm_ref.toy.metrics import Reference
from tvm_ref.toy.mixture import GaussianMixture, exact_path

# Okabe and Ito's palette, told apart with every common colour blindness
BLUE, ORANGE, GREEN, PINK, SKY, GREY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#D55E00"
MAP_STEPS = 32  # of the exact flow in pictures: an error below a line's width
EXTENT = 2.6  # half width of the window on the plane; data have unit variance
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


def _ones(x: Tensor, value: float = 1.0) -> Tensor:
    return x.new_full((len(x),), value)


@matplotlib.rc_context(STYLE)
def plot_samples(
    distribution: GaussianMixture,
    jump: Jump,
    reference: Reference,
    nfes: Sequence[int] = (1, 2, 4),
    points: int = 4000,
) -> Figure:
    """Draw data beside samples of the model, classes in colour; with guidance, the exact guided flow for data."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(points, distribution.dim, generator=generator)
    data, label = distribution.sample(points, generator)
    condition = None
    if reference.condition is not None:
        condition = Condition(label, reference.condition.beta[:1].expand(points))
    panels = {"data": data}
    if condition is not None and reference.guided:
        exact = distribution.jump(noise, _ones(noise), _ones(noise, 0.0), condition)
        panels = {f"exact flow, w = {1 / float(condition.beta[0]):g}": exact}
    panels |= {f"model, {n} step{'s' if n > 1 else ''}": sample(jump, noise, n, condition) for n in nfes}
    figure, axes = make_figure(len(panels))
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        colours = [BLUE, ORANGE, GREEN, PINK, SKY, GREY, "#D55E00", "#000000"]
        c = BLUE if condition is None else np.array(colours)[condition.label % len(colours)]
        scatter(ax, x, s=4, c=c, alpha=0.5, linewidths=0, rasterized=True)
        ax.set_title(title)
    return figure


@matplotlib.rc_context(STYLE)
def plot_trajectories(
    distribution: GaussianMixture, jump: Jump, reference: Reference, *, one_jump: bool = True
) -> Figure:
    """Draw paths from noise to data: the exact flow, and the model's jumps from t = 1 to every s.

    Without `one_jump` (a model that knows only its velocity) the model's path is a chain of 64 small steps.
    """
    grid, condition = torch.linspace(1, 0, 65), reference.condition
    inside = (reference.noise.abs() < 0.95 * EXTENT).all(1).nonzero().flatten()[:40]
    noise, n = reference.noise[inside].float(), len(inside)
    # every path at every time in one batch, ordered by time: [65 * n, 2]
    x1, s = noise.repeat(len(grid), 1), grid.repeat_interleave(n)
    many = None if condition is None else Condition(*(a[inside].repeat(len(grid)) for a in condition))
    first = None if condition is None else Condition(*(a[inside] for a in condition))
    exact = exact_path(distribution, noise.double(), grid.double().flip(0), distribution.time_scale, first)
    panels = {"exact flow": exact.flip(0)}
    if one_jump:
        with torch.no_grad():
            panels["model: one jump from t = 1 to each s"] = jump(x1, _ones(x1), s, many).view(-1, n, 2)
    else:
        panels["model: 64 Euler steps"] = torch.stack(sample_path(jump, noise, grid.tolist(), first))
    data = reference.data
    figure, axes = make_figure(2, 5.0)
    for ax, (title, states) in zip(axes, panels.items(), strict=True):
        scatter(ax, data, s=3, c=GREY, alpha=0.25, linewidths=0)
        ax.plot(states[:, :, 0].numpy(), states[:, :, 1].numpy(), color=BLUE, lw=1, alpha=0.7)
        scatter(ax, states[0], s=18, c="white", edgecolors=BLUE, zorder=3, label="noise (t = 1)")
        scatter(ax, states[-1], s=18, c=ORANGE, zorder=3, label="end (t = 0)")
        ax.set_title(title)
    axes[0].legend(loc="upper left", fontsize=11)
    return figure


@matplotlib.rc_context(STYLE)
def plot_map(distribution: GaussianMixture, jump: Jump, reference: Reference, nfe: int = 1) -> Figure:
    """Draw a polar grid on the noise, and where the exact flow map and the model carry it."""
    radii, lines = [0.5, 1.0, 1.5, 2.0, 2.5], 24
    angle = torch.linspace(0, 2 * torch.pi, 241)
    rings = [r * torch.stack([angle.cos(), angle.sin()], -1) for r in radii]
    spokes = [
        torch.linspace(0.02, radii[-1], 61)[:, None] * torch.tensor([np.cos(a), np.sin(a)], dtype=torch.float32)
        for a in 2 * np.pi * np.arange(lines) / lines
    ]
    curves = spokes + rings
    x1 = torch.cat(curves)
    condition = None
    if reference.condition is not None:  # the map of the first class
        condition = Condition(torch.zeros(len(x1), dtype=torch.long), reference.condition.beta[:1].expand(len(x1)))
    z = torch.linspace(0, math.asinh(1 / distribution.time_scale), MAP_STEPS + 1, dtype=torch.float64)
    times = (distribution.time_scale * z.sinh()).clamp(0, 1)
    exact = exact_path(distribution, x1.double(), times, distribution.time_scale, condition)[0]
    of_class = "" if condition is None else ", class 0"
    panels = {
        "noise": x1,
        f"exact flow map{of_class}": exact,
        f"model, {nfe} step{'s' if nfe > 1 else ''}{of_class}": sample(jump, x1, nfe, condition),
    }
    hues = matplotlib.colormaps["twilight"](np.linspace(0, 1, lines, endpoint=False))
    figure, axes = make_figure(3, 4.5)
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        pieces = x.split([len(c) for c in curves])
        for piece, hue in zip(pieces[:lines], hues, strict=True):
            ax.plot(*piece.T.numpy(), color=hue, lw=1.2)
        for piece in pieces[lines:]:
            ax.plot(*piece.T.numpy(), color="black", lw=0.8, alpha=0.7)
        ax.set_title(title)
    return figure


@matplotlib.rc_context(STYLE)
def plot_losses(log: Sequence[dict[str, float]], minimum: float) -> Figure:
    """Draw the terms of the objective over the steps, as the lines of train.jsonl have them.

    `minimum` is the flow-matching loss of the exact velocity, below which none falls in expectation.
    """
    panels = {"jump": "jump term", "flow_matching": "flow-matching term"}
    shown = [key for key in panels if any(line[key] for line in log)] or list(panels)
    figure, axes = make_figure(len(shown), 4.5, plane=False)
    figure.set_size_inches(6 * len(shown), 4)
    for ax, key in zip(axes, shown, strict=True):
        ax.plot(
            [line["step"] for line in log], [line[key] for line in log], color=BLUE, marker="o" if len(log) < 5 else ""
        )
        ax.set(xlabel="step", ylabel="loss per dimension", title=panels[key])
        ax.grid(alpha=0.3)
        if key == "jump":
            ax.set_yscale("log")
        else:
            ax.axhline(minimum, color=ORANGE, ls="--", label="loss of the exact velocity")
            ax.legend()
    return figure


@matplotlib.rc_context(STYLE)
def plot_errors(errors: Mapping[str, Sequence[Sequence[float]]], nfes: Sequence[int], title: str) -> Figure:
    """Draw each method's error against NFE: median and range over seeds.

    `errors` holds, by method and NFE, a paired RMSE per seed.
    """
    figure, (ax,) = make_figure(1, plane=False)
    figure.set_size_inches(9, 6)
    styles = zip("os^DvPX*<>hdp", 2 * (BLUE, SKY, PINK, GREEN, ORANGE, GREY, RED), strict=False)
    for (name, values), (marker, colour) in zip(errors.items(), styles, strict=False):
        ax.plot(nfes, [statistics.median(v) for v in values], marker=marker, color=colour, label=name)
        ax.fill_between(nfes, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
    ax.set(xscale="log", yscale="log", xlabel="function evaluations (NFE)", ylabel="paired RMSE to the exact flow map")
    ax.set_xticks(nfes, [str(n) for n in nfes])
    ax.minorticks_off()
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.grid(alpha=0.3)
    ax.set_title(title)
    ax.legend(fontsize=10, ncols=2)
    return figure
