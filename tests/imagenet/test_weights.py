"""Weights that say what they need, and that are refused where they cannot be used."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagenet.config import Config, build_model
from imagenet.weights import load_weights, save_weights

CONFIG = Config(hidden_size=16, depth=1)


def test_weights_come_back_with_their_configuration(tmp_path):
    model = build_model(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    save_weights(tmp_path / "w.safetensors", model.network.state_dict(), CONFIG, source="made here")
    again, config = load_weights(tmp_path / "w.safetensors")
    assert config == CONFIG
    assert not any(p.requires_grad for p in again.parameters())
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_cannot_be_used(tmp_path):
    model = build_model(CONFIG)
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path)
    save_file(model.network.state_dict(), path)
    with pytest.raises(ValueError, match="which configuration"):
        load_weights(path)
    save_weights(path, model.network.state_dict(), Config(hidden_size=32, depth=1))
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(path)
    save_file(load_file(path), path, {"config": '{"colour": "red"}'})
    with pytest.raises(ValueError, match="not a configuration"):
        load_weights(path)
    with pytest.raises(ValueError, match=r"holds no run"):
        load_weights(tmp_path)


BIAS = "blocks.0.mlp.fc1.bias"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (BIAS, torch.full((64,), float("nan")), f"{BIAS} holds numbers that are not finite"),
        (BIAS, torch.full((64,), float("inf")), f"{BIAS} holds numbers that are not finite"),
        (BIAS, torch.ones(64, dtype=torch.int32), f"{BIAS} holds torch.int32, not floating-point numbers"),
        (BIAS, torch.ones(64, dtype=torch.complex64), f"{BIAS} holds torch.complex64"),
        (BIAS, torch.ones(65), rf"{BIAS} is of shape \[65\], not \[64\]"),
        (BIAS, None, f"{BIAS} is missing"),
        ("\x1b[2J", torch.ones(1), r"'\\x1b\[2J' is no tensor of this network"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, name, value, message):
    weights = build_model(CONFIG).network.state_dict() | {name: value}
    save_weights(tmp_path / "w.safetensors", {k: a for k, a in weights.items() if a is not None}, CONFIG)
    with pytest.raises(ValueError, match=f"does not fit its configuration: {message}"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("change", [{"hidden_size": 65536, "depth": 30}, {"classes": 2**24}, {"input_size": 4096}])
def test_a_network_beyond_all_memory_is_refused_before_it_is_built(tmp_path, change):
    weights = build_model(CONFIG).network.state_dict()
    save_weights(tmp_path / "w.safetensors", weights, replace(CONFIG, **change))
    with pytest.raises(ValueError, match="does not fit its configuration"):
        load_weights(tmp_path / "w.safetensors")


def test_weights_are_not_replaced_by_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, build_model(CONFIG).network.state_dict(), CONFIG)
    before = path.read_bytes()
    (tmp_path / "w.safetensors.partial").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match="could not be written"):
        save_weights(path, build_model(CONFIG).network.state_dict(), CONFIG)
    assert path.read_bytes() == before


def test_others_may_read_weights_as_any_new_file(tmp_path):
    (tmp_path / "new").touch()
    save_weights(tmp_path / "w.safetensors", build_model(CONFIG).network.state_dict(), CONFIG)
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_equal_weights_are_equal_files(tmp_path):
    """Their metadata once came in an order left to chance."""
    weights = build_model(CONFIG).network.state_dict()
    for i in range(8):
        save_weights(tmp_path / f"{i}.safetensors", weights, CONFIG, step="1", data="{}", ema="é\n\x1f")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
