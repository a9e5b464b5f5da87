import torch

from imagenet.data.digits import load_digits


def test_the_split_is_fixed_whole_and_in_proportion():
    (x, y), (x_test, y_test) = load_digits()
    assert x.shape == (1437, 1, 8, 8)
    assert x_test.shape == (360, 1, 8, 8)
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    assert ((torch.bincount(y_test) - torch.bincount(y) / 4).abs() < 2).all()
    rows = torch.cat([x, x_test]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797  # no image is in both parts, or twice in one
