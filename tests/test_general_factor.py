"""The factor gamma(t, s) = sin(s) - sin(t), another one that vanishes at s = t."""

import pytest
import torch

from tests.networks import Waves, some_times
from tvm_ref.general_factor import GeneralFactor
from tvm_ref.objectives import MeanFlow
from tvm_ref.shapes import over
from tvm_ref.time_samplers import Times


def test_general_factor_equals_closed_form_and_keeps_the_velocity_condition():
    network, x, (t, s) = Waves(), torch.randn(5, 2, dtype=torch.float64), some_times(5)
    flow_map = GeneralFactor(network, lambda t, s: s.sin() - t.sin())
    f, df_ds = flow_map.displacement_and_terminal_velocity(x, t, s)
    gamma, gamma_s, F = over(s.sin() - t.sin(), x), over(s.cos(), x), network(x, t, s)
    torch.testing.assert_close(f, gamma * F)
    torch.testing.assert_close(df_ds, gamma_s * F + gamma * network.ds(x, t, s))
    torch.testing.assert_close(flow_map.displacement(x, t, s), f)
    torch.testing.assert_close(flow_map.jump(x, t, s), x + f)
    at_t = flow_map.displacement_and_terminal_velocity(x, t, t)[1]  # eq. 21: u(x, t) = d/ds f at s = t
    torch.testing.assert_close(flow_map.velocity(x, t), at_t)


def test_mean_flow_and_its_relatives_refuse_another_factor():
    x, (t, s) = torch.randn(5, 2, dtype=torch.float64), some_times(5)
    model = GeneralFactor(Waves(), lambda t, s: s.sin() - t.sin())
    with pytest.raises(ValueError, match="only for the factor s - t"):
        MeanFlow(model)(x, x, Times(t, s, s))
