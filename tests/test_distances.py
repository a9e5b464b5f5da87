import pytest
import torch

from tvm_ref.distances import sampling_floor, wasserstein2


def test_translation_costs_its_length_whatever_the_order():
    x = torch.randn(200, 2, dtype=torch.float64)
    y = (x + torch.tensor([0.3, -0.4], dtype=torch.float64))[torch.randperm(200)]
    assert wasserstein2(x, y) == pytest.approx(0.5, rel=1e-12)
    assert wasserstein2(x, x[torch.randperm(200)]) == pytest.approx(0, abs=1e-7)


def test_on_the_line_it_pairs_sorted_points():
    x, y = torch.randn(2, 300, 1, dtype=torch.float64)
    expected = float((x.sort(0).values - y.sort(0).values).square().mean().sqrt())
    assert wasserstein2(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("close", [True, False])
def test_a_pairing_costs_what_a_plan_of_transport_does(close):
    """With each point of one cloud doubled the measures are the same, and so is the cost; close clouds are paired."""
    x, y = torch.randn(2, 60, 2, dtype=torch.float64)
    if close:
        y = x + 0.1 * y
        y[:2] = y[[1, 0]]  # the rows are not the best pairing
    w2 = wasserstein2(x, y)
    assert w2 == pytest.approx(wasserstein2(x, y.repeat(2, 1)), rel=1e-9)  # of different size: a plan
    assert w2 == pytest.approx(wasserstein2(x[torch.randperm(60)], y), rel=1e-9)
    assert w2 < float((x - y).square().sum(1).mean().sqrt())


def test_clouds_of_different_size():
    assert wasserstein2(torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])) == pytest.approx(5)


def test_sampling_floor_falls_with_points_and_is_reproducible():
    def draw(n, generator):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    floors = {n: sampling_floor(draw, n, repeats=4) for n in (50, 400)}
    assert floors[400][0] < 0.6 * floors[50][0]
    assert all(spread < mean for mean, spread in floors.values())
    assert sampling_floor(draw, 50, repeats=4) == floors[50]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 1)),
        (torch.zeros(0, 2), torch.zeros(3, 2)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.full((3, 2), float("nan")), torch.zeros(3, 2)),
    ],
)
def test_bad_clouds_raise(x, y):
    with pytest.raises(ValueError, match="needs"):
        wasserstein2(x, y)


def test_a_floor_of_no_repeats_raises():
    with pytest.raises(ValueError, match="repeat"):
        sampling_floor(lambda n, generator: torch.zeros(3, 2), 3, repeats=0)
