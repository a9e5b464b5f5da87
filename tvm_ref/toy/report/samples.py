"""Samples of a trained model as a table, in the units of the data."""

import torch

from tvm_ref.guidance import Condition
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.sampling import Jump, sample
from tvm_ref.seeding import SAMPLING
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.units import Units

EULER_STEPS = 64  # that samples are drawn in where no jumps were learned


def samples_table(
    config: ToyConfig,
    jump: Jump,
    units: Units,
    points: int,
    seed: int = SAMPLING,
    classes: GaussianMixture | None = None,
) -> str:
    """Draw samples in one step (in 64 Euler steps where no jumps were learned) and write them as comma-separated text.

    Args:
        config: what the model was trained with.
        jump: how it takes a step.
        units: of the data.
        points: rows of the table, beside the line of names.
        seed: of the noise.
        classes: the distribution whose classes a conditional model is asked for, and which become a last column.
    """
    generator = torch.Generator().manual_seed(seed)
    noise, names, label, condition = torch.randn(points, 2, generator=generator), [*units.columns], None, None
    if classes is not None:
        label = classes.sample(points, generator)[1]
        condition, names = Condition(label, torch.full((points,), 1 / config.w)), [*names, "class"]
    steps = 1 if OBJECTIVES[config.objective].learns_jumps else EULER_STEPS
    x = units.restore(sample(jump, noise, steps, condition))
    rows = [",".join(f"{a:.10g}" for a in row) for row in x.tolist()]
    if label is not None:
        rows = [f"{row},{c}" for row, c in zip(rows, label.tolist(), strict=True)]
    return "\n".join([",".join(names), *rows]) + "\n"
