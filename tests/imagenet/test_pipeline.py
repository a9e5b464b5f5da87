from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagenet import encode, sample, train
from imagenet.image_files import ImageFiles

pytest.importorskip("diffusers")
from tests.autoencoders import tiny_vae
from tests.imagenet.commands import status


def test_from_a_folder_of_pictures_to_new_pictures(tmp_path: Path, capsys):
    """Encode, train, sample: what one command writes, the next one reads."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    latents, run, out = (str(tmp_path / name) for name in ("latents", "run", "new.npz"))
    vae = tiny_vae()
    options = ["--image-size", "16", "--batch-size", "4", "--device", "cpu"]
    assert encode.main([str(tmp_path / "pictures"), "--out", latents, *options], vae=vae) == 0

    data = ["--data", "latents", "--data-path", latents, "--in-channels", "4", "--classes", "2"]
    size = ["--hidden-size", "16", "--depth", "1", "--steps", "3", "--batch-size", "8", "--device", "cpu"]
    assert train.main([*data, *size, "--optimizer", "adamw", "--out", run]) == 0

    drawn = ["--out", out, "--count", "3", "--steps", "2", "--device", "cpu"]
    assert status(sample.main, [run, *drawn], vae=vae) == 2
    assert "say --latents FOLDER" in capsys.readouterr().err
    assert sample.main([run, *drawn, "--latents", latents], vae=vae) == 0
    assert next(ImageFiles(Path(out)).batches(3)).shape == (3, 3, 16, 16)
