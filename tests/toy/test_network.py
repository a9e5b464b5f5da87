from contextlib import nullcontext

import pytest
import torch

from tests.differences import assert_right
from tests.networks import some_times
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.network import ToyNetwork


def network(num_classes: int = 0) -> ToyNetwork:
    net = ToyNetwork(2, num_classes, width=16, depth=3).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return net


def draw(classes: int = 0):
    x = torch.randn(40, 2, dtype=torch.float64)
    condition = Condition(torch.arange(40) % (classes + 1), torch.rand(40, dtype=torch.float64)) if classes else None
    return x, *some_times(40), condition


def test_untrained_network_is_the_flow_of_gaussian_data():
    """Data N(0, I): a mixture of one component with sigma 1, whose oracle solves the flow on its own."""
    x, t, s, _ = draw()
    model, oracle = FlowMap(ToyNetwork().double()), GaussianMixture(torch.zeros(1, 2), 1.0)
    torch.testing.assert_close(model.jump(x, t, s), oracle.jump(x, t, s), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.velocity(x, t), oracle.velocity(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("moving", [(2,), (0, 1), (0, 1, 2)], ids=["s", "x t", "x t s"])
def test_tangents_and_gradients_through_them_against_differences(classes, moving):
    """TVM's JVP runs in s alone, where the network brings its own rules; MeanFlow's in x and t."""
    net, (x, t, s, condition) = network(classes), draw(classes)

    def call(*changes):  # small ones, as the features of x are steep
        changed = (a + 0.02 * change for a, change in zip((x, t, s), changes, strict=True))
        return net(*changed, condition)

    assert_right(call, [torch.zeros_like(a) for a in (x, t, s)], moving, list(net.parameters()), nullcontext)


@pytest.mark.parametrize("classes", [0, 3])
def test_tangents_written_by_hand_change_nothing(classes):
    """A tangent of zero in t sends the same JVP through PyTorch's own rules: values, tangents and gradients agree."""
    net, (x, t, s, condition) = network(classes), draw(classes)
    ds, weights = torch.randn_like(s), torch.randn(2, *x.shape, dtype=x.dtype)

    def gradients(outputs):
        loss = (weights * torch.stack(outputs)).sum()
        return [*outputs, *torch.autograd.grad(loss, list(net.parameters()))]

    by_hand = gradients(torch.func.jvp(lambda s: net(x, t, s, condition), (s,), (ds,)))
    by_torch = gradients(torch.func.jvp(lambda t, s: net(x, t, s, condition), (t, s), (torch.zeros_like(t), ds)))
    torch.testing.assert_close(by_hand, by_torch, rtol=1e-10, atol=1e-10)


def test_classes_and_conditions_go_together():
    x, t, s, condition = draw(3)
    with pytest.raises(ValueError, match="condition"):
        network()(x, t, s, condition)
    with pytest.raises(ValueError, match="condition"):
        network(3)(x, t, s)
    a = network(3)(x, t, s, condition)
    b = network(3)(x, t, s, condition._replace(beta=condition.beta / 2))
    assert not torch.allclose(a, b)


def test_flow_map_is_finite_at_equal_and_extreme_times():
    net = network()
    for time in (0.0, 0.5, 1.0):
        x, t = torch.randn(5, 2, dtype=torch.float64), torch.full((5,), time, dtype=torch.float64)
        f, df_ds = FlowMap(net).displacement_and_terminal_velocity(x, t, t)
        gradients = torch.autograd.grad((f + df_ds).square().sum(), list(net.parameters()))
        assert all(torch.isfinite(g).all() for g in (f, df_ds, *gradients))


def test_classes_shift_an_untrained_network_to_the_flow_of_their_own_gaussian():
    net, m = ToyNetwork(2, 1).double(), torch.tensor([0.4, -1.2], dtype=torch.float64)
    with torch.no_grad():
        net.means.weight[0] = m
    x, t, s, _ = draw()
    condition = Condition(torch.zeros(40, dtype=torch.long), torch.ones(40, dtype=torch.float64))
    oracle = GaussianMixture(m[None], 1.0)
    torch.testing.assert_close(FlowMap(net).jump(x, t, s, condition), oracle.jump(x, t, s), rtol=1e-6, atol=1e-6)
