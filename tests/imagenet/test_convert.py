import hashlib
import os
import pickle
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from imagenet.config import PRESETS, Config, build_model
from imagenet.convert import data_of, main
from imagenet.data.provenance import Provenance
from imagenet.data.vae import NORMALISATION, VAE
from imagenet.weights import load_weights, read_provenance
from tests.commands import one_line

CONFIG = Config(data="latents", input_size=8, in_channels=4, classes=10, hidden_size=32, depth=2, heads=2, w=2.0)


@pytest.fixture(autouse=True)
def _small_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "imagenet256-w2", CONFIG)
    monkeypatch.setitem(PRESETS, "imagenet512-w2.5", replace(CONFIG, w=2.5, scaled=False))


class Released(nn.Module):
    """The parts of a released file around the network."""

    def __init__(self, network: nn.Module, do_scale_param: bool = True) -> None:
        super().__init__()
        self.model = network
        self.do_scale_param = do_scale_param
        self.dtype = torch.bfloat16


def reconstruct(meta: dict) -> None:
    raise AssertionError("this must not be called")


class ReleasedPickler(pickle.Pickler):
    """Pickles as the released files were: a module is a call of a function that runs the source that stands beside."""

    source = ""

    def reducer_override(self, module: object):
        if not isinstance(module, nn.Module) or type(module).__module__.startswith("torch"):
            return NotImplemented
        kept = ("_parameters", "_buffers", "_modules", "training", "do_scale_param", "dtype")
        state = {key: value for key, value in module.__dict__.items() if key in kept}
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": type(module).__name__}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta | {"state": state},)


def release(path: Path, data: object, marker: Path, monkeypatch, protocol: int = 4) -> Path:
    """Write a file in the way of the released ones; its source would make the file `marker`."""
    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = reconstruct
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    monkeypatch.setattr(reconstruct, "__module__", "torch_utils.persistence")
    monkeypatch.setattr(reconstruct, "__qualname__", "_reconstruct_persistent_obj")
    monkeypatch.setattr(reconstruct, "__name__", "_reconstruct_persistent_obj")
    monkeypatch.setattr(ReleasedPickler, "source", f"open({str(marker)!r}, 'w')")
    with path.open("wb") as stream:
        ReleasedPickler(stream, protocol).dump(data)
    return path


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = build_model(CONFIG).network
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("key", ["net", "ema"])
def test_converted_weights_are_the_released_ones_bit_by_bit(tmp_path, monkeypatch, key, protocol):
    net = network()
    other = {"net": Released(network(1))} if key == "ema" else {}  # the averaged network is taken where there are two
    data = other | {key: Released(net), "dataset_kwargs": {"path": "somewhere", "use_labels": True}}
    source = release(tmp_path / "im256_w2.pkl", data, tmp_path / "executed", monkeypatch, protocol)
    out = tmp_path / "out.safetensors"
    assert main([str(source), str(out)]) == 0
    assert not (tmp_path / "executed").exists()

    model, config = load_weights(out)
    assert config == CONFIG
    for name, tensor in net.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], tensor)
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert (about["w"], about["scaled"], about["preset"]) == ("2", "true", "imagenet256-w2")
    assert about["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert read_provenance(out) == Provenance("latents")


def test_released_weights_say_what_makes_pictures_of_their_latents():
    for side, size in ((32, 256), (64, 512)):
        known = Provenance("latents", autoencoder=VAE, normalisation=NORMALISATION[size])
        assert data_of(replace(CONFIG, input_size=side)) == known


def test_weights_that_do_not_fit_are_named(tmp_path, monkeypatch, capsys):
    net = network()
    net.blocks[0].mlp.fc1.bias.data[3] = float("nan")
    source = release(tmp_path / "im256_w2.pkl", {"net": Released(net)}, tmp_path / "executed", monkeypatch)
    error = one_line(capsys, main, [str(source), str(tmp_path / "out.safetensors")])
    assert "blocks.0.mlp.fc1.bias holds numbers that are not finite" in error
    assert not (tmp_path / "out.safetensors").exists()


def test_compiled_modules_are_unwrapped(tmp_path, monkeypatch):
    compiled = torch.compile(Released(network()), backend="eager")
    source = release(tmp_path / "a.pkl", {"net": compiled}, tmp_path / "executed", monkeypatch)
    assert main([str(source), str(tmp_path / "out.safetensors"), "--preset", "imagenet256-w2"]) == 0


def test_the_file_says_whether_it_is_scaled(tmp_path, monkeypatch, capsys):
    for do_scale_param, said in ((True, "scaled"), (False, "plain")):
        data = {"net": Released(network(), do_scale_param)}
        source = release(tmp_path / "im512_w2p5.pkl", data, tmp_path / "executed", monkeypatch)
        out = tmp_path / f"{said}.safetensors"
        assert main([str(source), str(out)]) == 0
        assert said in capsys.readouterr().out
        assert load_weights(out)[1] == replace(CONFIG, w=2.5, scaled=do_scale_param)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_file_is_refused_and_nothing_runs(tmp_path, monkeypatch, capsys):
    net = network()
    net.blocks[0].register_buffer("evil", None)
    net.blocks[0]._buffers["evil"] = Attack(tmp_path / "executed")
    source = release(tmp_path / "im256_w2.pkl", {"net": Released(net)}, tmp_path / "executed", monkeypatch)
    error = one_line(capsys, main, [str(source), str(tmp_path / "out.safetensors")])
    assert "is refused: it asks for 'posix.system'" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["im256_w2.pkl"]
