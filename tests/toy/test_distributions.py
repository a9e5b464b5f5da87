import math

import numpy as np
import pytest
import torch

from tvm_ref.toy.distributions import (
    DISTRIBUTIONS,
    MAX_CENTRES,
    likely_bandwidth,
    load_points,
    make_distribution,
    read_points,
    standardise,
)


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


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal([3, 10], [0.2, 2], (60, 2)), rng.normal([7, -10], [0.2, 2], (40, 2))])


@pytest.mark.parametrize("form", ["npy", "csv", "csv with header", "csv with byte order mark", "CSV"])
def test_points_are_read_back(tmp_path, points, form):
    path = tmp_path / f"points.{form[:3]}"
    if form == "npy":
        np.save(path, points)
    else:
        np.savetxt(path, points, delimiter=",", header="x,y" if "header" in form else "", comments="")
        if "mark" in form:
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    torch.testing.assert_close(read_points(path), torch.from_numpy(points))
    oracle = load_points(path, 0.2)
    torch.testing.assert_close(oracle.centres, standardise(torch.from_numpy(points), 0.2))
    assert len(oracle.centres) == 100


def bad_files():
    yield "missing.csv", None, "no such file"
    yield "points.txt", "1,2\n" * 20, "come as .csv or .npy"
    yield "three.csv", "1,2,3\n" * 20, "N x 2, got 20 x 3"
    yield "text.csv", "x,y\n" + "1,a\n" * 20, "not a table of numbers"
    yield "ragged.csv", "1,2\n" * 20 + "1\n", "not a table of numbers"
    yield "nan.csv", "1,2\n" * 20 + "nan,1\n", "points that are NaN or infinite: 1"
    yield "few.csv", "1,2\n2,3\n", "at least 10 points are needed, got 2"
    yield "empty.csv", "", "empty"
    yield "flat.csv", "".join(f"{i},5\n" for i in range(20)), "column 2 is constant"
    yield "pickle.npy", np.array([{"a": 1}], dtype=object), "not a table of numbers"
    yield "line.npy", np.zeros(20), "N x 2, got 20"
    yield "words.npy", np.array([["a", "b"]] * 20), "not a table of numbers"
    yield "complex.npy", np.zeros((20, 2), dtype=complex), "its type is complex128"
    yield "huge.csv", "1e200,1\n-1e200,2\n" * 10, "beyond 1e100"
    yield "junk.npy", "not numpy", "not a table of numbers"


@pytest.mark.parametrize(("name", "content", "message"), [pytest.param(*c, id=c[0]) for c in bad_files()])
def test_unusable_points_raise_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_points(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bandwidth", [0.0, 0.01, 1.0, 2.0])
def test_bandwidth_out_of_range_raises(tmp_path, points, bandwidth):
    path = tmp_path / "points.npy"
    np.save(path, points)
    with pytest.raises(ValueError, match="bandwidth"):
        load_points(path, bandwidth)


def test_many_points_are_thinned_and_it_says_so(tmp_path, capsys):
    path = tmp_path / "many.npy"
    np.save(path, np.random.default_rng(0).normal(size=(MAX_CENTRES + 1, 2)))
    assert len(load_points(path, 0.2).centres) == MAX_CENTRES
    assert "a random 4,096 of 4,097 points are used" in capsys.readouterr().out


def test_likely_bandwidth_is_near_the_best_for_a_gaussian():
    """For n points of N(0, I) in 2D the bandwidth that is best on average is about n^(-1/6)."""
    x = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert 0.6 < likely_bandwidth(x) / 1000 ** (-1 / 6) < 1.3
    doubled = torch.cat([x, x])  # duplicates make every bandwidth but the smallest look too wide
    assert likely_bandwidth(doubled) == pytest.approx(0.03)
