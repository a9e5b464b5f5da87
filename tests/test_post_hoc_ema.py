"""Profiles against averages of known sequences, and the reconstruction of one that was not tracked."""

import math

import pytest
import torch
from torch import nn

from tvm_ref import EMA
from tvm_ref.post_hoc_ema import combine, ema_profile, power_profile

STEPS = 200
UNIT = torch.eye(STEPS + 1, dtype=torch.float64)


def weights(step):
    """Weights whose average is its own profile: a vector for each step."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data = UNIT[step]
    return layer


def averages(decay, at):
    """The averages of an EMA after the steps `at`."""
    ema, found = EMA(weights(0), decay), {}
    for step in range(1, STEPS + 1):
        ema.update(weights(step))
        if step in at:
            found[step] = ema.module.weight.clone()
    return found


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
def test_the_profile_of_an_ema_is_its_average_of_unit_vectors(decay):
    for step, average in averages(decay, {1, 7, STEPS}).items():
        torch.testing.assert_close(ema_profile(decay, step), average[: step + 1])
        assert not average[step + 1 :].any()


@pytest.mark.parametrize("width", [0.05, 0.15, 0.25])
def test_a_power_function_has_its_width_and_is_tracked_by_a_growing_decay(width):
    """At step n it is 1 - p_n, which is (1 - 1/n)^(gamma + 1); the width is a limit, of many steps."""
    p = power_profile(width, 20_000)
    i = torch.linspace(0, 1, len(p), dtype=torch.float64)
    assert float(p @ (i - p @ i) ** 2) ** 0.5 == pytest.approx(width, rel=1e-3)
    gamma = math.log(1 - p[-1]) / math.log1p(-1 / 20_000) - 1
    tracked = weights(0).weight
    for n in range(1, STEPS + 1):
        tracked = torch.lerp(weights(n).weight, tracked, (1 - 1 / n) ** (gamma + 1))
    torch.testing.assert_close(power_profile(width, STEPS), tracked.detach(), rtol=1e-6, atol=1e-12)


def reconstruct(decay, every):
    """An average from those of decay 0.95 every so many steps, the right one, and the error that was announced."""
    stored = averages(0.95, set(range(every, STEPS + 1, every)))
    profiles = [nn.functional.pad(ema_profile(0.95, n), (0, STEPS - n)) for n in stored]
    coefficients, announced = combine(profiles, ema_profile(decay, STEPS))
    made = sum(c * average for c, average in zip(coefficients, stored.values(), strict=True))
    return made, averages(decay, {STEPS})[STEPS], announced


@pytest.mark.parametrize("decay", [0.98, 0.99])
def test_an_average_that_was_not_tracked_is_reconstructed(decay):
    """With the error that is announced, which is of first order in the steps between those that are stored."""
    errors = []
    for every in (20, 10, 5):
        made, wanted, announced = reconstruct(decay, every)
        errors.append(float((made - wanted).norm() / wanted.norm()))
        assert errors[-1] == pytest.approx(announced, rel=1e-6)
    assert errors[2] < 0.05
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


def test_the_tracked_average_is_reconstructed_as_it_is():
    made, wanted, announced = reconstruct(0.95, 10)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-9)
    assert announced < 1e-9
