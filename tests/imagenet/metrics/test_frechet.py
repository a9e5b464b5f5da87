import numpy as np
import pytest
from scipy.linalg import sqrtm

from imagenet.metrics.frechet import frechet_distance, gaussian_statistics, precision_recall

rng = np.random.default_rng(0)


def rotation(d: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def covariance(d: int, rank: int | None = None) -> np.ndarray:
    root = rng.standard_normal((d, rank or 2 * d))
    return root @ root.T / root.shape[1]


def test_statistics_divide_by_n_minus_1():
    mean, sigma = gaussian_statistics([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    np.testing.assert_array_equal(mean, [2, 2])
    np.testing.assert_array_equal(sigma, [[4, 3], [3, 3]])
    assert gaussian_statistics(np.ones((5, 1), np.float32)).covariance.shape == (1, 1)


def test_statistics_of_half_precision_features_do_not_overflow():
    features = np.full((1000, 2), 200.0, np.float16)
    np.testing.assert_array_equal(gaussian_statistics(features).mean, 200)


def test_frechet_of_commuting_covariances_is_that_of_their_roots():
    """For sigma_i = Q diag(a_i^2) Q^T the distance is |mu1 - mu2|^2 + |a1 - a2|^2."""
    q, a1, a2, mu = rotation(6), rng.random(6), rng.random(6), rng.standard_normal((2, 6))
    distance = frechet_distance(mu[0], q * a1**2 @ q.T, mu[1], q * a2**2 @ q.T)
    assert distance == pytest.approx(np.square(mu[0] - mu[1]).sum() + np.square(a1 - a2).sum(), rel=1e-12)


def test_frechet_of_covariances_that_do_not_commute_equals_the_matrix_root():
    s1, s2 = covariance(8), covariance(8)
    expected = np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(np.zeros(8), s1, np.zeros(8), s2) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_equal_gaussians_is_zero_and_never_negative():
    for rank in (None, 3):
        sigma = covariance(40, rank)
        assert 0 <= frechet_distance(np.ones(40), sigma, np.ones(40), sigma) < 1e-12 * np.trace(sigma)


def test_frechet_of_rank_one_covariances():
    """S1 = a a^T, S2 = b b^T: tr (S1 S2)^(1/2) = |a . b|, and rounding in the 299 zero eigenvalues adds nothing."""
    a, b = rng.standard_normal((2, 300))
    distance = frechet_distance(np.zeros(300), np.outer(a, a), np.zeros(300), np.outer(b, b))
    assert distance == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-12)


def test_frechet_to_a_point_is_the_second_moment():
    s, mu = covariance(5), rng.standard_normal(5)
    assert frechet_distance(mu, s, np.zeros(5), np.zeros((5, 5))) == pytest.approx(mu @ mu + np.trace(s))


def test_frechet_is_symmetric_and_invariant_to_rotation_and_order_of_samples():
    x, y, q = rng.standard_normal((30, 12)), 2 + rng.standard_normal((9, 12)) @ covariance(12), rotation(12)
    distance = frechet_distance(*gaussian_statistics(x), *gaussian_statistics(y))
    for u, v in ((y, x), (x @ q, y @ q), (x + 1, y + 1), (rng.permutation(x), rng.permutation(y))):
        assert frechet_distance(*gaussian_statistics(u), *gaussian_statistics(v)) == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(2), np.eye(2), np.zeros(2), np.diag([1.0, -1.0])), "negative eigenvalues"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
    ],
)
def test_frechet_refuses_what_is_no_gaussian(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


def test_precision_and_recall_counted_by_hand():
    """On a line, k = 1: 0, 1, 3 reach 1, 1, 2 far and cover [-1, 5]; 4.5, 6, 6.5 reach 1.5, 0.5, 0.5: [3, 7]."""
    precision, recall = precision_recall([[0.0], [1.0], [3.0]], [[4.5], [6.0], [6.5]], k=1)
    assert (precision, recall) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_precision_and_recall_of_known_cases():
    x = rng.standard_normal((200, 4))
    assert precision_recall(x, rng.permutation(x)) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    precision, recall = precision_recall(x, np.repeat(x[:1], 50, 0))  # one mode: every fake is real, one real is found
    assert (precision, recall) == (1, 1 / 200)


def test_precision_and_recall_change_places_and_ignore_order_and_rotation():
    real, fake, q = rng.standard_normal((1500, 3)), 0.5 * rng.standard_normal((1100, 3)), rotation(3)  # several chunks
    precision, recall = precision_recall(real, fake)
    assert precision > recall + 0.1
    assert precision_recall(fake, real) == (recall, precision)
    assert precision_recall(rng.permutation(real), rng.permutation(fake)) == (precision, recall)
    assert precision_recall(real @ q, fake @ q) == pytest.approx((precision, recall), abs=2e-3)
