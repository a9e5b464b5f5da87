import math

import pytest
import torch

from tvm_ref.distances import wasserstein2


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
    with pytest.raises(ValueError, match="W2 needs"):
        wasserstein2(x, y)
