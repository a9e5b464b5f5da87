import math

import pytest
import torch

from tvm_ref.distances import sampling_floor, sinkhorn_divergence, sliced_wasserstein2, wasserstein2


def test_translation_costs_its_length_whatever_the_order():
    x = torch.randn(200, 2, dtype=torch.float64)
    y = (x + torch.tensor([0.3, -0.4], dtype=torch.float64))[torch.randperm(200)]
    assert wasserstein2(x, y) == pytest.approx(0.5, rel=1e-12)
    assert wasserstein2(x, x[torch.randperm(200)]) == pytest.approx(0, abs=1e-7)


def test_on_the_line_it_pairs_sorted_points():
    x, y = torch.randn(2, 300, 1, dtype=torch.float64)
    expected = float((x.sort(0).values - y.sort(0).values).square().mean().sqrt())
    assert wasserstein2(x, y) == pytest.approx(expected, rel=1e-10)


def test_clouds_of_different_size():
    assert wasserstein2(torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])) == pytest.approx(5)


def test_never_exceeds_a_coupling():
    x, y = torch.randn(2, 400, 2, dtype=torch.float64)
    assert wasserstein2(x, y) <= math.sqrt(float((x - y).square().sum(1).mean()))


def test_sliced_w2_on_the_line_is_w2():
    x, y = torch.randn(300, 1, dtype=torch.float64), 2 * torch.randn(200, 1, dtype=torch.float64) + 1
    assert sliced_wasserstein2(x, y, projections=3) == pytest.approx(wasserstein2(x, y), rel=1e-10)


def test_sliced_w2_of_a_translation_is_its_length_along_a_random_line():
    x, shift = torch.randn(200, 3, dtype=torch.float64), torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    sliced = sliced_wasserstein2(x, x + shift, projections=20_000)
    assert sliced == pytest.approx(1.3 / math.sqrt(3), rel=0.02)  # 20,000 lines: 0.7 % standard error
    assert sliced == sliced_wasserstein2(x, (x + shift)[torch.randperm(200)], projections=20_000)


def test_sliced_w2_never_exceeds_w2():
    x, y = torch.randn(2, 200, 2, dtype=torch.float64)
    assert sliced_wasserstein2(x, y**2) <= wasserstein2(x, y**2)


@pytest.mark.parametrize("regularisation", [0.05, 0.5])
def test_sinkhorn_divergence_of_a_translation_is_its_length(regularisation):
    """Moving a cloud as a whole adds the same cost to every plan, so the regularised plan stays as it is."""
    x = torch.randn(60, 2, dtype=torch.float64)
    y = x + torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert sinkhorn_divergence(x, y, regularisation) == pytest.approx(0.5, abs=1e-3)
    assert sinkhorn_divergence(x, x, regularisation) == pytest.approx(0, abs=1e-3)


def test_sinkhorn_divergence_tends_to_w2():
    x, y = torch.randn(60, 2, dtype=torch.float64), 0.5 * torch.randn(60, 2, dtype=torch.float64) + 1
    exact = wasserstein2(x, y)
    errors = [abs(sinkhorn_divergence(x, y, r) - exact) for r in (1.0, 0.3, 0.03)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02 * exact


def test_sampling_floor_falls_with_points_and_is_reproducible():
    def draw(n, generator):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    floors = {n: sampling_floor(draw, n, repeats=4) for n in (50, 400)}
    assert floors[400][0] < 0.6 * floors[50][0]
    assert all(spread < mean for mean, spread in floors.values())
    assert sampling_floor(draw, 50, repeats=4) == floors[50]
    assert sampling_floor(draw, 400, repeats=2, distance=sliced_wasserstein2)[0] < floors[400][0]


@pytest.mark.parametrize("distance", [wasserstein2, sliced_wasserstein2, sinkhorn_divergence])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 1)),
        (torch.zeros(0, 2), torch.zeros(3, 2)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.full((3, 2), float("nan")), torch.zeros(3, 2)),
    ],
)
def test_bad_clouds_raise(distance, x, y):
    with pytest.raises(ValueError, match="needs"):
        distance(x, y)


def test_bad_settings_raise():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="projection"):
        sliced_wasserstein2(x, x, projections=0)
    with pytest.raises(ValueError, match="regularisation"):
        sinkhorn_divergence(x, x, 0.0)
    with pytest.raises(ValueError, match="repeat"):
        sampling_floor(lambda n, generator: x, 3, repeats=0)
