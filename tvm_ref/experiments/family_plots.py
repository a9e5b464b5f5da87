"""Draw the family of objectives: the (t, s) that each one trains, and the direction of its gradient."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tvm_ref.toy.report import plots

COSINES = {  # method: colour, line style
    "TVM": (plots.BLUE, "-"),
    "TVM, exact u": (plots.BLUE, "--"),
    "TVM, JVP detached, exact u": (plots.SKY, "--"),
    "ESD, stops convex": (plots.RED, "-"),
    "ESD, stops convex, exact u": (plots.RED, "--"),
    "ESD, only F learns, exact u": (plots.ORANGE, "--"),
    "PSD, midpoint": (plots.GREEN, "-"),
}


@matplotlib.rc_context(plots.STYLE)
def plot_cosines(measured: dict[str, Any]) -> Figure:
    """Draw the cosine of each method's mean gradient with that of the true error by t - s, a panel per stage."""
    figure, axes = plots.make_figure(len(measured["steps"]), 4.4, plane=False)
    for ax, (step, found) in zip(axes, measured["steps"].items(), strict=True):
        for name, (colour, dash) in COSINES.items():
            cosines = [float("nan") if row["cosine"] is None else row["cosine"] for row in found[name]]
            ax.plot(measured["gaps"], cosines, dash, color=colour, marker="o", ms=4, label=name)
        ax.axhline(0, color="black", lw=0.8)
        ax.set(title=f"step {step}", xlabel="length of the jump, t - s", ylim=(-1.1, 1.2))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("cosine with the gradient\nof the true error")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10)
    return figure


def _median(values: Sequence[float]) -> float:
    return statistics.median(value if math.isfinite(value) else math.inf for value in values)


@matplotlib.rc_context(plots.STYLE)
def plot_comparison(
    rows: Mapping[str, tuple[float, Mapping[int, Sequence[float]]]], families: Mapping[str, str], title: str
) -> Figure:
    """Draw a row per method, the best at one step on top: the cost of a step, and errors in 1, 4 and 64 NFE.

    Args:
        rows: by method, products of a step in plain forwards, and by NFE a paired RMSE per seed.
        families: by method, the name of its family, whose methods share a colour.
        title: the figure's title.
    """
    figure, (left, right) = plots.make_figure(2, plane=False)
    figure.set_size_inches(11, 0.36 * len(rows) + 1.6)
    names = sorted(rows, key=lambda name: _median(rows[name][1][1]), reverse=True)
    colours = dict(zip(dict.fromkeys(families.values()), plots.LINES, strict=False))
    for y, name in enumerate(names):
        cost, errors = rows[name]
        colour = colours[families[name]]
        left.barh(y, cost, color=colour, height=0.6)
        left.text(cost, y, f" {cost:.1f}", va="center", fontsize=10)
        right.hlines(y, min(errors[1]), max(errors[1]), color=colour, lw=5, alpha=0.4)
        for nfe, marker, fill in ((64, "s", "white"), (4, "D", "white"), (1, "o", colour)):
            label = f"{nfe} NFE" if y == 0 else None
            right.scatter(
                _median(errors[nfe]), y, marker=marker, s=50, c=fill, edgecolors=colour, label=label, zorder=3
            )
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="cost of a step, in forwards", xlim=(0, 11))
    right.set_yticks(range(len(names)), [""] * len(names))
    right.set(xscale="log", xlabel="paired RMSE: median, bar: range at 1 NFE", ylim=left.get_ylim())
    right.minorticks_off()
    ticks = [0.05, 0.1, 0.2, 0.5, 1]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.grid(alpha=0.3)
    right.legend(fontsize=10)
    figure.suptitle(title, fontsize=14)
    return figure


def _triangle(ax: Axes, title: str, members: str) -> None:
    """Draw the triangle 0 <= s <= t <= 1, its diagonal, and names."""
    ax.fill([0, 1, 1], [0, 1, 0], color=plots.SKY, alpha=0.12, lw=0)
    ax.plot([0, 1], [0, 1], color=plots.GREEN, lw=4, solid_capstyle="round")
    ax.text(-0.03, 0.03, "s = t: flow matching", rotation=45, ha="left", va="bottom", color=plots.GREEN, fontsize=9)
    ax.set(xlim=(-0.05, 1.12), ylim=(-0.12, 1.12), aspect="equal", xlabel="t, where a jump starts")
    ax.set_xticks([0, 1])
    ax.set_yticks([0, 1])
    ax.set_title(title)
    ax.text(0.5, -0.27, members, transform=ax.transAxes, ha="center", va="top", fontsize=10.5, linespacing=1.5)


