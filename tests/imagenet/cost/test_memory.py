"""Memory by arithmetic is the memory that is counted, and what is said to fit fits."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from imagenet.config import PRESETS, Config, build_model
from imagenet.cost import memory
from imagenet.cost.memory import (
    fits,
    gradient_bytes,
    kept_bytes,
    refusal,
    smallest_that_fits,
    state_bytes,
    step_bytes,
    target_bytes,
    weights_of,
    working_bytes,
)
from imagenet.distributed import World
from imagenet.training.step import Training
from tests.imagenet.cost.live_memory import kept, peak, target_peak
from tvm_ref import OBJECTIVES

CONFIG = Config(
    data="latents", input_size=16, in_channels=4, classes=10, hidden_size=128, depth=2, heads=2, w=2.0, patch_size=2
)
LARGE = PRESETS["imagenet256-w2"]
SIZES = {
    "small": CONFIG,
    "wide": replace(CONFIG, input_size=8, hidden_size=384, heads=6, depth=2),
    "long": replace(CONFIG, input_size=32, hidden_size=96, heads=3, depth=2),
    "deep": replace(CONFIG, hidden_size=64, depth=6),
}


@pytest.mark.parametrize("tangent", [False, True], ids=["forward", "with tangent"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("precision", "attention"), [("float32", "plain"), ("bfloat16", "fused")])
@pytest.mark.slow
def test_activations_are_those_that_autograd_keeps_on_a_gpu(monkeypatch, precision, attention, checkpointing, tangent):
    """The fused kernels' own autograd.Function and CUDA's autocast run on tensors that have sizes alone."""
    config = replace(CONFIG, precision=precision, attention=attention, checkpointing=checkpointing)
    counted = kept(config, 64, tangent=tangent, monkeypatch=monkeypatch)
    copies = memory.copied_bytes(config, tangent=tangent)
    assert 64 * kept_bytes(config, tangent=tangent) + copies == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("size", "precision", "attention"),
    [
        ("wide", "bfloat16", "plain"),
        ("long", "bfloat16", "plain"),
        ("long", "float32", "fused"),
        ("deep", "bfloat16", "fused"),
    ],
)
@pytest.mark.slow
def test_they_are_at_other_widths_and_depths(monkeypatch, size, precision, attention):
    config = replace(SIZES[size], precision=precision, attention=attention)
    counted = kept(config, 64, tangent=True, monkeypatch=monkeypatch)
    copies = memory.copied_bytes(config, tangent=True)
    assert 64 * kept_bytes(config, tangent=True) + copies == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("size", "precision", "checkpointing"),
    [
        ("small", "float32", False),
        ("small", "float32", True),
        ("wide", "bfloat16", False),
        ("wide", "bfloat16", True),
        ("long", "float32", False),
        ("long", "bfloat16", True),
    ],
)
@pytest.mark.slow
def test_a_step_holds_what_arithmetic_says(size, precision, checkpointing):
    """Real tensors, on the CPU: the most that live at once from the loss to the end of its backward."""
    config = replace(SIZES[size], precision=precision, checkpointing=checkpointing)
    assert working_bytes(config, 4, "cpu") == pytest.approx(peak(config, 4), rel=0.15)


def test_every_objective_has_its_passes():
    """On a GPU, where a batch is compared with the memory, lsd once ended in a KeyError."""
    assert set(memory.PASSES) == set(OBJECTIVES)


@pytest.mark.parametrize("change", [{"objective": key, "w": 1.0} for key in ("fm", "meanflow", "lsd", "soflow")])
def test_the_other_objectives_hold_what_arithmetic_says(change):
    config = replace(CONFIG, **change)
    assert working_bytes(config, 4, "cpu") == pytest.approx(peak(config, 4), rel=0.15)


def test_a_detached_jvp_holds_no_more():
    """With the fused kernels it holds as much: their node for both keeps what is behind the tangent."""
    config = replace(CONFIG, settings={"detach_jvp": True})
    assert peak(config, 4) < working_bytes(config, 4, "cpu")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.slow
def test_a_step_of_the_largest_network_does(monkeypatch, checkpointing):
    """XL/2 with 2 of its 28 blocks and the fused kernels, again without computing anything."""
    monkeypatch.setattr("jvp_attention.operators.why_not", lambda given: "")
    for module in ("shapes", "flow_map", "objectives.base"):  # nothing may look at numbers that are not there
        monkeypatch.setattr(f"tvm_ref.{module}.values_are_cheap", lambda _: False)
    config = replace(LARGE, depth=2, checkpointing=checkpointing)
    with FakeTensorMode():
        counted = peak(config, 8)
    assert working_bytes(config, 8) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(("size", "precision"), [("small", "float32"), ("wide", "bfloat16"), ("long", "bfloat16")])
@pytest.mark.slow
def test_the_target_s_forward_holds_what_arithmetic_says(size, precision):
    config = replace(SIZES[size], precision=precision)
    counted = target_peak(config, 32)
    assert 32 * target_bytes(config) == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_state_and_gradients_are_those_of_training(optimizer):
    config = replace(CONFIG, optimizer=optimizer, objective="fm", batch_size=4, ema=0.99)
    training = Training(config, World(0, 1, torch.device("cpu")))
    parameters = list(training.model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    training.optimizer.step()
    averages = [p for ema in (training.target, training.ema) for p in ema.module.parameters()]
    moments = [a for entry in training.optimizer.state.values() for a in tensors(entry)]
    held = sum(a.numel() * a.element_size() for a in (*parameters, *averages, *moments))
    assert state_bytes(config) == pytest.approx(held, rel=0.01)
    assert gradient_bytes(config) == sum(4 * p.numel() for p in parameters)


def tensors(entry: object) -> list[torch.Tensor]:
    if isinstance(entry, torch.Tensor):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list | tuple) else ()
    return [a for value in values for a in tensors(value)]


def test_fsdp_spreads_the_state_and_gathers_two_blocks():
    spread = replace(LARGE, parallel="fsdp")
    assert state_bytes(spread, 8) == state_bytes(LARGE, 8) // 8
    assert state_bytes(LARGE, 8) == state_bytes(LARGE) == 20 * weights_of(LARGE).all
    assert gradient_bytes(spread, 8) * 8 == pytest.approx(gradient_bytes(LARGE, 8), abs=8)
    assert gradient_bytes(replace(spread, accumulate=2), 8) == gradient_bytes(LARGE, 8)
    network = build_model(replace(CONFIG, parallel="ddp")).network
    block = sum(p.numel() for p in network.blocks[0].parameters())
    rest = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("blocks."))
    small = replace(CONFIG, parallel="fsdp", optimizer="adamw")
    assert memory.gathered_bytes(small) == 4 * (2 * block + 2 * rest)
    assert memory.gathered_bytes(CONFIG) == 0


def test_known_sizes():
    """XL/2 at 256: an image takes about 65 MB in a block and 1.8 GB in all, and the state is 13.6 GB."""
    a_block = sum(memory.block_bytes(LARGE, tangent=tangent) for tangent in (False, True))
    assert a_block == pytest.approx(65e6, rel=0.05)
    assert sum(kept_bytes(LARGE, tangent=tangent) for tangent in (False, True)) == pytest.approx(1.8e9, rel=0.05)
    assert state_bytes(LARGE) == pytest.approx(13.6e9, rel=0.01)
    assert step_bytes(LARGE, 8) > 400e9  # 256 images at once


CARDS = [(80e9, 8), (40e9, 8), (24e9, 1), (24e9, 8), (140e9, 64)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("size", "processes"), CARDS)
def test_the_smallest_that_fits_fits_and_less_does_not(size, processes, parallel):
    config = replace(LARGE, parallel=parallel)
    found = smallest_that_fits(config, size, processes)
    assert fits(found, size, processes)
    assert config.batch_size % (processes * found.accumulate) == 0
    smaller = [a for a in range(1, found.accumulate) if config.batch_size % (processes * a) == 0]
    assert not any(fits(replace(found, accumulate=a), size, processes) for a in smaller)
    if found.checkpointing:
        assert smallest_that_fits(config, size, processes, checkpointing=False) is None


def test_what_does_not_fit_is_refused_with_what_does():
    assert refusal(PRESETS["digits"], 24e9, 1) is None
    said = refusal(LARGE, 80e9, 8)
    assert said.startswith("256 images at once need 4")
    assert "\n" not in said
    plain, checkpointed = (smallest_that_fits(LARGE, 80e9, 8, checkpointing=c) for c in (False, True))
    assert checkpointed.accumulate < plain.accumulate
    assert f"--accumulate {plain.accumulate} or --accumulate {checkpointed.accumulate} --checkpointing fits" in said
    assert refusal(plain, 80e9, 8) is None
    assert refusal(checkpointed, 80e9, 8) is None


def test_where_nothing_fits_fsdp_is_named_or_nothing():
    assert "--parallel fsdp --accumulate" in refusal(LARGE, 16e9, 64)
    assert "nothing fits, not one image at a time" in refusal(LARGE, 1e9, 8)
    assert smallest_that_fits(LARGE, 1e9, 8) is None


def test_it_is_checked_against_what_is_free():
    assert memory.free_bytes(torch.device("cpu")) == math.inf
    memory.check_memory(LARGE, math.inf, 8)
    memory.check_memory(replace(LARGE, accumulate=32), 80e9, 8)
    memory.check_memory(replace(LARGE, compile=True), 80e9, 8)
    with pytest.raises(ValueError, match="256 images at once need"):
        memory.check_memory(LARGE, 80e9, 8)
