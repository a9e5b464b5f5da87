"""The small relatives: closed forms, orders, equalities with their neighbours; the exact map is stationary."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from tests.networks import Waves
from tests.objectives.exact import GaussianData, expected_gradient, probes
from tests.objectives.samples import B, gradient, guidance, per_sample, setup
from tvm_ref.ema import EMA
from tvm_ref.experiments import differences, relatives, variants
from tvm_ref.experiments.differences import Differenced, derivative_errors
from tvm_ref.experiments.relatives import (
    ControlVariate,
    GuidedLSD,
    LagrangianDistillation,
    Weighted,
    short_first,
    temf,
)
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition, guided_velocity
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives import LSD, TVM, ImprovedMeanFlow, MeanFlow, mean_square
from tvm_ref.shapes import over
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution

STATIONARY = {
    "weighted": lambda model: Weighted(model, temf),
    "distillation": LagrangianDistillation,
    **{f"control variate {c}": partial(ControlVariate, c=c) for c in (0.0, 0.4, 1.0)},
}


class Parabola(nn.Module):
    """f = (s - t) F for F = p s, a parabola in s, whose central difference is exact."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, x, t, s, condition=None):
        return self.p * over(s, x) * x


@pytest.mark.parametrize("name", STATIONARY)
def test_the_exact_flow_map_is_a_stationary_point(name):
    data = GaussianData()
    model = FlowMap(data)
    found = expected_gradient(STATIONARY[name](model), data, *probes(), EMA(model, 0).module)
    assert float(found.abs().max()) < 1e-12


