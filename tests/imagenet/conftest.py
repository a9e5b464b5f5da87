"""A run that nothing disturbs, and processes that start in a moment."""

import multiprocessing
import os
import time

import pytest
import workers
from commands import command
from test_parallel import ROOT


@pytest.fixture(scope="session")
def forks():
    """Processes that start in a moment, as a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "imagenet", "tests/imagenet"))
    context.set_forkserver_preload(["train", "workers"])
    process = context.Process(target=workers.quiet, args=(["--help"],))
    process.start()
    process.join()
    yield context
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of 120 steps that nothing disturbed, with every third step's checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.perf_counter()
    assert command(folder, "--steps", 120, "--save-every", 3, "--keep", 100) == 0
    return folder, time.perf_counter() - begun
