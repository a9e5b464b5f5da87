import math

import pytest
import torch

from tvm_ref.toy.data.distributions import DISTRIBUTIONS, make_distribution


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mean_zero_and_variance_one_exactly(name):
    oracle = make_distribution(name)
    weights = oracle.log_weights.exp()[:, None]
    mean = (weights * oracle.centres).sum(0)
    variance = (weights * (oracle.centres - mean).square()).sum(0) + oracle.sigma**2
    torch.testing.assert_close(mean, torch.zeros(2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, torch.ones(2).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "classes"), [("moons", 2), ("circles", 2), ("eight_gaussians", 8), ("pinwheel", 0)])
def test_classes(name, classes):
    assert make_distribution(name).num_classes == classes


@pytest.mark.parametrize("name", ["moons", "circles", "two_spirals", "swiss_roll"])
def test_curves_have_no_gaps(name):
    """Every centre has a neighbour within 1.5 bandwidths: the mixture draws a curve, not beads."""
    oracle = make_distribution(name)
    nearest = torch.cdist(oracle.centres, oracle.centres).fill_diagonal_(math.inf).min(1).values
    assert float(nearest.max()) < 1.5 * oracle.sigma


def test_unknown_name_raises():
    with pytest.raises(ValueError, match="unknown distribution 'moon'"):
        make_distribution("moon")
