"""The picture of a map: a polar grid on the noise, and where the exact flow and a model carry it."""

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tvm_ref.guidance import Condition
from tvm_ref.sampling import EulerStep, Jump, sample
from tvm_ref.toy.data.distributions import polar
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.points import units_of
from tvm_ref.toy.report import plots
from tvm_ref.toy.report.metrics import EULER_STEPS, Reference, exact_samples

RADII, RAYS = (0.5, 1.0, 1.5, 2.0, 2.5), 24
RAY_POINTS, RING_POINTS = 200, 400  # of each line


@matplotlib.rc_context(plots.STYLE)
def plot_map(distribution: GaussianMixture, jump: Jump, reference: Reference) -> Figure:
    """Draw a polar grid on the noise, and where the exact flow map and the model carry it in one step.

    An EulerStep is shown in 64 steps, and a conditional model with the first class.
    """
    steps = EULER_STEPS if isinstance(jump, EulerStep) else 1
    lines = polar_grid()
    noise, condition = torch.cat(lines), None
    data, grey, of_class = reference.data, plots.name_data(reference), ""
    if reference.condition is not None:
        label = torch.zeros(len(noise), dtype=torch.long)
        condition = Condition(label, reference.condition.beta[:1].expand(len(noise)))
        data, of_class = data[reference.condition.label == 0], ", class 0"
    exact = exact_samples(distribution, noise.double(), condition)
    panels = {
        "noise: rays and rings": noise,
        f"carried by the exact flow{of_class}": exact,
        f"carried by the model, {plots.name_steps(jump, steps)}{of_class}": sample(jump, noise, steps, condition),
    }
    hues = matplotlib.colors.hsv_to_rgb([(i / RAYS, 0.9, 0.75) for i in range(RAYS)])  # a cycle without pale colours
    figure, axes = plots.make_figure(3, 4.5)
    plots.set_window(axes[1:], exact, reference.data)
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        if ax is not axes[0]:
            plots.use_units(ax, distribution)
            x, dots = units_of(distribution).restore(x), units_of(distribution).restore(data)
            plots.scatter(ax, dots, s=plots.dot_size(dots), c=plots.GREY, alpha=0.4, linewidths=0)
        drawn = x.split([len(line) for line in lines])
        for ray, hue in zip(drawn[:RAYS], hues, strict=True):
            ax.plot(*ray.T.numpy(), color=hue, lw=1.2)
        for ring in drawn[RAYS:]:
            ax.plot(*ring.T.numpy(), color="black", lw=0.8, alpha=0.7)
        ax.set_title(title)
    figure.supxlabel(
        "The same rays (coloured by direction) and rings (0.5 to 2.5 from the centre) everywhere; grey: "
        f"{grey}{of_class}.\nWhere lines crowd, much noise becomes the same data; where one bends sharply, noise on its"
        " two sides\ngoes to different parts of the data, and the flow stretches what lies between.",
        fontsize=11,
    )
    return figure


def polar_grid() -> list[Tensor]:
    """Make the lines of a polar grid as points in 2D [N, 2]: rays, and then rings.

    Points are dense, because the exact flow carries neighbours far apart where it splits noise between modes.
    """
    radius, angle = torch.linspace(0.02, RADII[-1], RAY_POINTS), 2 * torch.pi * torch.linspace(0, 1, RING_POINTS)
    rays = [polar(radius, torch.full_like(radius, 2 * torch.pi * i / RAYS)) for i in range(RAYS)]
    rings = [polar(torch.full_like(angle, radius), angle) for radius in RADII]
    return rays + rings
