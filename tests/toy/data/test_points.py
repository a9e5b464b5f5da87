"""Own points: units that round-trip, a bandwidth, outliers, samples in the user's units."""

import math

import numpy as np
import pytest
import torch

from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.points import MAX_CENTRES, OwnPoints, far_points, likely_bandwidth, load_points, units_of


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal([3, 10], [0.2, 2], (60, 2)), rng.normal([7, -10], [0.2, 2], (40, 2))])


@pytest.mark.parametrize("bandwidth", [0.0, 0.01, 1.0, 2.0])
def test_bandwidth_out_of_range_raises(tmp_path, points, bandwidth):
    path = tmp_path / "points.npy"
    np.save(path, points)
    with pytest.raises(ValueError, match="bandwidth"):
        load_points(path, bandwidth)


def test_many_points_are_thinned_and_it_says_so():
    oracle = OwnPoints(torch.randn(MAX_CENTRES + 1, 2, dtype=torch.float64), 0.2)
    assert len(oracle.centres) == MAX_CENTRES
    assert "4,097 points, of which a random 4,096 are used" in oracle.describe()[0]


@pytest.mark.parametrize("bandwidth", [0.03, 0.3, 0.9])
def test_units_lead_back_to_the_points(points, bandwidth):
    """The centres are the points, and the moments of samples theirs, but for what the Gaussians widen."""
    points = torch.from_numpy(points) * torch.tensor([1e-3, 1e4]) + torch.tensor([5e2, 0.0])
    oracle = OwnPoints(points, bandwidth)
    torch.testing.assert_close(oracle.units.restore(oracle.centres), points, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(oracle.units.standardise(points), oracle.centres, rtol=1e-9, atol=1e-9)
    x = torch.randn(50, 2, dtype=torch.float64)
    torch.testing.assert_close(oracle.units.standardise(oracle.units.restore(x)), x, rtol=1e-6, atol=1e-6)
    samples = oracle.units.restore(oracle.sample(40_000, torch.Generator().manual_seed(0))[0])
    deviation = points.std(0, correction=0)
    assert (((samples.mean(0) - points.mean(0)) / deviation).abs() < 0.05).all()
    torch.testing.assert_close(samples.std(0), deviation / math.sqrt(1 - bandwidth**2), rtol=0.03, atol=0)


def test_units_of_other_distributions_are_the_standardised_ones():
    x = torch.randn(5, 2, dtype=torch.float64)
    assert torch.equal(units_of(make_distribution("moons")).restore(x), x)


def test_outliers_are_found_farthest_first_and_told(points):
    oracle = OwnPoints(torch.from_numpy(points))
    assert oracle.summary["outliers"] == 0
    assert not any("far from" in line for line in oracle.describe())
    points[17] = [5, 1e4]
    points[4] = [-400, 0]
    assert far_points(torch.from_numpy(points)).tolist() == [17, 4]
    oracle = OwnPoints(torch.from_numpy(points))
    assert oracle.summary["outliers"] == 2
    assert "2 points lie far from the others, the farthest at (5, 10000)" in oracle.describe()[-1]
    points[:60, 0] = 7.0  # an axis of which most values are equal has no scale to judge by
    assert far_points(torch.from_numpy(points)).tolist() == [17]


def test_outliers_are_left_out_on_request_and_counted(tmp_path, points):
    path = tmp_path / "points.npy"
    np.save(path, np.concatenate([[[5, 1e4], [np.nan, 1]], points, [[-400, 0]]]))
    assert load_points(path, 0.2).summary["left_out"] == {"rows with gaps": 1, "outliers": 0}
    oracle = load_points(path, 0.2, drop_outliers=True)
    np.testing.assert_array_equal(oracle.points, points)
    assert "left out: rows with gaps (1), outliers (2)" in oracle.describe()
    np.save(path, np.concatenate([points[:8], [[5, 1e4], [-400, 0]]]))
    with pytest.raises(ValueError, match="got 8, besides 2 outliers"):
        load_points(path, drop_outliers=True)


def test_the_likely_bandwidth_is_the_best_of_all_candidates():
    """Not all are tried; over 40, none would have been better."""
    for seed, n in enumerate((30, 100, 400)):
        x = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x[: n // 2] *= 0.2
        square = torch.cdist(x, x).square() + torch.diag(torch.full((n,), math.inf))
        scores = {
            h: float((-square / (2 * h**2)).logsumexp(1).mean()) - 2 * math.log(h) for h in np.geomspace(0.03, 0.5, 40)
        }
        assert likely_bandwidth(x) == pytest.approx(max(scores, key=scores.get))


def test_an_outlier_widens_no_bandwidth():
    """In units of the points it stays, but for the grid of candidates, 7 % apart."""
    points = torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_one = torch.cat([points, torch.tensor([[20.0, 20.0]])])
    widths = [OwnPoints(p).summary["bandwidth"] * float(p.std()) for p in (points, with_one)]
    assert widths[1] == pytest.approx(widths[0], rel=0.08)


@pytest.mark.slow
def test_likely_bandwidth_is_near_the_best_for_a_gaussian():
    """For n points of N(0, I) in 2D the bandwidth that is best on average is about n^(-1/6)."""
    x = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert 0.6 < likely_bandwidth(x) / 1000 ** (-1 / 6) < 1.3
    doubled = torch.cat([x, x])  # duplicates make every bandwidth but the smallest look too wide
    assert likely_bandwidth(doubled) == pytest.approx(0.03)
