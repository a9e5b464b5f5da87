"""Each method's gradient against its formula, written out with autograd on a network whose derivatives are known."""

import itertools

import pytest
import torch

from tests.objectives.samples import B, assert_plain_gradient, guidance, per_sample, setup
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import (
    ESD,
    LSD,
    PSD,
    AlphaFlow,
    ContinuousConsistency,
    ImprovedMeanFlow,
    Jumps,
    LearnedWeight,
    MeanFlow,
    SoFlow,
    mean_square,
)
from tvm_ref.shapes import over


def derivatives(network, x, t, s):
    """F, dF/dx (diagonal), dF/dt, dF/ds of Waves in closed form, all with gradients."""
    phase = network.phase(x, t, s)
    return phase.sin(), network.a * phase.cos(), network.b * phase.cos(), network.c * phase.cos()


@pytest.mark.parametrize("stops", LSD.STOPS)
def test_lsd(stops):
    model, target, x0, x1, times = setup()
    (t, s, _), net = times, model.network
    x, gap = interpolate(x0, x1, times.t), over(times.s - times.t, x0)
    F, _, _, dF_ds = derivatives(net, x, t, s)
    if stops == "none":
        residual = F + gap * dF_ds - net(x + gap * F, s, s)
    else:
        residual = F + gap * dF_ds - target.network(x + gap * F, s, s).detach()
    terms = LSD(model, stops=stops)(x0, x1, times, target=target)
    torch.testing.assert_close(terms.jump, mean_square(residual))
    torch.testing.assert_close(per_sample(terms.jump, model), per_sample(mean_square(residual), model))


@pytest.mark.parametrize("stops", ESD.STOPS)
def test_esd(stops):
    model, target, x0, x1, times = setup()
    t, s, _ = times
    x, gap = interpolate(x0, x1, t), over(s - t, x0)
    F, dF_dx, dF_dt, _ = derivatives(model.network, x, t, s)
    u = model.network(x, t, t) if stops == "none" else target.network(x, t, t).detach()
    if stops == "full":  # the advection is the target's, too
        dF_dx = derivatives(target.network, x, t, s)[1].detach()
    D = dF_dt + dF_dx * u
    residual = F - u - gap * (D.detach() if stops == "all" else D)
    terms = ESD(model, stops=stops)(x0, x1, times, target=target)
    torch.testing.assert_close(terms.jump, mean_square(residual))
    torch.testing.assert_close(per_sample(terms.jump, model), per_sample(mean_square(residual), model))


@pytest.mark.parametrize("kind", [MeanFlow, ImprovedMeanFlow])
@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_mean_flow_and_improved_mean_flow_with_their_weight(kind, power):
    model, target, x0, x1, times = setup()
    t, s, _ = times
    x, v = interpolate(x0, x1, t), x1 - x0
    F, dF_dx, dF_dt, _ = derivatives(model.network, x, t, s)
    direction = v if kind is MeanFlow else model.network(x, t, t)
    square = mean_square(F - (v + over(s - t, v) * (dF_dx * direction + dF_dt)).detach())
    loss = square / (square.detach() + 1e-3) ** power
    terms = kind(model, power=power)(x0, x1, times, target=target)
    torch.testing.assert_close(terms.total, loss)
    torch.testing.assert_close(per_sample(terms.total, model), per_sample(loss, model))


def test_continuous_consistency():
    """The gradient is 2 g / (||g|| + c) . dF, g minus the tangent d/dt X(x, t, 0) along the path."""
    model, _, x0, x1, times = setup()
    t, zero = times.t, torch.zeros_like(times.t)
    x, v = interpolate(x0, x1, t), x1 - x0
    tangent = torch.func.jvp(lambda x, t: model.jump(x, t, zero), (x, t), (v, torch.ones_like(t)))[1].detach()
    g = -tangent / over(tangent.square().mean(1).sqrt() + 0.1, tangent)
    F = model.network(x, t, zero)
    by_hand = 2 * (g * F).mean(1)
    terms = ContinuousConsistency(model)(x0, x1, times)
    torch.testing.assert_close(per_sample(terms.jump, model), per_sample(by_hand, model))


@pytest.mark.parametrize("power", [0, 1])
def test_the_adaptive_weights_of_alpha_flow_and_soflow(power):
    model, _, x0, x1, times = setup()
    t, s, _ = times
    x, v, alpha = interpolate(x0, x1, t), x1 - x0, 0.2
    r = alpha * s + (1 - alpha) * t
    target = alpha * v + (1 - alpha) * model.network(x - over(t - r, x) * v, r, s)
    square = mean_square(model.network(x, t, s) - target.detach())
    theirs = square / alpha if power == 0 else alpha * square / (square.detach() + 1e-3)
    terms = AlphaFlow(model, alpha=alpha, power=power)(x0, x1, times)
    torch.testing.assert_close(per_sample(terms.jump, model), per_sample(theirs, model))
    quotient = (model.jump(x, t, s) - model.jump(x - over(t - r, x) * v, r, s)) / over(t - r, x)
    theirs = square / alpha / (mean_square(quotient).detach() + 1e-2) ** power
    terms = SoFlow(model, first=alpha, last=alpha, power=power)(x0, x1, times)
    torch.testing.assert_close(per_sample(terms.jump, model), per_sample(theirs, model))


