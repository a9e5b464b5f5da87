import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tvm_ref.layers import Linear


def pair() -> tuple[Linear, nn.Linear]:
    ours, theirs = Linear(5, 7, dtype=torch.float64), nn.Linear(5, 7, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_equals_nn_linear_in_value_tangent_and_all_gradients():
    x, dx = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5, dtype=torch.float64)
    dx.requires_grad_()
    results = []
    for layer in pair():
        y, dy = torch.func.jvp(layer, (x,), (dx,))
        gradients = torch.autograd.grad((y.sin() * dy.cos()).sum(), [x, dx, layer.weight, layer.bias])
        results.append((layer(x), y, dy, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_with_a_tangent_on_the_weights_too():
    ours, theirs = pair()
    x, dx, dw = torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.randn(7, 5).double()
    results = [
        torch.func.jvp(
            lambda x, w, layer=layer: torch.func.functional_call(layer, {"weight": w}, (x,)),
            (x, layer.weight),
            (dx, dw),
        )
        for layer in (ours, theirs)
    ]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("layer", "forward", "both"), [(Linear, 2, 6), (nn.Linear, 3, 8)])
def test_products_under_a_jvp(layer, forward, both):
    """Two products forward and six in all, where nn.Linear takes three and eight."""
    net, x, dx = layer(8, 8), torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    product = 2 * 4 * 8 * 8
    with FlopCounterMode(display=False) as counter:
        y, dy = torch.func.jvp(net, (x,), (dx,))
        assert counter.get_total_flops() == forward * product
        (y.square().sum() + dy.square().sum()).backward()
    assert counter.get_total_flops() == both * product


def test_compiled_a_plain_call_before_a_jvp_does_not_hide_its_tangent():
    """Improved MeanFlow, and MeanFlow with guidance, call a network twice: first as it is, then inside a JVP.

    torch.compile once took the level of the first call, "no JVP is running", for that of the second, and failed.
    """
    layer = Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def both(x):
        v = layer(x)
        return torch.func.jvp(lambda x: layer(x).sin(), (x,), (v,))[1]

    torch.testing.assert_close(torch.compile(both, backend="aot_eager", fullgraph=True)(x), both(x))
