"""A run that nothing disturbs, and processes that start in a moment."""

import multiprocessing
import time

import pytest

from tests.imagenet import workers
from tests.imagenet.commands import command


@pytest.fixture(scope="session")
def forks():
    """Processes that start in a moment, as a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imagenet.train", "tests.imagenet.workers"])
    process = context.Process(target=workers.quiet, args=(["--help"],))
    process.start()
    process.join()
    return context


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of 120 steps that nothing disturbed, with every third step's checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    started = time.perf_counter()
    assert command(folder, "--steps", 120, "--save-every", 3, "--keep", 100) == 0
    return folder, time.perf_counter() - started
