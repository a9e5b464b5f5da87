"""Random and quasi-random numbers as functions of their keys."""

import torch

from tvm_ref.seeding import generator, uniform_numbers


def test_a_key_decides_and_another_gives_other_numbers():
    def draws(key):
        return torch.rand(8, generator=generator(*key)), uniform_numbers(8, 2, *key)

    for a, b, c in zip(draws((1, 2)), draws((1, 2)), draws((2, 1)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_numbers_are_uniform_and_every_batch_fills_the_unit_cube_evenly():
    """Each of 256 strata of a column holds one point of a batch, and so does each of 16 x 16 boxes of two columns."""
    u = uniform_numbers(4 * 256, 9, 0, 3)
    assert ((u > 0) & (u < 1)).all()
    assert torch.isfinite(torch.special.ndtri(u)).all()
    for batch in u.split(256):
        assert all(len(column.unique()) == 256 for column in (batch * 256).floor().T)
        boxes = (batch * 16).floor()
        assert len((16 * boxes[:, 0] + boxes[:, 1]).unique()) == 256
    many = torch.stack([uniform_numbers(16, 9, seed, 0)[5] for seed in range(2000)])  # the same point, scrambled anew
    deviations = [(many - 1 / 2).mean(0) * 12**0.5, (many**2 - 1 / 3).mean(0) / (4 / 45) ** 0.5]
    assert all((abs(d) * 2000**0.5 < 4.5).all() for d in deviations)
