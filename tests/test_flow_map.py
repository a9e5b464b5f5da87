import math

import pytest
import torch
from torch import Tensor, nn

from tests.differences import difference, double, randn_like
from tests.networks import Waves, some_times
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.shapes import over

SHAPES = [(5, 2), (3, 4, 2, 2)]


def setup(shape: tuple[int, ...], **options) -> tuple[FlowMap, Waves, Tensor, Tensor, Tensor]:
    network = Waves()
    x = torch.randn(shape, dtype=torch.float64)
    return FlowMap(network, **options), network, x, *some_times(shape[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_displacement_and_its_derivative_equal_closed_form(shape):
    flow_map, network, x, t, s = setup(shape)
    f, df_ds = flow_map.displacement_and_terminal_velocity(x, t, s)
    F, dF_ds = network(x, t, s), network.ds(x, t, s)
    torch.testing.assert_close(f, over(s - t, x) * F, rtol=0, atol=1e-14)
    torch.testing.assert_close(df_ds, F + over(s - t, x) * dF_ds, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow_map.displacement(x, t, s), f, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow_map.jump(x, t, s), x + f, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow_map(x, t, s), x + f, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow_map.velocity(x, t), network(x, t, t), rtol=0, atol=1e-14)


def test_jvp_against_central_differences_has_slope_two():
    flow_map, _, x, t, s = setup((64, 2))
    t, s = 0.2 + 0.7 * t, 0.1 + 0.7 * s
    exact = flow_map.displacement_and_terminal_velocity(x, t, s)[1]
    steps = [2.0**-k for k in (4, 5, 6, 7)]
    errors = []
    for h in steps:
        ahead, behind = (over(s + e - t, x) * flow_map.network(x, t, s + e) for e in (h, -h))
        errors.append(float(((ahead - behind) / (2 * h) - exact).detach().norm()))
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])
    assert slope == pytest.approx(2, abs=0.02)


def test_value_and_tangent_come_from_one_call():
    flow_map, network, x, t, s = setup((5, 2))
    flow_map.displacement_and_terminal_velocity(x, t, s)
    assert network.calls == 1


def test_gradients_flow_through_value_and_tangent_unless_detached():
    flow_map, network, x, t, s = setup((5, 2))
    weight = torch.randn(5, 2, dtype=torch.float64)
    phase, g = network.phase(x, t, s).detach(), over(s - t, x)
    through_value = phase.cos() * over(s, x)  # d/dc of F
    through_tangent = g * (phase.cos() - network.c.detach() * phase.sin() * over(s, x))  # d/dc of (s - t) dF/ds
    values = []
    for detach, expected in ((False, through_value + through_tangent), (True, through_value)):
        f, df_ds = flow_map.displacement_and_terminal_velocity(x, t, s, detach_jvp=detach)
        (gradient,) = torch.autograd.grad((weight * df_ds).sum(), network.c)
        torch.testing.assert_close(gradient, (weight * expected).sum())
        values.append(torch.stack([f, df_ds]))
    assert torch.equal(*values)  # detaching changes no value


@pytest.mark.parametrize("time", [0.0, 0.4, 1.0])
def test_equal_times_give_finite_values_and_gradients(time):
    flow_map, network, x, _, _ = setup((5, 2))
    t = torch.full((5,), time, dtype=torch.float64, requires_grad=True)
    f, df_ds = flow_map.displacement_and_terminal_velocity(x, t, t)
    assert torch.equal(f, torch.zeros_like(f))
    gradients = torch.autograd.grad((f + df_ds).square().sum(), [*network.parameters(), t])
    assert all(torch.isfinite(g).all() for g in gradients)


