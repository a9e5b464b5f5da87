import pytest
import torch

from tvm_ref.interpolant import conditional_velocity, interpolate


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5, 5)])
def test_path_runs_from_data_to_noise_with_velocity_v(shape):
    x0, x1 = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    xt = interpolate(x0, x1, t)
    assert torch.equal(xt[0], x0[0])
    assert torch.equal(xt[3], x1[3])
    rate = torch.func.jvp(lambda t: interpolate(x0, x1, t), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(rate, conditional_velocity(x0, x1))


@pytest.mark.bad_shapes
def test_shapes_that_do_not_fit_raise():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="same shape"):
        interpolate(x, x[:, :1], torch.zeros(4))
    with pytest.raises(ValueError, match=r"\[4\]"):
        interpolate(x, x, torch.zeros(2))
