import copy

import pytest
import torch
from torch import nn

from tvm_ref.ema import EMA


def test_equals_closed_form_after_warm_up():
    net = nn.Linear(3, 2, dtype=torch.float64)
    ema, decay = EMA(net, 0.5), 0.5
    expected = net.weight.detach().clone()
    for n in range(6):
        with torch.no_grad():
            net.weight += 1
        ema.update(net)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * net.weight.detach()
        torch.testing.assert_close(ema.module.weight, expected, rtol=1e-14, atol=1e-14)
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_decay_zero_follows_and_decay_one_limits_to_the_warm_up():
    net = nn.Linear(3, 2)
    follow = EMA(net, 0.0)
    with torch.no_grad():
        net.weight += 1
    follow.update(net)
    assert torch.equal(follow.module.weight, net.weight)
    assert follow.module.weight is not net.weight


def test_buffers_are_copied_and_state_restores_bit_for_bit():
    net = nn.BatchNorm1d(3)
    a = EMA(net, 0.9)
    for _ in range(3):
        net(torch.randn(8, 3))
        a.update(net)
    assert torch.equal(a.module.running_mean, net.running_mean)
    b = EMA(nn.BatchNorm1d(3), 0.9)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    with torch.no_grad():
        net.weight += 1
    a.update(net)
    b.update(net)
    assert torch.equal(a.module.weight, b.module.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_outside_the_unit_interval_raises(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(nn.Linear(1, 1), decay)


def test_parameters_that_were_replaced_are_followed():
    """FSDP puts new parameters into a module after its average was made; the average must not hold on to the old."""
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.0)
    for m in (module, ema.module):
        m.weight = nn.Parameter(m.weight.detach() + 1, requires_grad=m is module)
    with torch.no_grad():
        module.weight.mul_(3)
    ema.update(module)
    assert torch.equal(ema.module.weight, module.weight)
