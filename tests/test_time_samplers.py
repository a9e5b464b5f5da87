import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from tvm_ref.time_samplers import TIME_SAMPLERS, Times, TimeSampler, logit_normal

N = 20_000
ALPHA = 1e-4  # of a false alarm in each test; the seed is fixed


def logit_normal_cdf(x, mean, std):
    return norm.cdf((np.log(x) - np.log1p(-x) - mean) / std)


def draw(kind: str, **options) -> tuple[np.ndarray, ...]:
    times = TimeSampler(kind, **options).draw(N, torch.Generator().manual_seed(1))
    assert all(a.shape == (N,) and a.dtype == torch.float32 for a in times)
    return tuple(a.double().numpy() for a in times)


def is_uniform(u) -> bool:
    return kstest(u, "uniform").pvalue > ALPHA


@pytest.mark.parametrize("kind", TIME_SAMPLERS)
def test_times_are_ordered_in_the_unit_interval(kind):
    t, s, s_prime = draw(kind)
    assert (s >= 0).all()
    assert (s <= t).all()
    assert (t <= 1).all()
    assert ((s_prime > 0) & ((s_prime < 1) | (kind == "dyadic"))).all()
    assert (kind in ("trunc", "clamp", "gap")) == np.array_equal(s, s_prime)


def test_trunc_has_its_exact_density():
    t, s, _ = draw("trunc", first=(0.7, 0.9), second=(-0.2, 1.3))
    assert is_uniform(logit_normal_cdf(t, 0.7, 0.9))
    assert is_uniform(logit_normal_cdf(s, -0.2, 1.3) / logit_normal_cdf(t, -0.2, 1.3))


def test_clamp_has_its_exact_density():
    t, s, _ = draw("clamp", first=(0.7, 0.9), second=(-0.2, 1.3))
    assert is_uniform(logit_normal_cdf(t, 0.7, 0.9))
    below = s < t
    p = norm.cdf((0.7 + 0.2) / np.hypot(0.9, 1.3))  # P(s < t), both logits normal
    assert abs(below.mean() - p) < 4 * np.sqrt(p * (1 - p) / N)
    assert is_uniform((logit_normal_cdf(s, -0.2, 1.3) / logit_normal_cdf(t, -0.2, 1.3))[below])


def test_soflow_is_clamp_with_a_shortest_jump_and_times_of_its_own_for_flow_matching():
    normals = {"first": (0.7, 0.9), "second": (-0.2, 1.3)}
    (t, s, s_prime), (start, end, _) = draw("soflow", **normals), draw("clamp", **normals)
    assert np.array_equal(t, start)
    assert np.allclose(s, np.minimum(end, np.maximum(t - 1e-4, 0)), rtol=0, atol=1e-6)
    assert is_uniform(logit_normal_cdf(s_prime, -0.2, 1.0))


@pytest.mark.parametrize("kind", ["gap", "gap*"])
def test_gap_has_its_exact_density(kind):
    t, s, s_prime = draw(kind)
    g = t - s
    keep = g < 1 - 1e-3  # t - s loses digits near 1 in float32
    assert is_uniform(logit_normal_cdf(g, -0.8, 1.0))
    u = logit_normal_cdf(s, -0.4, 1.0) / logit_normal_cdf(1 - g, -0.4, 1.0)
    assert is_uniform(u[keep].clip(0, 1))
    if kind == "gap*":
        assert is_uniform(logit_normal_cdf(s_prime, -0.4, 1.0))
        assert abs(np.corrcoef(s, s_prime)[0, 1]) < 4 / np.sqrt(N)


def test_sorted_times_are_the_larger_and_the_smaller_of_two():
    """P(t < a) = G(a) H(a) and P(s > a) = (1 - G(a)) (1 - H(a)), G and H the two laws."""
    t, s, s_prime = draw("sorted", first=(0.7, 0.9), second=(-0.2, 1.3))
    assert is_uniform(logit_normal_cdf(t, 0.7, 0.9) * logit_normal_cdf(t, -0.2, 1.3))
    assert is_uniform((1 - logit_normal_cdf(s, 0.7, 0.9)) * (1 - logit_normal_cdf(s, -0.2, 1.3)))
    assert np.array_equal(t, s_prime)


def test_triangle_is_uniform():
    t, s, s_prime = draw("triangle")
    assert is_uniform(t**2)
    assert is_uniform(s / t)
    assert is_uniform(s_prime)


def test_dyadic_jumps_lie_on_the_grid_of_their_own_length():
    t, s, s_prime = draw("dyadic")
    levels, counts = np.unique(t - s, return_counts=True)
    assert np.array_equal(levels, 2.0 ** np.arange(-6, 1))
    assert (abs(counts - N / 7) < 4 * np.sqrt(N / 7)).all()
    assert ((s / (t - s)) % 1 == 0).all()
    for d in levels[-3:]:
        places, counts = np.unique(s[t - s == d] / d, return_counts=True)
        assert np.array_equal(places, np.arange(round(1 / d)))
        assert (abs(counts - counts.mean()) < 4 * np.sqrt(counts.mean())).all()
    assert np.array_equal(np.unique(s_prime * 128), np.arange(1, 129))


@pytest.mark.parametrize("kind", TIME_SAMPLERS)
def test_samples_with_equal_times_lie_where_flow_matching_is_done(kind):
    t, s, s_prime = draw(kind, equal_share=1.0)
    assert np.array_equal(t, s)
    assert np.array_equal(s, s_prime)


def test_truncation_is_exact_far_in_the_tail():
    upper = torch.tensor([1e-300, 1e-30, 1e-9, 0.5, 1 - 1e-12, 1.0], dtype=torch.float64)
    for _ in range(100):
        x = logit_normal(torch.rand(6, dtype=torch.float64), (-0.4, 1.0), upper)
        assert torch.isfinite(x).all()
        assert (x <= upper).all()
    bound = torch.full((N,), 1e-3, dtype=torch.float64)  # 6.5 standard deviations out
    x = logit_normal(torch.rand(N, dtype=torch.float64), (-0.4, 1.0), bound).numpy()
    assert is_uniform(logit_normal_cdf(x, -0.4, 1.0) / logit_normal_cdf(1e-3, -0.4, 1.0))


def test_shares_set_t_to_s_and_to_one():
    t, s, _ = draw("gap*", equal_share=0.2, noise_share=0.3)
    for share, observed in ((0.2, (t == s).mean()), (0.3, (t == 1).mean())):
        assert abs(observed - share) < 4 * np.sqrt(share * (1 - share) / N)
    assert (s <= t).all()


def test_same_generator_same_times():
    a, b = (TimeSampler().draw(10, torch.Generator().manual_seed(3)) for _ in range(2))
    assert isinstance(a, Times)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "uniform"}, "kind must be one of"),
        ({"first": (0.0, 0.0)}, "standard deviation"),
        ({"second": (0.0, float("nan"))}, "standard deviation"),
        ({"first": (float("nan"), 1.0)}, "mean"),
        ({"kind": "triangle", "first": (0.0, 1.0)}, "has no mean"),
        ({"equal_share": -0.1}, "share"),
        ({"equal_share": 0.6, "noise_share": 0.6}, "share"),
    ],
)
def test_bad_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        TimeSampler(**options)
