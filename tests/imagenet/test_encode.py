import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet.data.latents import Latents
from imagenet.data.pictures import centre_crop
from imagenet.encode import Settings, main
from imagenet.model import distributed
from imagenet.model.distributed import World

pytest.importorskip("diffusers")
from tests.autoencoders import tiny_vae
from tests.imagenet.commands import status

SIZES = {"cat": [(20, 16), (37, 40), (16, 16), (9, 12)], "dog": [(64, 33), (18, 18), (50, 20)]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, sizes in SIZES.items():
        (tmp_path / "images" / name / "deeper").mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            path = tmp_path / "images" / name / ("deeper" if i == 1 else "") / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def encode(source: Path, out: Path, *more: str, vae: torch.nn.Module | None = None) -> int:
    options = [str(source), "--out", str(out), "--image-size", "16", "--batch-size", "2", "--shard-size", "3"]
    return status(main, [*options, "--device", "cpu", "--vae", "tiny", *more], vae=vae or tiny_vae())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_the_posteriors_of_the_images(source, tmp_path):
    assert encode(source, tmp_path / "out") == 0
    latents = Latents(tmp_path / "out")
    paths = [p for name in ("cat", "dog") for p in sorted((source / name).rglob("*.png"), key=str)]
    assert latents.classes == ["cat", "dog"]
    assert latents.labels.tolist() == [0] * 4 + [1] * 3
    for index, path in enumerate(paths):
        pixels = torch.from_numpy(centre_crop(Image.open(path), 16).copy()).permute(2, 0, 1)[None]
        posterior = tiny_vae().encode(pixels / 127.5 - 1).latent_dist
        mean, std = latents.posterior(index)
        torch.testing.assert_close(mean, posterior.mean[0], rtol=1e-3, atol=1e-3)  # stored in half precision
        torch.testing.assert_close(std, posterior.std[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_other_sizes_are_normalised_by_what_was_measured(source, tmp_path):
    """Draws from the posteriors then have mean 0 and standard deviation 1 in every channel."""
    encode(source, tmp_path / "out")
    latents = Latents(tmp_path / "out")
    x = torch.cat([latents.batch(range(len(latents)), k)[0] for k in range(60)]).transpose(0, 1).flatten(1)
    assert x.mean(1).abs().max() < 0.03  # 26,880 draws per channel
    assert (x.std(1) - 1).abs().max() < 0.03


def test_a_folder_of_an_autoencoder_is_found_from_anywhere(source, tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    encode(source, tmp_path / "out")
    assert Latents(tmp_path / "out").autoencoder == str(tmp_path / "tiny")


def test_the_paper_s_constants_are_those_of_its_autoencoder():
    """Another autoencoder once got them in silence, at 256 and 512."""
    assert Settings(image_size=512, vae="a/copy/sd-vae-ft-ema").is_paper_s
    assert not Settings(vae="another").is_paper_s
    assert not Settings(image_size=128).is_paper_s


def interrupted(calls: int) -> torch.nn.Module:
    """An autoencoder that stops the program after some calls, as Ctrl-C does."""
    vae, left = tiny_vae(), iter(range(calls))
    encode = vae.encode

    def encoding(x: torch.Tensor):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(x)

    vae.encode = encoding
    return vae


@pytest.mark.slow
def test_a_stopped_encoding_goes_on_to_the_same_files(source, tmp_path, capsys):
    encode(source, tmp_path / "whole")
    for calls in range(5):  # 3 shards of 2, 2 and 1 batches
        out = tmp_path / f"stopped{calls}"
        assert encode(source, out, vae=interrupted(calls)) == 130
        assert "goes on" in capsys.readouterr().err
        with pytest.raises(ValueError, match="no latents"):
            Latents(out)
        (out / "00002.latents.npy.partial").write_bytes(b"of a process that was killed")
        done = {name: (out / name).stat().st_mtime_ns for name in files(out)}
        assert encode(source, out) == 0
        assert files(out) == files(tmp_path / "whole")
        del done["00002.latents.npy.partial"]
        assert all((out / name).stat().st_mtime_ns == written for name, written in done.items())  # nothing done twice


def test_two_processes_write_the_files_of_one(source, tmp_path, monkeypatch):
    encode(source, tmp_path / "one")
    two = tmp_path / "two"
    for rank in (0, 1, 0):  # rank 0 comes too early to the end, as if there were no barrier, and then again
        monkeypatch.setattr(distributed, "process_group", lambda _, rank=rank: contextlib.nullcontext(World(rank, 2)))
        monkeypatch.setattr(World, "all_gather", lambda self, values: None)
        monkeypatch.setattr(World, "broadcast", lambda self, a: None if a is None else ["00000", "00001", "00002"])
        with contextlib.suppress(FileNotFoundError):  # of rank 1's files, the first time
            encode(source, two)
    assert files(two) == files(tmp_path / "one")


def test_corrupt_images_are_skipped_and_named(source, tmp_path, capsys):
    (source / "cat" / "0.png").write_bytes((source / "cat" / "0.png").read_bytes()[:60])
    (source / "dog" / "0.png").write_text("no image at all")
    assert encode(source, tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "7 pictures, 2 classes, 1 skipped (1 no pictures by their endings or places)" in printed.out
    assert "2 images could not be read" in printed.out
    assert "dog/0.png is skipped: it is no image of a known kind" in printed.err
    assert Latents(tmp_path / "out").labels.tolist() == [0] * 3 + [1] * 2
    for path in source.rglob("*.png"):
        path.write_text("")
    assert encode(source, tmp_path / "none") == 2
    assert "not one of 7 images could be read" in capsys.readouterr().err


def test_nothing_is_overwritten(source, tmp_path, capsys):
    encode(source, tmp_path / "out")
    before = files(tmp_path / "out")
    assert encode(source, tmp_path / "out", "--image-size", "8") == 2
    assert "other image_size (16, not 8)" in capsys.readouterr().err
    assert encode(source, tmp_path / "out", "--vae", "another") == 2
    assert "other vae (tiny, not another)" in capsys.readouterr().err
    assert encode(source, tmp_path / "out") == 0  # the same once more changes nothing
    assert files(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert encode(source, tmp_path / "mine") == 2
    assert "holds something that is not latents" in capsys.readouterr().err


def test_latents_that_are_not_finite_stop_the_encoding(source, tmp_path, capsys):
    vae = tiny_vae()
    vae.quant_conv.bias.data.fill_(1e6)  # beyond half precision
    assert encode(source, tmp_path / "out", vae=vae) == 1
    assert "the latents of cat/0.png are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.npy"))


def test_an_encoding_continues_when_an_image_is_gone(source, tmp_path, capsys):
    """A link to nothing, or an image that was removed, once cost all that was done."""
    (source / "cat" / "nowhere.png").symlink_to("absent.png")
    assert encode(source, tmp_path / "out", vae=interrupted(2)) == 130
    done = (tmp_path / "out" / "00000.latents.npy").stat().st_mtime_ns
    (source / "dog" / "0.png").unlink()
    assert encode(source, tmp_path / "out") == 0
    assert "dog/0.png is skipped: No such file or directory" in capsys.readouterr().err
    assert (tmp_path / "out" / "00000.latents.npy").stat().st_mtime_ns == done
    assert Latents(tmp_path / "out").labels.tolist() == [0] * 4 + [1] * 2


def test_a_source_that_is_gone_is_no_reason_to_skip_its_images(source, tmp_path):
    vae = tiny_vae()
    encoding = vae.encode
    vae.encode = lambda x: (source.exists() and source.rename(tmp_path / "elsewhere") and None) or encoding(x)
    with pytest.raises(FileNotFoundError, match="images is gone"):
        encode(source, tmp_path / "out", vae=vae)
    assert not (tmp_path / "out" / "00000.json").exists()