def _dot(ax: Axes, t: float, s: float, text: str, place: tuple[float, float], colour: str = "black") -> None:
    ax.plot(t, s, "o", color=colour, ms=9, zorder=3)
    ax.annotate(text, (t, s), xytext=place, textcoords="offset points", color=colour, fontsize=11)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, style: str = "-|>") -> None:
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": style, "color": colour, "lw": 2.2, "shrinkA": 5, "shrinkB": 5}
    )


@matplotlib.rc_context(plots.STYLE)
def plot_family() -> Figure:
    """Draw one panel per identity of the flow map: which (t, s) an objective compares, and how it moves."""
    figure, (lagrangian, eulerian, finite, semigroup) = plots.make_figure(4, 4.2, plane=False)
    figure.set_size_inches(17, 5.6)
    red, blue = plots.RED, plots.BLUE

    _triangle(
        lagrangian, "Lagrangian: the end moves",
        "d/ds X(x, t, s) = u(X, s)\nTVM, LSD: everywhere;  PID: t = 1\none JVP in s, differentiated",
    )  # fmt: skip
    _dot(lagrangian, 0.8, 0.45, "X(x, t, s)", (-70, -24))
    _arrow(lagrangian, (0.8, 0.6), (0.8, 0.2), red)
    _dot(lagrangian, 0.45, 0.45, "u(X, s)", (-52, 8), blue)
    _arrow(lagrangian, (0.77, 0.45), (0.48, 0.45), blue, "<|-|>")
    lagrangian.plot([1, 1], [0, 1], color="black", ls=":", lw=2)
    lagrangian.text(1.02, 0.5, "PID", fontsize=11)
    lagrangian.set_ylabel("s, where it ends")

    _triangle(
        eulerian, "Eulerian: the start moves",
        "d/dt X + (grad X) u = 0\nESD: a model's u;  MeanFlow, sCT: random v;  iMF: both\n"
        "one JVP in (x, t), mostly stopped",
    )  # fmt: skip
    _dot(eulerian, 0.75, 0.3, "X(x, t, s)", (-30, -22))
    _arrow(eulerian, (0.9, 0.3), (0.5, 0.3), red)
    _dot(eulerian, 0.75, 0.75, "u(x, t) or v", (-86, 4), blue)
    _arrow(eulerian, (0.75, 0.33), (0.75, 0.72), blue, "<|-|>")
    eulerian.plot([0, 1], [0, 0], color="black", ls=":", lw=2)
    eulerian.text(0.42, -0.1, "sCT: s = 0", fontsize=11)

    _triangle(
        finite, "Eulerian, by a finite step",
        "X(x_t, t, s) = X(x_t - (t - r) v, r, s)\nalpha-Flow, SoFlow\n"
        "no derivative (alpha-Flow: at first); a bias of order t - r",
    )  # fmt: skip
    _dot(finite, 0.85, 0.25, "X(x, t, s)", (-22, -22))
    _dot(finite, 0.62, 0.25, "X(x_r, r, s)", (-66, -22), blue)
    _arrow(finite, (0.83, 0.25), (0.64, 0.25), red)
    _dot(finite, 0.85, 0.85, "v", (-18, 4), blue)
    _arrow(finite, (0.85, 0.29), (0.85, 0.81), blue, "<|-|>")

    _triangle(
        semigroup, "Semigroup: two jumps make one",
        "X(X(x, t, r), r, s) = X(x, t, s)\nPSD, shortcut, SplitMeanFlow\nno derivative; long jumps from short ones",
    )  # fmt: skip
    _dot(semigroup, 0.85, 0.15, "X(x, t, s)", (-22, -22))
    _dot(semigroup, 0.85, 0.5, "X(x, t, r)", (4, 8), blue)
    _dot(semigroup, 0.5, 0.15, "X(X, r, s)", (-66, -22), blue)
    _arrow(semigroup, (0.85, 0.18), (0.85, 0.47), red, "<|-|>")
    _arrow(semigroup, (0.82, 0.15), (0.53, 0.15), red, "<|-|>")
    for x, y in ((0.85, 0.5), (0.5, 0.15)):
        semigroup.plot([0.5, x], [0.5, y], color="black", ls=":", lw=1)
    return figure