@pytest.mark.parametrize("kind", [PSD, LSD, ESD])
def test_nothing_stopped_is_the_plain_gradient_of_the_value(kind):
    model, _, x0, x1, times = setup()
    objective = kind(model, stops="none")
    assert_plain_gradient(lambda: objective(x0, x1, times).total.mean(), model)


def test_average_velocity_and_its_derivatives_against_central_differences():
    """Along the flow, at fixed x, and at fixed t; the error of a central difference falls with its square."""
    model, _, x, v, (t, s, _) = setup()
    t, s, h = 0.2 + 0.7 * t, 0.1 + 0.5 * s, 1e-4
    F = model.F(x, t, s)
    torch.testing.assert_close(F * over(s - t, x), model.displacement(x, t, s))
    for dx, dt in ((v, 1.0), (torch.zeros_like(v), 1.0), (v, 0.0)):
        value, derivative = model.F_and_total_derivative(x, t, s, dx, dt=dt)
        ahead, behind = (model.F(x + e * dx, t + e * dt, s) for e in (h, -h))
        torch.testing.assert_close(value, F)
        torch.testing.assert_close(derivative, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [MeanFlow, ImprovedMeanFlow, AlphaFlow, SoFlow])
def test_with_a_condition_the_target_of_equation_14_stands_for_v(kind):
    """Its unconditional velocity is the model's own, stopped, and there is no weight 1/w^2: so in these papers."""
    model, target, x0, x1, times = setup()
    t, (condition, null) = times.t, guidance()
    x, w = interpolate(x0, x1, t), over(1 / condition.beta, x0)
    guided = w * (x1 - x0) + (1 - w) * model.velocity(x, t, null).detach()
    objective = kind(model, null_label=3, power=0)
    actual = objective(x0, x1, times, condition, target)
    left, right = objective.sides(Jumps(x, guided, *times, condition, target))
    expected = objective.weigh(mean_square(left - right), t, times.s)
    torch.testing.assert_close(per_sample(actual.total, model), per_sample(expected, model))


def test_a_learned_weight_starts_as_none_and_ends_at_the_logarithm_of_the_mean_square():
    model, target, x0, x1, times = setup()
    objective = LSD(model, learned_weight=True).double()
    plain = LSD(model)(x0, x1, times, target=target)
    torch.testing.assert_close(objective(x0, x1, times, target=target).total, plain.total)
    assert len(list(objective.parameters())) == 3 + 4
    weight = LearnedWeight().double()
    t, s = times.t, times.s
    with torch.no_grad():
        weight.output.bias.fill_(0.7)
    square = torch.full((B,), 2.0, dtype=torch.float64, requires_grad=True)
    loss = weight(square, t, s)
    torch.testing.assert_close(loss, torch.exp(torch.tensor(-0.7)) * square + 0.7, check_dtype=False)
    optimizer = torch.optim.Adam(weight.parameters(), 0.05)
    for _ in range(300):  # of squares that depend on t - s alone
        optimizer.zero_grad()
        weight((1 + 3 * (t - s)).exp(), t, s).mean().backward()
        optimizer.step()
    w = torch.log((weight(torch.ones(B).double() * 2, t, s) - weight(torch.ones(B).double(), t, s)) ** -1)
    torch.testing.assert_close(w, 1 + 3 * (t - s), rtol=0, atol=0.15)


def test_the_curriculum_of_alpha_flow_falls_from_one_to_zero():
    model, _, x0, x1, times = setup()
    objective = AlphaFlow(model, power=0)
    alphas = [objective.alpha(p) for p in torch.linspace(0, 1, 101).tolist()]
    assert alphas[0] == 1
    assert alphas[50] == pytest.approx(0.5)
    assert alphas[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(alphas))
    inside = [a for a in alphas if 0 < a < 1]
    assert min(inside) >= 5e-3
    assert max(inside) <= 1 - 5e-3
    late = AlphaFlow(model, start=0.5, end=0.75)
    assert (late.alpha(0.5), late.alpha(0.625), late.alpha(0.75)) == (1, pytest.approx(0.5), 0)
    flat = AlphaFlow(model, start=0.5, end=0.75, temperature=5.0)  # outside of its window alpha is 1 and 0 even so
    assert (flat.alpha(0.49), flat.alpha(0.51) < 1, flat.alpha(0.74) > 0, flat.alpha(0.76)) == (1, True, True, 0)
    steep = AlphaFlow(model, temperature=2000.0)  # exp(980) would overflow
    assert (steep.alpha(0.01), steep.alpha(0.5), steep.alpha(0.99)) == (1, 0.5, 0)
    for progress in (0.0, 0.45, 1.0):
        objective.set_progress(progress)
        constant = AlphaFlow(model, alpha=objective.alpha(progress), power=0)
        # a float32 buffer holds alpha
        torch.testing.assert_close(objective(x0, x1, times).total, constant(x0, x1, times).total, rtol=1e-6, atol=1e-9)
    assert "alpha_now" not in objective.state_dict()


def test_soflow_shortens_its_step_exponentially():
    objective = SoFlow(setup()[0])
    steps = []
    for progress in (0.0, 0.5, 1.0):
        objective.set_progress(progress)
        steps.append(float(objective.alpha_now))
    assert steps == pytest.approx([0.1, (0.1 * 0.002) ** 0.5, 0.002])
