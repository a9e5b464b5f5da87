import math

import pytest
import torch

from tests.networks import PointData, some_times
from tests.objectives.samples import B, assert_plain_gradient, gradient, guidance, other_weights, per_sample, setup
from tvm_ref.ema import EMA
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition, guided_velocity
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives import OBJECTIVES, PID, TVM, FlowMatching, LossTerms, MeanFlow, Objective, mean_square
from tvm_ref.shapes import over
from tvm_ref.time_samplers import Times
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.network import ToyNetwork

SHAPES = [(B, 2), (B, 3, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_tvm_equals_equation_12_written_out(shape):
    model, target, x0, x1, times = setup(shape)
    (t, s, s_prime), net = times, model.network
    terms = TVM(model)(x0, x1, times, target=target)

    x_t, x_s = over(1 - t, x0) * x0 + over(t, x0) * x1, over(1 - s_prime, x0) * x0 + over(s_prime, x0) * x1
    f = over(s - t, x0) * net(x_t, t, s)
    df_ds = net(x_t, t, s) + over(s - t, x0) * net.ds(x_t, t, s)
    with torch.no_grad():
        u = target.network(x_t + f, s, s)
    terminal = (df_ds - u).square().flatten(1).mean(1)
    boundary = (net(x_s, s_prime, s_prime) - (x1 - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(terms.jump, terminal, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.flow_matching, boundary, rtol=1e-12, atol=1e-12)
    gradients = [gradient(loss.mean(), model) for loss in (terms.total, terminal + boundary)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_tvm_with_condition_equals_equation_15_written_out():
    model, target, x0, x1, times = setup(scaled=True)
    (t, s, s_prime), (condition, null) = times, guidance()
    terms = TVM(model, null_label=3)(x0, x1, times, condition, target)

    w = 1 / condition.beta
    x_t, x_s = interpolate(x0, x1, t), interpolate(x0, x1, s_prime)
    f, df_ds = model.displacement_and_terminal_velocity(x_t, t, s, condition)
    u = target.velocity(x_t + f, s, condition)
    guided = over(w, x0) * (x1 - x0) + over(1 - w, x0) * target.velocity(x_s, s_prime, null)
    torch.testing.assert_close(terms.jump, mean_square(df_ds - u) / w**2)
    torch.testing.assert_close(
        terms.flow_matching, mean_square(model.velocity(x_s, s_prime, condition) - guided) / w**2
    )
    alone = FlowMatching(model, null_label=3)(x0, x1, times, condition, target)  # is its second term
    torch.testing.assert_close(alone.flow_matching, terms.flow_matching)


@pytest.mark.parametrize("kind", [TVM, FlowMatching])
def test_no_gradient_flows_through_the_target_of_guidance(kind):
    """Also where the model is its own target: eq. 14 has the gradient that it has with a frozen copy."""
    model, _, x0, x1, times = setup(scaled=True)
    own, frozen = (
        kind(model, null_label=3)(x0, x1, times, guidance()[0], target).flow_matching
        for target in (None, EMA(model, 0).module)
    )
    torch.testing.assert_close(*(gradient(terms.mean(), model) for terms in (own, frozen)), rtol=1e-12, atol=0)


def test_without_target_and_detaching_the_gradient_is_that_of_equation_9():
    """Eq. 9 stops no gradient, so finite differences of its value are its gradient; eq. 12 stops some."""
    model, _, x0, x1, times = setup()
    objective = TVM(model, detach_landing=False)
    assert_plain_gradient(lambda: objective(x0, x1, times).total.mean(), model)
    whole = gradient(objective(x0, x1, times).total.mean(), model)
    stopped = gradient(TVM(model)(x0, x1, times, target=EMA(model, 0).module).total.mean(), model)
    assert not torch.allclose(whole, stopped, rtol=1e-2)


def test_detached_jvp_changes_gradients_and_not_values():
    model, target, x0, x1, times = setup()
    full, cheap = (TVM(model, detach_jvp=d)(x0, x1, times, target=target) for d in (False, True))
    assert torch.equal(full.total, cheap.total)
    gradients = [torch.autograd.grad(a.jump.mean(), model.network.c)[0] for a in (full, cheap)]
    assert float((gradients[0] - gradients[1]).abs()) > 1e-3


def test_two_micro_batches_make_one_batch():
    model, target, x0, x1, times = setup()
    whole, first, second = (
        gradient(TVM(model)(x0[h], x1[h], Times(*(a[h] for a in times)), target=target).total.mean(), model)
        for h in (slice(B), slice(B // 2), slice(B // 2, B))
    )
    torch.testing.assert_close(whole, (first + second) / 2)


@pytest.mark.compiles
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.slow
def test_compiles_whole_and_equals_the_eager_objective(name):
    """Loss and gradients through torch.compile without a graph break: the JVP inside included."""
    torch.compiler.reset()  # what earlier tests compiled counts as recompilation of the same forward
    torch.manual_seed(0)
    model = FlowMap(ToyNetwork(2, 0, width=8, depth=1).double())
    torch.nn.init.normal_(model.network.output.weight)
    target, (_, _, x0, x1, times) = other_weights(model), setup()
    objective = OBJECTIVES[name](model)
    results = []
    for call in (objective, torch.compile(objective, backend="aot_eager", fullgraph=True)):
        terms = call(x0, x1, times, target=target)
        parameters = list(model.parameters())
        results.append([terms.total, *torch.autograd.grad(terms.total.mean(), parameters, allow_unused=True)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", SHAPES)
def test_tvm_is_flow_matching_at_equal_times(shape):
    """Appendix A.5, eq. 59 and 60: value and gradient, also where nothing is masked."""
    model, target, x0, x1, (t, _, _) = setup(shape)
    times = Times(t, t, t)
    tvm, fm = TVM(model)(x0, x1, times), FlowMatching(model)(x0, x1, times)
    assert torch.equal(tvm.jump, torch.zeros(B, dtype=torch.float64))
    assert torch.equal(tvm.total, fm.total)
    # the indicator 1{t != s} of eq. 12: the velocities of a target with other weights differ at t = s as well
    assert not bool(TVM(model)(x0, x1, times, target=target).jump.any())
    torch.testing.assert_close(gradient(tvm.total.mean(), model), gradient(fm.total.mean(), model))
    close = Times(t, t - 1e-9 * t, t)  # where nothing is masked, the term vanishes in the limit (appendix A.3)
    assert 0 < float(TVM(model)(x0, x1, close).jump.detach().max()) < 1e-12


@pytest.mark.filterwarnings("ignore:the network's output does not depend on s")  # that flow is straight
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_vanishes_for_the_exact_flow_of_one_point(name):
    """If all data are one point, v is known from x_t, so nothing is left: F = (x - m) / t solves all of them."""
    m = torch.tensor([0.3, -1.1], dtype=torch.float64)
    x1 = torch.randn(B, 2, dtype=torch.float64)
    t, s = (0.05 + 0.9 * a for a in some_times(B))
    objective = OBJECTIVES[name](FlowMap(PointData(m)))
    terms = objective(m.expand(B, 2), x1, Times(t, s, s))
    assert float(terms.total.detach().abs().max()) < 1e-24


def test_the_two_forms_of_mean_flow_agree():
    """Appendix E.1: ||F - F_tgt||^2 of eq. 18 is ||d/dt f + v||^2, d/dt along the path."""
    model, _, x0, x1, times = setup()
    t, s, _ = times
    v, x_t = conditional_velocity(x0, x1), interpolate(x0, x1, t)
    df_dt = torch.func.jvp(lambda x, t: model.displacement(x, t, s), (x_t, t), (v, torch.ones_like(t)))[1]
    torch.testing.assert_close(MeanFlow(model, power=0)(x0, x1, times).jump, mean_square(df_dt + v))


def test_pid_is_tvm_from_noise_alone():
    model, target, x0, x1, times = setup()
    pid = PID(model)(x0, x1, times, target=target)
    f, df_ds = model.displacement_and_terminal_velocity(x1, torch.ones_like(times.t), times.s)  # eq. 19
    torch.testing.assert_close(pid.jump, mean_square(df_ds - target.velocity(x1 + f, times.s)))
    tvm = TVM(model)(x0, x1, times._replace(t=torch.ones_like(times.t)), target=target)
    assert torch.equal(pid.total, tvm.total)
    torch.testing.assert_close(per_sample(pid.total, model), per_sample(tvm.total, model), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["moons", "checkerboard", "two_spirals"])
def test_the_oracle_has_no_terminal_velocity_residual(name):
    oracle = make_distribution(name)
    x0 = oracle.sample(200)[0]
    x1 = torch.randn(200, 2, dtype=torch.float64)
    t, s = some_times(200)
    terms = TVM(oracle)(x0, x1, Times(t, s, s))
    assert float(terms.jump.max()) < 1e-20


def test_no_other_velocity_has_a_lower_flow_matching_loss():
    """E||u + d - v||^2 - E||u - v||^2 = E||d||^2 for every perturbation d(x, t): u is the minimum."""
    oracle, n = make_distribution("moons"), 40_000
    x0, x1 = oracle.sample(n)[0], torch.randn(n, 2, dtype=torch.float64)
    t = torch.rand(n, dtype=torch.float64)
    x, v = interpolate(x0, x1, t), conditional_velocity(x0, x1)
    u = oracle.velocity(x, t)
    for perturbation in (torch.full_like(x, 0.1), 0.1 * x, 0.1 * (3 * x).sin(), 0.05 * u, 0.1 * over(t, x) * x.flip(1)):
        rise = (u + perturbation - v).square().sum(1) - (u - v).square().sum(1)
        expected = perturbation.square().sum(1)
        error = rise - expected  # mean zero, as v - u is orthogonal to functions of (x, t)
        assert abs(float(error.mean())) < 4.5 * float(error.std()) / math.sqrt(n)
        assert float(expected.mean()) > 0


def test_guided_target_has_the_guided_velocity_as_its_minimiser():
    """Appendix A.6, by hand: data +1 for class 0 and -1 for class 1, in one dimension, at time s = 1/2.

    Given x and the class, v = (x - m)/s with m = +-1 is certain; without the class it is (x - E[m|x])/s, where
    E[m|x] = tanh((1 - s) x / s^2). So the guided velocity is (w (x - m) + (1 - w)(x - tanh(2 x))) / s.
    """
    s, w = 0.5, 3.0
    oracle = GaussianMixture(torch.tensor([[1.0], [-1.0]]), 1e-6, labels=torch.tensor([0, 1]))
    label = torch.arange(200) % 2
    m = 1.0 - 2.0 * label.double()[:, None]
    x1 = torch.randn(200, 1, dtype=torch.float64)
    x = (1 - s) * m + s * x1
    by_hand = (w * (x - m) + (1 - w) * (x - (2 * x).tanh())) / s

    class ByHand(torch.nn.Module):
        scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x, t, s, condition):
            return by_hand * self.scale

    times = Times(*[torch.full((200,), s, dtype=torch.float64)] * 3)
    model, condition = FlowMap(ByHand()), Condition(label, torch.full((200,), 1 / w, dtype=torch.float64))
    for objective in (FlowMatching(model, null_label=2), TVM(model, null_label=2)):
        terms = objective(m, x1, times, condition, oracle)
        assert float(terms.flow_matching.detach().max()) < 1e-8  # v is certain given the class, so the minimum is zero
    torch.testing.assert_close(oracle.velocity(x, times.s, condition), by_hand, rtol=0, atol=1e-5)


def test_guided_target_is_unbiased_for_the_guided_velocity():
    """E[w v + (1 - w) u(x) - u_w(x, c)] phi(x, c) = 0 for every phi (eq. 63 to 65), on moons with their two classes."""
    oracle, n, w = make_distribution("moons"), 40_000, 2.0
    x0, label = oracle.sample(n)
    x1, t = torch.randn(n, 2, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    x, condition = interpolate(x0, x1, t), Condition(label, torch.full((n,), 1 / w))
    null = oracle.velocity(x, t)
    residual = guided_velocity(x1 - x0, null, condition.beta) - oracle.velocity(x, t, condition)
    for phi in (torch.ones_like(x), x, (2 * x).cos(), over(label.double(), x) * x):
        product = (residual * phi).sum(1)
        assert abs(float(product.mean())) < 4.5 * float(product.std()) / math.sqrt(n)


@pytest.mark.parametrize("name", ["jump", "flow_matching"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_and_names_the_term(name, value):
    terms = {"jump": torch.zeros(4), "flow_matching": torch.zeros(4)}
    LossTerms(**terms).check_finite()
    terms[name] = torch.tensor([0, value, 0, 0])
    with pytest.raises(FloatingPointError, match=f"{name} loss is NaN or infinite in 1 sample"):
        LossTerms(**terms).check_finite()


@pytest.mark.bad_shapes
@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_bad_shapes_and_times_raise(objective):
    model, _, x0, x1, times = setup()
    with pytest.raises(ValueError, match="same shape"):
        objective(model)(x0, x1[:, :1], times)
    with pytest.raises(ValueError, match="shape"):
        objective(model)(x0, x1, Times(*(a[:3] for a in times)))
    with pytest.raises(ValueError, match="time"):
        objective(model)(x0, x1, Times(*(a + 2 for a in times)))


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_guidance_without_a_null_label_raises(objective):
    model, _, x0, x1, times = setup()
    with pytest.raises(ValueError, match="null_label"):
        objective(model)(x0, x1, times, guidance()[0])


def test_an_objective_has_a_curriculum_if_it_listens_to_progress():
    for kind in OBJECTIVES.values():
        assert kind.has_curriculum == (kind.set_progress is not Objective.set_progress)
