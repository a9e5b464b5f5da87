"""tutorials/examples: each runs, and does what it says."""

import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

from tutorials.examples import own_network as example
from tvm_ref import Condition


def test_each_wave_has_the_period_and_the_height_of_its_class():
    torch.manual_seed(0)
    x = example.waves(torch.arange(3).repeat(100)).double().view(100, 3, 2, example.LENGTH // 2)
    torch.testing.assert_close(x[:, :, 0], x[:, :, 1], rtol=0, atol=1e-5)
    height = x.flatten(2).abs().amax(2)
    assert ((height > 0.65) & (height < 1.3)).all()
    means = x.flatten(2).square().mean(2) / height.square()  # of sine, square and sawtooth of height 1
    torch.testing.assert_close(means.mean(0), torch.tensor([1 / 2, 1, 1 / 3]).double(), rtol=0.05, atol=0)


def test_the_network_sees_noise_times_class_and_guidance():
    torch.manual_seed(0)
    network = example.Network()
    given = [
        torch.randn(1, 1, example.LENGTH),
        torch.tensor([0.9]),
        torch.tensor([0.4]),
        torch.tensor([1]),
        torch.ones(1),
    ]
    others = [given[0] + 0.1, given[1] + 0.05, given[2] - 0.2, torch.tensor([3]), given[4] / 2]

    def values(x, t, s, label, beta):
        return network(x, t, s, Condition(label, beta))

    assert values(*given).shape == given[0].shape
    for i, other in enumerate(others):
        assert not torch.allclose(values(*given), values(*given[:i], other, *given[i + 1 :]), atol=1e-4)


@pytest.mark.slow
def test_it_checks_its_network_trains_and_draws(tmp_path):
    done = subprocess.run(
        [sys.executable, example.__file__, "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stderr == ""
    first, last = done.stdout.splitlines()
    assert first.startswith("right: value, tangent and gradient")
    assert last.startswith("step 2: loss ")
    assert imread(tmp_path / "own_network.png").std() > 0.01
