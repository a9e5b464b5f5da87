"""Draw the bound: its terms over time, the chain, and the chain over training."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tvm_ref.bound.chain import LABELS, TERMS, Bound, one_sided_rate, two_sided_rate
from tvm_ref.bound.paths import displacement_error, flow_matching_residual, terminal_velocity_residual
from tvm_ref.toy.report.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, make_figure

COLOURS = dict(zip(TERMS, ("#000000", BLUE, SKY, RED, GREEN, ORANGE, PINK, GREY), strict=True))


def plot_bound(bound: Bound, title: str) -> Figure:
    """Draw residuals and errors over s, growth rates over s, and the chain from its smallest term up.

    Time runs as the bound is integrated, from noise on the left to data.
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


def plot_training(records: list[dict[str, Any]], correlations: dict[str, float], title: str) -> Figure:
    """Draw W2, displacement and bounds over training; the loss over training, with the rank correlations."""
    figure, (left, right) = make_figure(2, 5.2, plane=False)
    figure.set_size_inches(13, 5.2)
    figure.suptitle(f"{title}: the bound over training", fontsize=16)
    steps = [record["step"] for record in records]
    for name in TERMS[:-1]:
        left.plot(steps, [record[name] for record in records], color=COLOURS[name], label=LABELS[name], marker=".")
    left.set(xscale="log", yscale="log", xlabel="training step", ylabel="distance")
    left.set_title("the chain")
    w2 = [record["w2"] for record in records]
    for name, label, colour in (
        ("training_loss", "loss as trained (EMA target)", BLUE),
        ("loss", "TVM loss, eq. 9, mean over s", ORANGE),
    ):
        values = [record[name] for record in records]
        right.scatter(values, w2, color=colour, label=f"{label}\nrank correlation with W2: {correlations[name]:.2f}")
    right.set(xlabel="loss", ylabel="W2", yscale="log")
    right.set_title("does lowering the loss lower W2?")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend(fontsize=10, loc="upper left")
    right.legend(fontsize=10, loc="lower right")
    return figure
