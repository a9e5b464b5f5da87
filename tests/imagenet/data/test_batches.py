"""Batches as functions of seed and step, whoever draws them, and the data sets."""

import pytest
import torch

from imagenet.config import PRESETS, Config
from imagenet.data import batches as batches_module
from imagenet.data.batches import Batches, loader
from imagenet.data.image_sets import Images, load_data
from imagenet.model.distributed import World
from imagenet.training.step import Training


def test_images_mirror_at_random_by_epoch():
    x = torch.arange(12.0).view(1, 1, 3, 4).expand(200, 1, 3, 4)
    data = Images(x, torch.zeros(200, dtype=torch.long), flip=True)
    first, second = (data.batch(list(range(200)), draw)[0] for draw in (0, 1))
    flipped = (first != x).flatten(1).any(1)
    assert 70 < int(flipped.sum()) < 130
    assert torch.equal(first[flipped], x.flip(-1)[flipped])
    assert not torch.equal(first, second)
    assert torch.equal(first, data.batch(list(range(200)), 0)[0])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_batches_do_not_depend_on_the_number_of_processes(world):
    config = Config(batch_size=96, seed=5)
    data = load_data(config)
    one = Batches(config, data)
    for step in (0, 14, 15, 29, 400):  # 14 and 29 cross an epoch's end
        parts = [Batches(config, data, rank, world)[step] for rank in range(world)]
        expected = one[step]
        assert torch.equal(torch.cat([p.x0 for p in parts]), expected.x0)
        assert torch.equal(torch.cat([p.x1 for p in parts]), expected.x1)
        for i in range(3):
            assert torch.equal(torch.cat([p.times[i] for p in parts]), expected.times[i])
        for i in range(2):
            assert torch.equal(torch.cat([p.condition[i] for p in parts]), expected.condition[i])


def test_every_sample_is_visited_once_per_epoch_in_new_orders():
    config = Config(batch_size=1437 // 3, seed=5)
    data = load_data(config)
    batches = Batches(config, data)
    epochs = [torch.cat([batches[step].x0 for step in range(3 * e, 3 * e + 3)]).flatten(1) for e in range(2)]
    everything = data.x.flatten(1)
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, everything.sort(0).values)
    assert not torch.equal(*epochs)


def test_label_dropout_and_noise_have_their_distribution():
    config = Config(batch_size=4096, w=2.0, w_max=4.0)
    batch = Batches(config, load_data(config))[3]
    null = batch.condition.label == 10
    assert float(null.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert (batch.condition.beta[null] == 1).all()
    beta = batch.condition.beta[~null]
    assert 0.25 <= beta.min() < 0.26
    assert 0.49 < beta.max() <= 0.5
    assert float(batch.x1.mean()) == pytest.approx(0, abs=0.01)
    assert float(batch.x1.std()) == pytest.approx(1, abs=0.01)
    assert len(batch.x1.flatten(1).unique(dim=0)) == 4096  # no two samples share their noise


@pytest.mark.parametrize("size", [8, 16])
def test_noise_and_times_of_small_images_are_even(size):
    """Each of as many intervals of equal probability as a batch has samples holds one of them."""
    config = Config(batch_size=128, input_size=size)
    batches = Batches(config, Images(torch.zeros(256, 1, size, size), torch.zeros(256, dtype=torch.long)))
    normal = torch.distributions.Normal(0.0, 1.0)
    for step in (0, 1, 31, 32, 500):
        batch = batches[step]
        z = torch.logit(batch.times.s_prime) + 0.4  # N(0, 1), as s' is logit-normal
        for column in torch.cat([z[:, None], batch.x1.flatten(1)], 1).T:
            intervals = (normal.cdf(column.double()) * 128).floor()
            assert (len(intervals.unique()) == 128) == (size == 8)


@pytest.mark.slow
def test_even_numbers_halve_the_variance_of_the_gradient_and_leave_its_mean(monkeypatch):
    config = Config(w=1.0, hidden_size=16, depth=1, batch_size=256)
    data, training = load_data(config), Training(config, World())
    for step in range(40):
        training.train_step(Batches(config, data)[step])

    def gradients():
        rows, batches = [], Batches(config, data)
        for step in range(100, 164):
            x0, x1, times, condition = batches[step]
            training.optimizer.zero_grad()
            training.objective(x0, x1, times, condition, training.target.module).total.mean().backward()
            rows.append(torch.cat([p.grad.flatten() for p in training.model.parameters()]).double())
        return torch.stack(rows)

    even = gradients()
    monkeypatch.setattr(batches_module, "SMALL", 0)
    independent = gradients()
    assert float(even.var(0).sum()) < 0.6 * float(independent.var(0).sum())
    error = (even.mean(0) - independent.mean(0)).square() / (independent.var(0) / len(independent))
    assert (
        float(error.nanmean()) < 2
    )  # 1 + what the even ones add, if the means are one; 0/0 where there is no gradient


def test_reading_ahead_gives_the_same_batches():
    config = Config(batch_size=8, steps=6)
    batches = Batches(config, load_data(config))
    for a, b in zip(loader(batches, 2, 0), loader(batches, 2, 2), strict=True):
        assert torch.equal(a.x1, b.x1)
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.condition.label, b.condition.label)


def test_cifar10_as_torchvision_stores_it(monkeypatch, tmp_path):
    """torchvision gives images as [N, H, W, 3] bytes; training sees [3, H, W] in [-1, 1]."""
    datasets = pytest.importorskip("torchvision.datasets")
    pictures = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).remainder(256).byte()

    class Stored:
        def __init__(self, root, train, download):
            assert (root, train, download) == (str(tmp_path), True, True)  # fetched if it is not there
            self.data, self.targets = pictures.numpy(), [3, 9]

    monkeypatch.setattr(datasets, "CIFAR10", Stored)
    data = load_data(PRESETS["cifar10"], tmp_path)
    assert data.shape == (3, 32, 32)
    x, labels = data.batch([1, 0], 0)
    assert labels.tolist() == [9, 3]
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    upright = pictures.permute(0, 3, 1, 2)[[1, 0]].float() / 127.5 - 1
    for a, b in zip(x, upright, strict=True):
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
