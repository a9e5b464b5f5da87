"""The picture of a map: a polar grid on the noise, and where the exact flow and a model carry it."""

from collections.abc import Callable

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tvm_ref.guidance import Condition
from tvm_ref.sampling import EulerStep, Jump, sample
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.points import OwnPoints, units_of
from tvm_ref.toy.report.metrics import EULER_STEPS, Reference, exact_samples
from tvm_ref.toy.report.plots import (
    GREY,
    STYLE,
    dot_size,
    make_figure,
    name_data,
    name_steps,
    scatter,
    set_window,
    use_units,
)

RADII, RAYS = (0.5, 1.0, 1.5, 2.0, 2.5), 24
GAP = 0.05  # between neighbouring points of a line, at most; data have unit variance
HALVINGS, MOST = 12, 30_000  # of a piece of a line, and points in all; a map may tear more than lines can show


@matplotlib.rc_context(STYLE)
def plot_map(distribution: GaussianMixture, jump: Jump, reference: Reference) -> Figure:
    """Draw a polar grid on the noise, and where the exact flow map and the model carry it in one step.

    An EulerStep is shown in 64 steps, and a conditional model with the first class.
    """
    steps = EULER_STEPS if isinstance(jump, EulerStep) else 1

    def carry(x1: Tensor) -> Tensor:
        """Carry noise [N, 2] by the exact flow and by the model: [2, N, 2]."""
        condition = None
        if reference.condition is not None:
            condition = Condition(torch.zeros(len(x1), dtype=torch.long), reference.condition.beta[:1].expand(len(x1)))
        exact = exact_samples(distribution, x1, condition)
        return torch.stack([exact, sample(jump, x1.float(), steps, condition).double()])

    lines, (exact, model) = follow(polar_grid(), carry)
    data, grey, of_class = reference.data, name_data(reference), ""
    if reference.condition is not None:
        data, of_class = data[reference.condition.label == 0], ", class 0"
    panels = {
        "noise: rays and rings": cartesian(torch.cat(lines)),
        f"carried by the exact flow{of_class}": exact,
        f"carried by the model, {name_steps(jump, steps)}{of_class}": model,
    }
    hues = matplotlib.colors.hsv_to_rgb([(i / RAYS, 0.9, 0.75) for i in range(RAYS)])  # a cycle without pale colours
    figure, axes = make_figure(3, 4.5)
    set_window(axes[1:], exact, reference.data)
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        if ax is not axes[0]:
            if isinstance(distribution, OwnPoints):
                use_units(ax, distribution)
            x, dots = units_of(distribution).restore(x), units_of(distribution).restore(data)
            scatter(ax, dots, s=dot_size(dots), c=GREY, alpha=0.4, linewidths=0)
        pieces = x.split([len(line) for line in lines])
        for piece, hue in zip(pieces[:RAYS], hues, strict=True):
            ax.plot(*piece.T.numpy(), color=hue, lw=1.2)
        for piece in pieces[RAYS:]:
            ax.plot(*piece.T.numpy(), color="black", lw=0.8, alpha=0.7)
        ax.set_title(title)
    figure.supxlabel(
        "The same rays (coloured by direction) and rings (0.5 to 2.5 from the centre) everywhere; grey: "
        f"{grey}{of_class}.\nWhere lines crowd, much noise becomes the same data; where one bends sharply, noise on its"
        " two sides\ngoes to different parts of the data, and the flow stretches what lies between.",
        fontsize=11,
    )
    return figure


def polar_grid() -> list[Tensor]:
    """Make the lines of a polar grid as points (radius, angle) [N, 2]: rays, and then rings."""
    outwards, around = (torch.linspace(*ends, dtype=torch.float64) for ends in ((0.02, RADII[-1], 40), (0, 1, 121)))
    rays = [torch.stack([outwards, torch.full_like(outwards, i / RAYS)], -1) for i in range(RAYS)]
    rings = [torch.stack([torch.full_like(around, radius), around], -1) for radius in RADII]
    return [line * torch.tensor([1, 2 * torch.pi]) for line in rays + rings]


def cartesian(polar: Tensor) -> Tensor:
    """Turn points (radius, angle) [N, 2] into points on the plane [N, 2]."""
    radius, angle = polar.unbind(-1)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def follow(lines: list[Tensor], carry: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Halve the pieces of lines until no map carries the ends of one farther apart than GAP.

    Args:
        lines: each points (radius, angle) [N_i, 2].
        carry: takes points on the plane [N, 2] to their images under some maps [M, N, 2].

    Returns:
        the lines, with more points, and the images of all of their points, one line after the other: [M, N, 2].
    """
    polar = torch.cat(lines)
    line = torch.arange(len(lines)).repeat_interleave(torch.tensor([len(points) for points in lines]))
    images = carry(cartesian(polar))
    for _ in range(HALVINGS):
        far = images.diff(dim=1).norm(dim=-1).amax(0) > GAP
        left = (far & (line.diff() == 0)).nonzero().flatten()  # ends of pieces to be halved
        if len(left) == 0 or len(polar) + len(left) > MOST:
            break
        middle = (polar[left] + polar[left + 1]) / 2
        order = torch.cat([torch.arange(len(polar)), left + 0.5]).argsort()
        polar, line = torch.cat([polar, middle])[order], torch.cat([line, line[left]])[order]
        images = torch.cat([images, carry(cartesian(middle))], 1)[:, order]
    return list(polar.split(line.bincount().tolist())), images
