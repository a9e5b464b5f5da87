"""Variants that people ask for: a difference instead of the JVP, weights by length, a teacher, mixed MeanFlows.

    python -m tvm_ref.experiments.relatives                                                       all
    python -m tvm_ref.experiments.relatives --variants TVM "TVM, difference 0.01"              some

Each training has the matmuls of --steps steps of TVM, as in experiments/causes.py, without a sweep of rates. A "given"
teacher comes on top of that, a "paid" one takes half of it. For every training of TVM a second table has the relative
error of dF/ds by central differences in s and by the JVP, with matmuls in a data type ("autocast") and with times
rounded to it as well, against a JVP in float64.
Writes results.json, with every training, into a folder of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tvm_ref.cli.options import run
from tvm_ref.ema import EMA
from tvm_ref.experiments import variants
from tvm_ref.experiments.differences import Differenced, autocast, derivative_errors, derivative_table
from tvm_ref.experiments.family_measures import batch, step_products
from tvm_ref.flow_map import Flow, FlowMap
from tvm_ref.guidance import Condition, guided_velocity, without_label
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import LSD, TVM, Jumps, LossTerms, MeanFlow, Objective, mean_square
from tvm_ref.shapes import PerSample, Sample, over
from tvm_ref.time_samplers import Times, TimeSampler
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.training import Training

SAMPLES = 2048  # samples on which dF/ds is measured

LengthWeight = Callable[[PerSample, float], PerSample]  # of t - s [B] and of the fraction of training that is done


class LowPrecision(TVM):
    """TVM whose matmuls, of the model and of the target, are in bfloat16."""

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective."""
        with autocast(torch.bfloat16):
            return super().forward(x0, x1, times, condition, target)


class Weighted(TVM):
    """TVM whose jumps are weighed by their length, with a mean of one over the batch.

    Args:
        flow_map: the model.
        by_length: the weight.
    """

    def __init__(self, flow_map: Flow, by_length: LengthWeight):
        super().__init__(flow_map)
        self.by_length, self.progress = by_length, 0.0

    def set_progress(self, progress: float) -> None:
        """Store the fraction of training that is done."""
        self.progress = progress

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective."""
        terms = super().forward(x0, x1, times, condition, target)
        weight = self.by_length(times.t - times.s, self.progress)
        return replace(terms, jump=weight / weight.mean() * terms.jump)


def temf(length: PerSample, progress: float) -> PerSample:
    """Return the weight of TEMF (Temporal Equilibrium MeanFlow), its constants 1: long jumps count less."""
    return 1 / ((1 + length) * (1 + length.square()).sqrt())


def short_first(length: PerSample, progress: float) -> PerSample:
    """Return p + (1 - p) (1 - length) after a fraction p of training (2511.19065, lambda = 1): in the end all alike."""
    return progress + (1 - progress) * (1 - length)


class LagrangianDistillation(Objective):
    """Lagrangian map distillation (2406.07507): TVM's first term with a trained target, and no flow matching."""

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective; the target is the teacher."""
        assert target is not None
        t, s, _ = times
        x = interpolate(x0, x1, t)
        f, df_ds = self.flow_map.displacement_and_terminal_velocity(x, t, s, condition)
        loss = mean_square(df_ds - target.velocity(x + f.detach(), s, condition))
        return LossTerms(loss, torch.zeros_like(loss))


class ControlVariate(MeanFlow):
    """MeanFlow whose derivative runs along v + c (u - v), u = F(x_t, t, t) (2605.09235).

    c = 0 is MeanFlow, c = 1 improved MeanFlow; the weight is one.
    """

    def __init__(self, flow_map: Flow, c: float):
        super().__init__(flow_map, power=0.0)
        self.c = c

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return F, and v + (s - t) D F, detached."""
        x, v, t, s, _, condition, _ = jumps
        with torch.no_grad():
            u = self.flow_map.velocity(x, t, condition)
        F, DF = self.flow_map.F_and_total_derivative(x, t, s, v + self.c * (u - v), condition)
        return F, v + over(s - t, F) * DF.detach()


class GuidedLSD(LSD):
    """LSD with guidance as its authors describe it (2505.18825, F.5): in the target of jumps, not in flow matching.

        ||d/ds X_w(x_t, t, s) - [w u*(y, s, c) + (1 - w) u*(y, s, no class)]||^2,    y = X_w(x_t, t, s)

    Flow matching, at t = s, trains the velocity u of w = 1 only, and so F(x, t, t) of other w is never called.
    """

    has_guidance = True

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective."""
        if condition is not None:
            condition = Condition(condition.label, condition.beta.masked_fill(times.t == times.s, 1.0))
        return super().forward(x0, x1, times, condition, target)

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return d/ds X_w(x_t, t, s), and the guided velocity where the jump lands."""
        x, _, t, s, _, condition, target = jumps
        f, df_ds = self.flow_map.displacement_and_terminal_velocity(x, t, s, condition)
        if condition is None or self.null_label is None:
            return df_ds, target.velocity(x + f.detach(), s, condition).detach()
        with torch.no_grad():
            u = target.velocity(x + f, s, Condition(condition.label, torch.ones_like(condition.beta)))
            unconditional = target.velocity(x + f, s, without_label(condition, self.null_label))
        return df_ds, guided_velocity(u, unconditional, condition.beta)


