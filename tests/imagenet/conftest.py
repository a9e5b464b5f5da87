"""A run that nothing disturbs, one on latents, and processes that start in a moment.

The package is imported in the fixtures, after --check-shapes has been read.
"""

import multiprocessing
import signal
import time

import numpy as np
import pytest
from PIL import Image


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let no test, with its fixtures, take more than ten minutes: it fails where it waits, and the others go on."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it took ten minutes"))
    signal.alarm(600)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.fixture(scope="session")
def forks():
    """Processes that start in a moment, as a server that has imported everything forks them."""
    from tests.imagenet import workers
    from tests.imagenet.commands import ended

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imagenet.train", "tests.imagenet.workers"])
    process = context.Process(target=workers.quiet, args=(["--help"],))
    process.start()
    assert ended(process) == 0
    return context


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of 120 steps that nothing disturbed, with every tenth step's checkpoint."""
    from tests.imagenet.commands import command

    folder = tmp_path_factory.mktemp("whole") / "run"
    started = time.perf_counter()
    assert command(folder, "--steps", 120, "--save-every", 10, "--keep", 100) == 0
    return folder, time.perf_counter() - started


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Twelve small pictures of noise, of two classes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The folder of a tiny autoencoder."""
    pytest.importorskip("diffusers")
    from tests.autoencoders import tiny_vae

    folder = tmp_path_factory.mktemp("vae") / "tiny"
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory, pictures, vae):
    """Latents 4 x 8 x 8 of the pictures."""
    from imagenet import encode

    out = tmp_path_factory.mktemp("encoded") / "latents"
    options = ["--image-size", "16", "--vae", vae, "--workers", 1, "--device", "cpu"]
    assert encode.main([str(a) for a in (pictures, "--out", out, *options)]) == 0
    return out


@pytest.fixture(scope="session")
def latent_run(tmp_path_factory, latents):
    """A run of two steps on those latents."""
    from tests.imagenet.commands import ON_LATENTS, command

    folder = tmp_path_factory.mktemp("on_latents") / "run"
    assert command(folder, "--data-path", latents, "--steps", 2, base=ON_LATENTS) == 0
    return folder
