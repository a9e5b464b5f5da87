"""Find which part of a method causes its error: train with the oracle in place of that part.

    python -m tvm_ref.experiments.causes                                  all, some twenty minutes of one core
    python -m tvm_ref.experiments.causes --variants TVM "TVM, exact u"    some

The oracle replaces the velocity that a jump is compared with ("exact u", where it lands), the random velocity of the
data ("u for v", at x_t), or everything: the network is then regressed on the exact flow map ("network's floor"), and
the remaining error is no method's fault. The same losses with other stop-gradients are trained too.
Each training has the matmuls of --steps steps of TVM (experiments/compare.py), without a sweep of rates.
Writes results.json, with every training, into a folder of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tvm_ref.cli.options import run
from tvm_ref.exact_flow import exact_path
from tvm_ref.experiments import variants
from tvm_ref.experiments.family_measures import line_with_velocity, step_products
from tvm_ref.interpolant import interpolate
from tvm_ref.seeding import EVALUATION, uniform_numbers
from tvm_ref.time_samplers import Times
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.training import Batch, Training

PATHS, TIMES = 20_000, 129  # number of exact paths that the network is regressed on, and of times on each


def _without_weight(key: str) -> dict[str, Any]:
    return {"objective": key, "settings": {"power": 0.0}}


# regressing F on v is alpha-Flow's loss at alpha = 1, whatever v is
_REGRESSION = {"objective": "alphaflow", "settings": {"alpha": 1.0, "power": 0.0}}
_FLOOR = _REGRESSION | {"time_sampler": "gap*", "equal_share": 0.25}
# options of the toy, and what the oracle replaces: nothing, the velocity of the "target", the random "v", or the whole
# "map": then the average velocity of each jump replaces v
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "network's floor": (_FLOOR, "map"),
    "the same, 1/4 at t = 1": (_FLOOR | {"noise_share": 0.25}, "map"),
    "TVM": ({}, ""),
    "TVM, exact u": ({}, "target"),
    "TVM, JVP detached": ({"settings": {"detach_jvp": True}}, ""),
    "TVM, JVP detached, exact u": ({"settings": {"detach_jvp": True}}, "target"),
    "LSD": ({"objective": "lsd"}, ""),
    "LSD, exact u": ({"objective": "lsd"}, "target"),
    "ESD, stops convex": ({"objective": "esd", "settings": {"stops": "convex"}}, ""),
    "ESD, stops full": ({"objective": "esd", "lr": 0.003}, ""),
    "ESD, only F learns": ({"objective": "esd", "settings": {"stops": "all"}}, ""),
    "MeanFlow": (_without_weight("meanflow"), ""),
    "MeanFlow, u for v": (_without_weight("meanflow"), "v"),
    "improved MeanFlow": (_without_weight("imf"), ""),
    "improved MeanFlow, u for v": (_without_weight("imf"), "v"),
}


class ExactPaths(NamedTuple):
    """Paths of the exact flow: the positions of noise points at some times.

    Attributes:
        times: [T] from 0 to 1, finest near 0.
        x: [T, N, D].
    """

    times: Tensor
    x: Tensor

    @classmethod
    def of(cls, distribution: GaussianMixture, paths: int = PATHS, times: int = TIMES) -> "ExactPaths":
        """Solve for the paths of evenly spread noise."""
        noise = torch.special.ndtri(uniform_numbers(paths, distribution.dim, EVALUATION))
        scale = distribution.time_scale
        grid = scale * torch.linspace(0, 1, times, dtype=torch.float64).mul(torch.asinh(torch.tensor(1 / scale))).sinh()
        grid[-1] = 1
        return cls(grid, exact_path(distribution, noise, grid, scale))

    def lines(self, times: Times, which: Tensor, distribution: GaussianMixture) -> tuple[Tensor, Tensor, Times]:
        """Return x0 and x1 [B, D] of lines with the average velocity of jumps, at the next of the paths' times.

        A line meets the path `which` [B] at t; its velocity is the path's average over [s, t], or u where t = s.
        """
        i, j = (torch.searchsorted(self.times, a.double()).clamp_max(len(self.times) - 1) for a in times[:2])
        t, s, x = self.times[i], self.times[j], self.x[i, which]
        average = (self.x[j, which] - x) / (s - t)[:, None]
        velocity = torch.where((i == j)[:, None], distribution.velocity(x, t), average)
        x0, x1 = line_with_velocity(x, t, velocity)
        return x0.float(), x1.float(), Times(*(a.float() for a in (t, s, s)))


class OracleTraining(Training):
    """A training in which the oracle replaces a part of the method.

    Args:
        config: its configuration.
        distribution: the data, and the oracle.
        exact: see VARIANTS.
        paths: for "map".
    """

    def __init__(
        self, config: ToyConfig, distribution: GaussianMixture, exact: str = "", paths: ExactPaths | None = None
    ):
        super().__init__(config, distribution)
        self.exact, self.paths = exact, paths
        if exact == "target":
            self.target: Any = SimpleNamespace(module=distribution, update=lambda model: None)  # follows no weights

    def batch(self, step: int) -> Batch:
        """Return the data of a step; for "v" and "map", lines with an exact velocity."""
        batch = super().batch(step)
        if self.exact == "v":
            x, t = interpolate(batch.x0, batch.x1, batch.times.t), batch.times.t
            x0, x1 = line_with_velocity(x, t, self.distribution.velocity(x, t))
            return batch._replace(x0=x0, x1=x1)
        if self.exact == "map" and self.paths is not None:
            generator = torch.Generator().manual_seed(self.config.seed * 2**32 + step)
            which = torch.randint(self.paths.x.shape[1], (len(batch.x0),), generator=generator)
            x0, x1, times = self.paths.lines(batch.times, which, self.distribution)
            return batch._replace(x0=x0, x1=x1, times=times)
        return batch


def configs(base: ToyConfig, names: Sequence[str]) -> dict[str, ToyConfig]:
    """Make the configuration of each variant, with the steps that `base.steps` steps of TVM pay for."""
    unit, made = step_products(base), {}
    for name in names:
        options, exact = VARIANTS[name]
        config = replace(base, **options)
        # the floor pays for one forward and backward, as flow matching does
        cost = step_products(replace(base, objective="fm") if exact == "map" else config)
        made[name] = replace(config, steps=round(base.steps * unit / cost))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = variants.parser("causes", __doc__, VARIANTS)
    arguments = command.parse_args(argv)
    base, out = variants.begin("causes", command, arguments)
    with command.errors(f"{out} holds the trainings that were finished"):
        distribution = base.make_distribution()
        paths = ExactPaths.of(distribution)
        report: dict[str, Any] = {"dist": base.name, "tvm_steps": base.steps, "variants": {}}

        def make(name: str, config: ToyConfig) -> OracleTraining:
            return OracleTraining(config, distribution, VARIANTS[name][1], paths)

        for _ in variants.train(configs(base, arguments.variants), make, arguments, report, out):
            pass
    print(f"{variants.table(report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