class Variant(NamedTuple):
    """A relative: options of the toy, its objective, and the teacher's and the student's parts of the budget."""

    options: dict[str, Any]
    make: Callable[[FlowMap], Objective]
    teacher: float = 0.0
    student: float = 1.0


def _difference(kind: type[TVM], step: float, model: FlowMap) -> Objective:
    return kind(Differenced(model.network, step))


def _control_variate(c: float) -> Variant:
    return Variant({"objective": "imf"}, partial(ControlVariate, c=c))  # with the times of improved MeanFlow


VARIANTS: dict[str, Variant] = {
    "TVM": Variant({}, TVM),
    "TVM, difference 0.01": Variant({}, partial(_difference, TVM, 0.01)),
    "TVM, difference 0.1": Variant({}, partial(_difference, TVM, 0.1)),
    "TVM, bfloat16": Variant({}, LowPrecision),
    "bfloat16, difference 0.01": Variant({}, partial(_difference, LowPrecision, 0.01)),
    "bfloat16, difference 0.1": Variant({}, partial(_difference, LowPrecision, 0.1)),
    "TVM, weight t - s": Variant({}, partial(Weighted, by_length=lambda length, progress: length)),
    "TVM, weight of TEMF": Variant({}, partial(Weighted, by_length=temf)),
    "TVM, short jumps first": Variant({}, partial(Weighted, by_length=short_first)),
    "LMD, teacher given": Variant({}, LagrangianDistillation, teacher=1.0),
    "LMD, teacher paid": Variant({}, LagrangianDistillation, teacher=0.5, student=0.5),
    "TVM, teacher given": Variant({}, TVM, teacher=1.0),
    "MeanFlow, c = 0": _control_variate(0.0),
    "MeanFlow, c = 0.5": _control_variate(0.5),
    "MeanFlow, c = 0.9": _control_variate(0.9),
    "improved MeanFlow, c = 1": _control_variate(1.0),
}


class RelativeTraining(Training):
    """A training of a variant; with a teacher, it starts from the teacher's weights and has the teacher as target.

    Args:
        config: its configuration.
        distribution: the data.
        make: makes its objective.
        teacher_steps: steps of flow matching before; 0 for no teacher.
    """

    def __init__(
        self,
        config: ToyConfig,
        distribution: GaussianMixture,
        make: Callable[[FlowMap], Objective],
        teacher_steps: int = 0,
    ):
        super().__init__(config, distribution)
        self.objective = make(self.model)
        if teacher_steps:
            teacher = Training(replace(config, objective="fm", steps=teacher_steps), distribution)
            for _ in range(teacher_steps):
                teacher.train_step()
            self.model.load_state_dict(teacher.ema.module.state_dict())
            self.ema = EMA(self.model, config.ema)
            self.target: Any = SimpleNamespace(module=teacher.ema.module, update=lambda model: None)


def configs(base: ToyConfig, names: Sequence[str]) -> dict[str, ToyConfig]:
    """Make the configuration of each variant, with the steps that its part of the budget pays for."""
    budget, made = base.steps * step_products(base), {}
    for name in names:
        options, make, _, part = VARIANTS[name]
        config = replace(base, **options)
        made[name] = replace(config, steps=round(part * budget / step_products(config, make)))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = variants.parser("relatives", __doc__, VARIANTS)
    arguments = command.parse_args(argv)
    base, out = variants.begin("relatives", command, arguments)
    with command.errors(f"{out} holds the trainings that were finished"):
        distribution = base.make_distribution()
        made = configs(base, arguments.variants)
        budget = base.steps * step_products(base) / step_products(replace(base, objective="fm"))
        x0, x1, times = batch(distribution, SAMPLES, TimeSampler(), 5, dtype=torch.float32)
        report: variants.Report = {"dist": base.name, "tvm_steps": base.steps, "variants": {}, "derivative": []}

        def make(name: str, config: ToyConfig) -> RelativeTraining:
            variant = VARIANTS[name]
            return RelativeTraining(config, distribution, variant.make, round(variant.teacher * budget))

        for name, training in variants.train(made, make, arguments, report, out):
            if name == "TVM":
                x = interpolate(x0, x1, times.t)
                errors = derivative_errors(training.ema.module.network, x, times.t, times.s)
                report["derivative"].append(errors)
    print(variants.table(report))
    if report["derivative"]:
        print(derivative_table(report["derivative"]))
    print(out)
    return 0


if __name__ == "__main__":
    run(main)
