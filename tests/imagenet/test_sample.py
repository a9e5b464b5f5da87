import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet.config import Config, build_model
from imagenet.data.image_files import ImageFiles, grid
from imagenet.data.noise import PRIOR, normal
from imagenet.data.vae import NORMALISATION, decode
from imagenet.model import distributed
from imagenet.model.distributed import World
from imagenet.sample import main
from imagenet.sampler import Generator
from imagenet.weights import save_weights
from tests.imagenet.commands import status, torchrun
from tvm_ref import Condition

ROOT = Path(__file__).parents[2]
CONFIG = Config(data="digits", hidden_size=16, depth=1, heads=2, w=2.0, classes=5)


def network(config: Config) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build_model(config).network
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def weights(path: Path, config: Config = CONFIG) -> Path:
    save_weights(path, network(config).state_dict(), config)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return weights(tmp_path / "model.safetensors")


def draw(model: Path, out: Path, *more: str, **keywords) -> int:
    return status(main, [str(model), "--out", str(out), "--device", "cpu", *more], **keywords)


def pixels(path: Path) -> np.ndarray:
    return torch.cat(list(ImageFiles(path).batches(100))).permute(0, 2, 3, 1).numpy()


def read(out: Path) -> np.ndarray:
    return np.array(Image.open(out)) if out.suffix == ".png" else pixels(out)


@pytest.mark.parametrize("objective", ["tvm", "fm"])
def test_images_are_the_flow_map_s_jumps_from_noise_of_their_own(tmp_path, objective):
    """Two steps by hand: x <- x + (s - t) w F(x, t, s), with class i modulo 5; after flow matching F(x, t, t)."""
    model = weights(tmp_path / "model.safetensors", replace(CONFIG, objective=objective))
    assert draw(model, tmp_path / "a.npz", "--count", "7", "--steps", "2", "--seed", "3") == 0
    net = network(CONFIG)
    x = torch.stack([normal((1, 8, 8), PRIOR, 3, i) for i in range(7)])
    condition = Condition(torch.arange(7) % 5, torch.full((7,), 0.5))
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        with torch.no_grad():
            x = x + (s - t) * 2.0 * net(
                x, torch.full((7,), t), torch.full((7,), s if objective == "tvm" else t), condition
            )
    expected = (x.clamp(-1, 1) + 1) * 127.5
    found = pixels(tmp_path / "a.npz")
    assert np.abs(found - expected.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()).max() <= 0.51
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("count", [7, 2])
@pytest.mark.parametrize("out", ["a.npz", "a", "a.png"])
def test_processes_share_the_work(model, tmp_path, out, count, monkeypatch):
    """Ranks 1 and 2 of 3 come first, rank 0 last, as behind a barrier; of 2 images one process has none."""
    whole = tmp_path / f"whole{Path(out).suffix}"
    draw(model, whole, "--count", str(count))
    folder = tmp_path / ("a" if out == "a" else "parts")
    folder.mkdir()
    monkeypatch.setattr(World, "on_first", lambda self, task: folder)
    monkeypatch.setattr(World, "all_gather", lambda self, values: None)
    monkeypatch.setattr(World, "broadcast", lambda self, value: value)
    for rank in (1, 2, 0):
        monkeypatch.setattr(distributed, "process_group", lambda _, rank=rank: contextlib.nullcontext(World(rank, 3)))
        assert draw(model, tmp_path / out, "--count", str(count), "--batch-size", "2") == 0
    assert np.abs(read(tmp_path / out).astype(int) - read(whole)).max() <= 1  # of rounding, as batches differ too
    assert out == "a" or not folder.exists()


@pytest.mark.slow
def test_torchrun_with_two_processes(model, tmp_path):
    draw(model, tmp_path / "one.npz", "--count", "5")
    options = ["--out", tmp_path / "two.npz", "--count", "5", "--device", "cpu"]
    done = torchrun("imagenet/sample.py", model, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images per second") == 1
    assert np.abs(pixels(tmp_path / "two.npz").astype(int) - pixels(tmp_path / "one.npz")).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "one.npz", "two.npz"]


def test_a_grid_has_eight_images_of_each_class_below_one_another(model, tmp_path, capsys):
    """It once held 64 images in 8 columns, whatever the number of classes."""
    assert draw(model, tmp_path / "a.png", "--classes", "4", "1") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["columns: 4, 1"]
    draw(model, tmp_path / "a.npz", "--classes", "4", "1", "--count", "16")
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), grid(pixels(tmp_path / "a.npz"), 2))


def test_another_guidance_weight_warns_and_is_used(model, tmp_path, capsys):
    draw(model, tmp_path / "a.npz", "--count", "3")
    assert "warning" not in capsys.readouterr().err
    assert draw(model, tmp_path / "b.npz", "--count", "3", "--w", "3") == 0
    assert "was trained with w = 2; with w = 3" in capsys.readouterr().err
    assert not np.array_equal(pixels(tmp_path / "a.npz"), pixels(tmp_path / "b.npz"))


def test_latents_are_decoded(tmp_path):
    pytest.importorskip("diffusers")
    from tests.autoencoders import tiny_vae

    config = replace(CONFIG, data="latents", in_channels=4, input_size=32, patch_size=8)
    model = weights(tmp_path / "latents.safetensors", config)
    vae = tiny_vae()
    assert draw(model, tmp_path / "a.npz", "--count", "2", vae=vae) == 0
    net = network(config)
    x = torch.stack([normal((4, 32, 32), PRIOR, 0, i) for i in range(2)])
    with torch.no_grad():
        F = net(x, torch.ones(2), torch.zeros(2), Condition(torch.arange(2), torch.full((2,), 0.5)))
    images = decode(vae, x - 2 * F, NORMALISATION[256]).clamp(-1, 1)
    expected = (images.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert pixels(tmp_path / "a.npz").shape == (2, 64, 64, 3)
    assert np.abs(pixels(tmp_path / "a.npz") - expected).max() <= 0.51


def test_nothing_is_overwritten(model, tmp_path, capsys):
    for name in ("a.npz", "a.png", "a"):
        assert draw(model, tmp_path / name, "--count", "2") == 0
        assert draw(model, tmp_path / name, "--count", "1") == 2
        assert "another --out" in capsys.readouterr().err
    assert len(ImageFiles(tmp_path / "a")) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert draw(model, tmp_path / "mine") == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_is_stopped_leaves_no_half_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(model, tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == [model]