def test_scaled_parameterisation_multiplies_by_w():
    flow_map, network, x, t, s = setup((5, 2), scaled=True)
    condition = Condition(torch.arange(5), torch.linspace(0.2, 1, 5, dtype=torch.float64))
    plain = FlowMap(network)
    w = over(1 / condition.beta, x)
    torch.testing.assert_close(flow_map.velocity(x, t, condition), w * plain.velocity(x, t, condition))
    for a, b in zip(
        flow_map.displacement_and_terminal_velocity(x, t, s, condition),
        plain.displacement_and_terminal_velocity(x, t, s, condition),
        strict=True,
    ):
        torch.testing.assert_close(a, w * b)


def bad_calls():
    x, half, third = torch.zeros(4, 2), torch.full((4,), 0.5), torch.full((4,), 0.3)
    nan = torch.tensor([0.1, float("nan"), 0.1, 0.1])
    yield "t below s", (x, third, half), "must not exceed"
    yield "t above 1", (x, half + 1, half), r"\[0, 1\]"
    yield "s below 0", (x, half, half - 1), r"\[0, 1\]"
    yield "NaN", (x, half, nan), r"\[0, 1\]"
    yield "time of shape [B, 1]", (x, half[:, None], third), "shape"
    yield "too few times", (x, half[:3], third), "shape"
    yield "one time for all", (x, torch.tensor(0.5), third), "shape"
    yield "no batch axis", (x[:, 0], half, third), "shape"
    yield "too few labels", (x, half, third, Condition(torch.zeros(3, dtype=torch.long), torch.ones(3))), "shape"


@pytest.mark.bad_shapes
@pytest.mark.parametrize(("arguments", "message"), [pytest.param(a, m, id=i) for i, a, m in bad_calls()])
@pytest.mark.parametrize("method", ["displacement", "jump", "displacement_and_terminal_velocity", "__call__"])
def test_bad_input_raises_a_clear_error(arguments, message, method):
    with pytest.raises(ValueError, match=message):
        getattr(FlowMap(Waves()), method)(*arguments)


def test_derivatives_take_times_that_share_memory():
    flow_map, _, x, _, _ = setup((5, 2))
    t, s = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    for method in (
        flow_map.displacement_and_terminal_velocity,
        lambda x, t, s: flow_map.F_and_total_derivative(x, t, s, x),
    ):
        torch.testing.assert_close(method(x, t.expand(5), s.expand(5)), method(x, t.repeat(5), s.repeat(5)))
    one = t.expand(5)
    flow_map.displacement_and_terminal_velocity(x, one, one)


class Ordinary(nn.Module):
    """Layers whose gradient through a JVP PyTorch gets wrong, or refuses: LayerNorm, GLU and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True)
        self.out = nn.Sequential(nn.Linear(8, 16), nn.GLU())

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        return self.out(self.block(x + over((3 * t).sin(), x) + over((2 * (t - s)).cos(), x)))


@pytest.mark.compiles
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ordinary_layers_are_right_in_the_gradient_of_the_terminal_velocity(compiled):
    """Against differences, in all parameters at once, of what plain forwards give."""
    model = FlowMap(double(Ordinary()))
    t, s = some_times(2)
    x, v = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    parameters = list(model.parameters())
    directions = [randn_like(p, k) for k, p in enumerate(parameters)]

    def loss() -> Tensor:
        return (model.displacement_and_terminal_velocity(x, t, s)[1] - v).square().sum()

    def moved(step: float) -> Tensor:
        nn.utils.vector_to_parameters(start + step * nn.utils.parameters_to_vector(directions), parameters)
        df_ds = difference(lambda e: model.network(x, t, s + e) * over(s + e - t, x))
        nn.utils.vector_to_parameters(start, parameters)
        return (df_ds - v).square().sum()

    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    found = torch.autograd.grad(call(), parameters)
    with torch.no_grad():
        start = nn.utils.parameters_to_vector(parameters).clone()
        exact = difference(moved)
    torch.testing.assert_close(
        sum((g * d).sum() for g, d in zip(found, directions, strict=True)), exact, rtol=1e-7, atol=0
    )
