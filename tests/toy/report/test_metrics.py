import math

import pytest
import torch

from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.report.metrics import METRICS, evaluate, low_density, make_reference


@pytest.fixture(scope="module")
def reference():
    return make_reference(make_distribution("moons"), points=400)


def test_the_exact_flow_has_no_error(reference):
    figures = evaluate(reference.distribution.jump, reference, 1)
    assert tuple(figures) == METRICS
    assert figures["paired_rmse"] < 1e-5
    assert figures["w2_same_noise"] < 1e-5
    assert figures["w2_data"] == pytest.approx(figures["w2_floor"], abs=1e-5)


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1])
def test_a_planted_error_is_measured(reference, error):
    """A shift by `error`: every distance to the exact map of the same noise is that shift."""
    shift = error * torch.tensor([math.cos(1), math.sin(1)])

    def jump(x, t, s, condition):
        return reference.distribution.jump(x, t, s, condition) + shift

    figures = evaluate(jump, reference, 1)
    for name in ("paired_rmse", "paired_median", "w2_same_noise"):
        assert figures[name] == pytest.approx(error, rel=1e-4)


def test_low_density_is_one_percent_for_data_and_all_for_a_bridge(reference):
    data = reference.distribution.sample(20_000, torch.Generator().manual_seed(5))[0]
    assert low_density(data, reference) == pytest.approx(0.01, abs=0.003)
    assert low_density(torch.full((10, 2), 5.0, dtype=torch.float64), reference) == 1


def test_samples_that_are_not_finite_have_infinite_figures(reference):
    figures = evaluate(lambda x, t, s, c: x * float("nan"), reference, 1)
    assert set(figures.values()) == {float("inf")}
