import numpy as np
import pytest
import torch
from scipy.stats import kstest

from tvm_ref.guidance import Condition, draw_beta, drop_labels, guided_velocity, without_label


def test_beta_is_uniform_between_inverse_weights():
    beta = draw_beta(20_000, 1.25, 4.0, generator=torch.Generator().manual_seed(0)).double().numpy()
    assert kstest((beta - 0.25) / (0.8 - 0.25), "uniform").pvalue > 1e-4


def test_constant_guidance_is_a_range_of_one_weight():
    assert torch.equal(draw_beta(5, 2.0, 2.0), torch.full((5,), 0.5))


@pytest.mark.parametrize("weights", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_bad_weights_raise(weights):
    with pytest.raises(ValueError, match="w_min"):
        draw_beta(3, *weights)


def test_dropped_labels_are_null_with_weight_one_and_the_rest_is_kept():
    n, rate = 20_000, 0.1
    condition = Condition(torch.arange(n) % 7, torch.full((n,), 0.5))
    label, beta = drop_labels(condition, 7, rate, generator=torch.Generator().manual_seed(0))
    dropped = label == 7
    assert abs(float(dropped.double().mean()) - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    assert (beta[dropped] == 1).all()
    assert torch.equal(label[~dropped], condition.label[~dropped])
    assert (beta[~dropped] == 0.5).all()
    assert (condition.label < 7).all()  # the argument is not changed


def test_bad_dropout_rate_raises():
    with pytest.raises(ValueError, match="rate"):
        drop_labels(Condition(torch.zeros(3, dtype=torch.long), torch.ones(3)), 1, 1.5)


def test_without_label_everywhere():
    label, beta = without_label(Condition(torch.zeros(3, dtype=torch.long), torch.full((3,), 0.5)), 4)
    assert label.tolist() == [4, 4, 4]
    assert beta.tolist() == [1, 1, 1]


def test_guided_velocity_extrapolates():
    a, b = torch.tensor([[3.0], [3.0]]), torch.tensor([[1.0], [1.0]])
    torch.testing.assert_close(guided_velocity(a, b, torch.tensor([1.0, 0.5])), torch.tensor([[3.0], [5.0]]))
