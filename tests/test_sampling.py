import math

import pytest
import torch

from tvm_ref.flow_map import FlowMap
from tvm_ref.sampling import EulerStep, sample, sample_path, uniform_times
from tvm_ref.toy.data.distributions import make_distribution


def test_uniform_times_end_exactly():
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [uniform_times(n)[-1] for n in (1, 3, 7, 49)] == [0.0] * 4


@pytest.mark.parametrize("times", [1, 3, 8, [1.0, 0.9, 0.2, 0.0], (1, 0.5, 0)])
def test_jumps_of_the_exact_flow_compose_on_any_grid(times):
    oracle = make_distribution("eight_gaussians")
    x1 = torch.randn(100, 2, dtype=torch.float64)
    exact = oracle.jump(x1, torch.ones(100), torch.zeros(100))
    assert float((sample(oracle.jump, x1, times) - exact).norm(dim=1).max()) < 1e-4


def test_euler_steps_converge_to_the_exact_flow_with_order_one():
    oracle = make_distribution("pinwheel")
    x1 = torch.randn(200, 2, dtype=torch.float64)
    grid = lambda n: [1 - 0.5 * i / n for i in range(n + 1)]  # noqa: E731 - from 1 to 0.5, where the field is smooth
    exact = oracle.jump(x1, torch.ones(200), torch.full((200,), 0.5))
    steps = (64, 256)
    errors = [float((sample(EulerStep(oracle), x1, grid(n)) - exact).norm()) for n in steps]
    assert math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0]) == pytest.approx(1, abs=0.1)


def test_path_holds_every_state_and_calls_follow_the_grid():
    calls = []

    def jump(x, t, s, condition):
        calls.append((float(t[0]), float(s[0]), condition))
        return x + 1

    path = sample_path(jump, torch.zeros(3, 2), [1.0, 0.4, 0.0])
    assert [float(x[0, 0]) for x in path] == [0, 1, 2]
    assert calls == [(1.0, pytest.approx(0.4), None), (pytest.approx(0.4), 0.0, None)]


@pytest.mark.parametrize(
    "times", [0, -1, [1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.2, 0.0], [1.0, -0.1], [1.0, float("nan")]]
)
def test_bad_grids_raise(times):
    with pytest.raises(ValueError, match=r"step|grid"):
        sample(lambda x, t, s, c: x, torch.zeros(3, 2), times)


class Dropping(torch.nn.Module):
    """F = x with dropout, beside a part that stays in eval mode."""

    def __init__(self):
        super().__init__()
        self.drop, self.frozen = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()

    def forward(self, x, t, s, condition):
        return self.frozen(self.drop(x))


@pytest.mark.parametrize("wrap", [lambda m: m, EulerStep])
def test_sampling_drops_nothing_and_leaves_each_module_in_its_mode(wrap):
    model = FlowMap(Dropping())
    torch.testing.assert_close(sample(wrap(model), torch.ones(20, 3)), torch.zeros(20, 3))  # x + (0 - 1) x
    assert model.training
    assert model.network.drop.training
    assert not model.network.frozen.training
