"""Draw the bound: its terms over time, the chain, and the chain over training."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tvm_ref.bound import other_bounds
from tvm_ref.bound.chain import LABELS, TERMS, Bound, one_sided_rate, two_sided_rate
from tvm_ref.bound.paths import displacement_error, flow_matching_residual, terminal_velocity_residual
from tvm_ref.toy.report.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE, make_figure

COLOURS = dict(zip(TERMS, ("#000000", BLUE, SKY, RED, GREEN, ORANGE, PINK, GREY), strict=True))
TOP = 30.0  # of the distances drawn over training; what is above throughout is named with its least value
OVER_TRAINING = {  # term: label, colour, line style
    "global": (LABELS["global"], PINK, "-"),
    "lagrangian": (other_bounds.LABELS["lagrangian"], GREY, "-"),
    "mean_flow": (other_bounds.LABELS["mean_flow"], ORANGE, "-"),
    "pathwise_one_sided": (LABELS["pathwise_one_sided"], GREEN, "-"),
    "eulerian": (other_bounds.LABELS["eulerian"], RED, "--"),
    "mean_square": (LABELS["mean_square"], RED, "-"),
    "terminal_velocity": (LABELS["terminal_velocity"], SKY, "-"),
    "displacement": (LABELS["displacement"], BLUE, "-"),
    "w2": (LABELS["w2"], "black", "-"),
}


def plot_bound(bound: Bound, title: str) -> Figure:
    """Draw residuals and errors over s, growth rates over s, and the chain from its smallest term up.

    Time runs from noise on the left to data on the right.
    """
    figure, (left, middle, right) = make_figure(3, 5.2, plane=False)
    figure.suptitle(f"{title}: the 2-Wasserstein bound, t = {bound.t:g}", fontsize=16)
    paths = bound.paths
    residuals = {
        "a: terminal velocity residual": (terminal_velocity_residual(paths), BLUE),
        "b: flow-matching residual": (flow_matching_residual(paths), ORANGE),
        "e: displacement error": (displacement_error(paths), GREEN),
    }
    _curves(left, bound, {name: (a.square().mean(1).sqrt(), colour) for name, (a, colour) in residuals.items()})
    left.set(ylabel="RMS over points", ylim=(0, None), title="residuals and error")
    rates = {
        "L: largest found": (bound.lipschitz, PINK),
        "two-sided, mean over points": (two_sided_rate(paths).mean(1), ORANGE),
        "one-sided m, mean over points": (one_sided_rate(paths).mean(1), GREEN),
    }
    _curves(middle, bound, rates)
    middle.axhline(0, color="black", lw=0.8)
    middle.set(ylabel="growth rate of the error", title="rates")
    middle.set_yscale("symlog", linthresh=1)
    middle.yaxis.set_major_formatter("{x:g}")  # -1, 0 and 1, not -10^0, 0 and 10^0
    middle.set_ylim(top=30 * max(1.0, float(bound.lipschitz.max())))  # room for the legend
    for ax in (left, middle):
        ax.set_xlim(bound.t, 0)
        ax.set_xlabel("time s, from noise to data")
    names = sorted(TERMS, key=bound.values.__getitem__, reverse=True)
    values = [bound.values[name] for name in names]
    right.hlines(range(len(names)), 0, 1, transform=right.get_yaxis_transform(), color=GREY, lw=0.5, alpha=0.5)
    right.scatter(values, range(len(names)), s=60, color=[COLOURS[name] for name in names], zorder=3)
    for i, value in enumerate(values):
        right.annotate(f"{value:.3g}", (value, i), (8, 4), textcoords="offset points", fontsize=11)
    positive = [value for value in values if value > 0] or [1.0]
    right.set(xscale="log", xlim=(min(positive) / 3, max(positive) * (max(positive) / min(positive)) ** 0.25 * 3))
    right.set_ylim(-0.5, len(names) - 0.3)
    right.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=11)
    right.set_xlabel("distance, in standard deviations of the data (logarithmic)")
    right.set_title("the chain, from its least link up")
    return figure


def _curves(ax: Axes, bound: Bound, curves: dict[str, tuple[Tensor, str]]) -> None:
    """Draw curves [S] over s, each with its colour."""
    for label, (values, colour) in curves.items():
        ax.plot(bound.paths.s.numpy(), values.numpy(), color=colour, label=label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=11, loc="upper left")


@matplotlib.rc_context(STYLE)
def plot_training(report: dict[str, dict[str, Any]]) -> Figure:
    """Draw a row per distribution: W2 and its bounds over training; int L of the model and of the exact field."""
    figure = Figure(figsize=(11, 3.8 * len(report)), layout="constrained")
    axes = figure.subplots(len(report), 2, squeeze=False)
    for (left, right), (name, found) in zip(axes, report.items(), strict=True):
        records, plane = found["records"], found["plane"]
        steps = [record["step"] for record in records]
        for term, (label, colour, style) in OVER_TRAINING.items():
            values = [record[term] for record in records]
            above = f" (from {min(values):.0g})" if min(values) > TOP else ""
            left.plot(steps, values, style, color=colour, label=label + above, marker=".")
        for term, label, colour in (
            ("path_lipschitz", f"the model's, over {found['looked_at']:,} points", PINK),
            ("exact_lipschitz", "of the exact field, over the same points", BLUE),
        ):
            right.plot(steps, [record[term] for record in records], color=colour, label=label, marker=".")
        label = f"of the exact field, over {plane['points']:,} points of the plane"
        right.axhline(plane["length"], color=BLUE, ls="--", label=label)
        least = min(record["w2"] for record in records)
        left.set(yscale="log", ylim=(0.7 * least, TOP), ylabel="distance", title=f"{name}: W2 and its bounds")
        right.set(ylim=(0, 1.4 * plane["length"]), ylabel="int L(s) ds", title=f"{name}: theorem 1 has exp(int L)")
        for ax in (left, right):
            ax.set(xscale="log", xlabel="training step")
            ax.grid(alpha=0.3)
        right.legend(fontsize=10, loc="upper left")
        left.legend(fontsize=8, loc="upper left", ncols=2)
    return figure
