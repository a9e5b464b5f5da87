"""Mistakes that the user can mend end every command with one line and status 2, and leaves nothing behind."""

import importlib
import pickle
import shlex
import shutil
from pathlib import Path

import pytest

from imagenet.config import Config, build_model
from imagenet.weights import save_weights
from tests.commands import one_line

CONFIG = Config(data="digits", hidden_size=16, depth=1, heads=2, w=2.0)


@pytest.fixture
def here(tmp_path, monkeypatch, pictures, vae):
    """A folder with a model of digits, pictures, an autoencoder, and what is no weights."""
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / "model.safetensors", build_model(CONFIG).network.state_dict(), CONFIG)
    shutil.copytree(pictures, "pictures")
    shutil.copytree(vae, "vae")
    Path("im256_w2.pkl").write_bytes(pickle.dumps({"weights": 1}))
    Path("im512_w2p5.pkl").write_bytes(b"PK\x03\x04")
    return tmp_path


# the values of a configuration are tested with it (test_config.py), what argparse refuses with it (tests/cli)
BAD = [
    ("train", "imagenet128", "invalid choice: 'imagenet128'"),
    ("train", "--equal-share .6 --noise-share .6", "nor exceed 1 together"),
    ("train", "--heads 5", "heads"),
    ("train", "--w 2 --w-max 1", "--w must be positive and at most --w-max"),
    ("train", "--accumulate 7", "--accumulate 7 does not divide --batch-size 128"),
    ("train", "imagenet256-w2 --attention plain", "latents need data_path"),
    ("train", "imagenet256-w2 --attention plain --data-path nowhere", "nowhere holds no latents"),
    ("train", "folder", "needs --data-path, a folder of pictures that exists; got None"),
    ("train", "folder --data-path pictures --out pictures/run", "lies inside pictures"),
    ("train", "folder --data-path vae", "vae holds no images"),
    ("train", "--input-size 16", "the configuration asks for [1, 16, 16]"),
    ("train", "--init nowhere.safetensors", "nowhere.safetensors cannot be read"),
    ("train", "--init model.safetensors --hidden-size 32 --depth 1", "has hidden_size 16, this run 32"),
    ("train", "--init model.safetensors --hidden-size 16 --depth 1 --no-scaled", "has scaled True, this run False"),
    ("train", "--w-max 0", "--w must be positive and at most --w-max"),
    ("train", "--beta2 1", "--beta2 must be below 1"),
    ("train", "--flip", "--flip is for pictures of your own, not for digits"),
    ("train", "--out vae", "vae/config.json: not a configuration of this program"),
    ("train", "--workers -1", "--workers must be at least 0"),
    ("train", "--device cuda:99", "--device cuda:99 cannot be used here"),
    ("train", "--optimizer soap --parallel fsdp", "does not go with --parallel fsdp"),
    ("train", "--objective fm --settings detach_jvp=true", "has no 'detach_jvp'"),
    ("train", "--out /proc/none", "/proc"),
    ("train", "--out /dev/null", "/dev/null is a file"),
    ("sample", "fashionable --out a.png", "nothing is there; models that come along: digits"),
    ("evaluate", "fashionable", "nothing is there; models that come along: digits"),
    ("sample", "model.safetensors --out a.png --count 0", "--count must be at least 1"),
    ("sample", "model.safetensors --out a --count 1000001", "--count must be at most 1000000"),
    ("sample", "model.safetensors --out a.png --steps 0", "--steps must be at least 1"),
    ("sample", "model.safetensors --out a.png --classes 10", "classes must lie in 0 to 9; got 10"),
    ("sample", "model.safetensors --out a.png --seed -1", "seed must be at least 0"),
    ("sample", "model.safetensors --out a.png --w 0", "w must be positive"),
    ("sample", "model.safetensors --out a.JPEG", "or be a folder; .JPEG is not written"),
    ("evaluate", "pictures", "--reference is needed"),
    ("evaluate", "pictures --reference pictures --count 13", "holds 12 images, fewer than --count 13"),
    ("evaluate", "pictures --reference pictures --count 9", "--count must be at least 10"),
    ("evaluate", "model.safetensors --count 20", "--count and --classes go with --reference"),
    ("evaluate", "pictures --reference pictures --out vae", "exists already; choose another --out"),
    ("average", "pictures --decay 0.9 --out a.safetensors", "pictures holds no run"),
    ("average", "pictures --decay 1 --out a.safetensors", "--decay must lie in [0, 1)"),
    ("average", "pictures --width 0.3 --out a.safetensors", "--width must lie between 0 and 0.28"),
    ("encode", "absent --out out", "absent is not a folder"),
    ("encode", "vae --out out --vae vae", "vae holds no images"),
    ("encode", "pictures --out out --batch-size 0", "--batch-size must be at least 1"),
    ("encode", "pictures --out pictures/out", "lies inside"),
    ("encode", "pictures --out out --vae ./nowhere", "no autoencoder ./nowhere here"),
    ("convert", "absent.pkl out.safetensors", "say the preset with --preset"),
    ("convert", "absent.pkl out.safetensors --preset imagenet256-w2", "No such file"),
    ("convert", "im512_w2p5.pkl out.safetensors", "refers to something outside of it"),
    ("convert", "im256_w2.pkl out.safetensors", "no network ('ema' or 'net') in it, only 'weights'"),
    ("convert", "im256_w2.pkl model.safetensors", "exists already"),
    ("benchmark", "--timed 0", "--timed must be at least 1"),
    ("benchmark", "--batch-size 3 --accumulate 2", "--accumulate 2 does not divide"),
]


@pytest.mark.parametrize(("command", "options", "message"), BAD, ids=[f"{name} {words}" for name, words, _ in BAD])
def test_bad_input_ends_with_one_line(here, capsys, command, options, message):
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert message in one_line(capsys, importlib.import_module(f"imagenet.{command}").main, shlex.split(options))
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
