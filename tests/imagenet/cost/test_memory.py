"""Bytes that a step holds, counted by hand."""

import types
from dataclasses import replace

import psutil
import pytest
import torch

from imagenet.config import Config
from imagenet.cost.memory import peak_bytes, shortage, step_bytes
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from imagenet.model.distributed import World
from imagenet.training.step import Training

SMALL = Config(depth=2, batch_size=64)


def test_a_peak_is_what_is_held_at_a_time():
    """With vectors of 4 kB: two at once, one after the other, and those that a backward keeps of a forward."""
    a = torch.randn(1000, requires_grad=True)
    b = a.detach()
    for work, peak in (
        (lambda: (b + 1, b + 2), 8000),
        (lambda: [(b + 1, None)[1], b + 2], 4000),
        (lambda: a.exp().exp(), 8000),  # the inner result is kept for the backward
        (lambda: b.exp().exp().exp(), 8000),
        (lambda: a.exp().exp().exp(), 12000),
    ):
        assert peak_bytes(work) == pytest.approx(peak, abs=100)


@pytest.mark.slow
def test_objectives_hold_what_their_terms_do():
    """A quarter of LSD's samples are jumps, of which TVM has one per sample; a target and MeanFlow's tangent go."""
    held = {key: step_bytes(replace(SMALL, objective=key)) for key in ("fm", "tvm", "lsd", "psd", "meanflow")}
    jump = held["tvm"] - held["fm"]
    assert 2 < jump / held["fm"] < 2.6
    assert held["lsd"] == pytest.approx(0.75 * held["fm"] + 0.25 * jump, rel=0.05)
    assert held["meanflow"] == pytest.approx(held["fm"], rel=0.05)
    assert held["psd"] == pytest.approx(held["fm"], rel=0.05)
    assert jump < step_bytes(replace(SMALL, settings={"detach_jvp": True})) < held["tvm"]


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True, "accumulate": 2, "w": 2.0}], ids=str)
def test_a_machine_without_the_memory_for_a_training_is_told(monkeypatch, changes):
    """What is asked for, nothing of it computed, is what two steps hold: the second one has the optimizer's moments."""
    config = replace(SMALL, data="synthetic", optimizer="adamw", **changes)
    batches = Batches(config, load_data(config))

    def train():
        training = Training(config, World())
        for step in range(2):
            training.train_step(batches[step])

    held = peak_bytes(train)
    for free in (0.9 * held, 1.1 * held):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: types.SimpleNamespace(available=int(free)))
        warning = shortage(config, World())
        assert (warning is None) == (free > held)