def test_a_difference_is_exact_for_parabolas():
    x, (t, s, _) = torch.randn(12, 2, dtype=torch.float64), probes()[1]
    network = Parabola()
    f, df_ds = Differenced(network, 0.3).displacement_and_terminal_velocity(x, t, s)
    torch.testing.assert_close(f, over(s - t, x) * network(x, t, s), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(df_ds, network.p * over(2 * s - t, x) * x, rtol=1e-13, atol=1e-13)


def test_a_difference_tends_to_the_jvp_with_the_square_of_its_step():
    """In loss and gradient, so at the exact map as well."""
    model, target, x0, x1, times = setup()
    data = GaussianData()
    exact, errors = FlowMap(data), []
    loss = TVM(model)(x0, x1, times, target=target).total
    for step in (0.04, 0.02, 0.01):
        found = TVM(Differenced(model.network, step))(x0, x1, times, target=target).total
        bias = expected_gradient(TVM(Differenced(data, step)), data, *probes(), EMA(exact, 0).module)
        errors.append(
            [
                float((found - loss).detach().norm()),
                float((gradient(found.mean(), model) - gradient(loss.mean(), model)).norm()),
                float(bias.norm()),
            ]
        )
    for coarse, fine in zip(errors[0], errors[2], strict=True):
        assert math.log2(coarse / fine) / 2 == pytest.approx(2, abs=0.05)


def test_the_measured_error_of_a_difference_is_that_of_a_sine():
    """For F = sin(a x + b t + c s) every difference is sin(c h) / (c h) of dF/ds."""
    network = Waves()
    x, (t, s, _) = torch.randn(12, 2), probes()[1]
    found = derivative_errors(network, x, t, s)["float32"]
    for step in differences.STEPS:
        phase = 2.1 * step
        assert found[f"{step:g}"] == pytest.approx(1 - math.sin(phase) / phase, rel=1e-4, abs=1e-9)
    assert found["JVP"] < 1e-6


def test_the_rounding_of_times_is_divided_by_the_step():
    """With s +- h rounded, dF/ds is multiplied by their distance over 2 h; the JVP only moves to another s."""
    x, (t, s, _) = torch.randn(512, 2, dtype=torch.float64), probes(512)[1]
    network, h = Waves(), 0.001
    found = derivative_errors(network, x, t, s)["bfloat16, times too"]
    distance = (s + h).bfloat16().double() - (s - h).bfloat16().double()
    exact = network.ds(x, t, s).detach()
    expected = float((over(distance / (2 * h) - 1, x) * exact).norm() / exact.norm())
    assert expected > 0.05
    assert found["0.001"] == pytest.approx(expected, rel=0.1)
    assert found["JVP"] < 0.01


def test_weights_by_length():
    """Their values, and what they do: a mean of one over the batch, and the jump's term alone."""
    length = torch.tensor([0.0, 0.75], dtype=torch.float64)
    torch.testing.assert_close(temf(length, 0.0), torch.tensor([1.0, 1 / (1.75 * 1.25)], dtype=torch.float64))
    for progress, values in ((0.0, [1.0, 0.25]), (0.5, [1.0, 0.625]), (1.0, [1.0, 1.0])):
        torch.testing.assert_close(short_first(length, progress), torch.tensor(values, dtype=torch.float64))
    model, target, x0, x1, times = setup()
    plain, objective = TVM(model)(x0, x1, times, target=target), Weighted(model, short_first)
    objective.set_progress(0.0)
    first = objective(x0, x1, times, target=target)
    weight = 1 - (times.t - times.s)
    torch.testing.assert_close(first.jump, weight / weight.mean() * plain.jump)
    objective.set_progress(1.0)
    last = objective(x0, x1, times, target=target)
    torch.testing.assert_close(last.jump, plain.jump)
    torch.testing.assert_close(first.flow_matching, plain.flow_matching)


def test_distillation_is_the_first_term_of_tvm():
    model, target, x0, x1, times = setup()
    found = LagrangianDistillation(model)(x0, x1, times, target=target)
    of_tvm = TVM(model)(x0, x1, times, target=target).jump
    torch.testing.assert_close(found.jump, of_tvm)
    torch.testing.assert_close(per_sample(found.total, model), per_sample(of_tvm, model))
    assert not found.flow_matching.any()


def test_the_control_variate_goes_from_meanflow_to_improved_meanflow():
    model, _, x0, x1, times = setup()
    ends = MeanFlow(model, power=0.0), ImprovedMeanFlow(model, power=0.0)
    first, last = (per_sample(end(x0, x1, times).total, model) for end in ends)
    for c, expected in ((0.0, first), (1.0, last), (0.3, 0.7 * first + 0.3 * last)):  # the gradient is linear in c
        found = per_sample(ControlVariate(model, c)(x0, x1, times).total, model)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert float((first - last).abs().max()) > 0.01


def test_guided_lsd_holds_jumps_against_the_guided_velocity_and_the_diagonal_against_v():
    model, target, x0, x1, times = setup()
    condition, none = guidance()
    times = times._replace(s=torch.where(torch.arange(B) < 6, times.t, times.s))
    found = GuidedLSD(model, null_label=3)(x0, x1, times, condition, target)
    one = condition._replace(beta=torch.ones(B, dtype=torch.float64))
    x = interpolate(x0, x1, times.t)
    f, df_ds = model.displacement_and_terminal_velocity(x, times.t, times.s, condition)
    at = x + f.detach(), times.s
    u = guided_velocity(target.velocity(*at, one), target.velocity(*at, none), condition.beta)
    v = mean_square(model.velocity(x, times.t, one) - conditional_velocity(x0, x1))
    torch.testing.assert_close(found.jump[6:], mean_square(df_ds - u)[6:])
    torch.testing.assert_close(found.flow_matching[:6], v[:6])
    plain = GuidedLSD(model, null_label=3)(x0, x1, times, Condition(condition.label, one.beta), target)
    of_lsd = LSD(model)(x0, x1, times, Condition(condition.label, one.beta), target)
    torch.testing.assert_close(per_sample(plain.total, model), per_sample(of_lsd.total, model))


def test_a_student_starts_from_its_teacher_and_is_paid_for():
    base = ToyConfig(steps=40, batch_size=16, width=8, depth=2)
    names = ["TVM", "LMD, teacher given", "LMD, teacher paid"]
    steps = {name: config.steps for name, config in relatives.configs(base, names).items()}
    assert steps["TVM"] == 40 < steps["LMD, teacher given"] < 80  # a term less
    assert steps["LMD, teacher paid"] == pytest.approx(steps["LMD, teacher given"] / 2, abs=1)
    training = relatives.RelativeTraining(base, make_distribution("moons"), LagrangianDistillation, 3)
    for p, q in zip(training.model.parameters(), training.target.module.parameters(), strict=True):
        assert torch.equal(p, q)
    training.train_step()
    assert training.target.module is not training.model


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--batch-size", "16", "--width", "8", "--depth", "2", "--points", "50", "--steps", "3", "--seeds", "2"]
    assert relatives.main([*options, "--variants", "TVM", "LMD, teacher paid", "--out", str(out)]) == 0
    report = json.loads((out / "results.json").read_text())
    printed = capsys.readouterr().out
    assert [len(row["runs"]) for row in report["variants"].values()] == [2, 2] == [2, len(report["derivative"])]
    assert variants.table(report) in printed
    assert differences.derivative_table(report["derivative"]) in printed
