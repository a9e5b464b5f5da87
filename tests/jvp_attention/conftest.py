"""The kernels run on the GPU if there is one, else on the CPU in Triton's interpreter.

The interpreter is chosen by an environment variable when the kernels are imported, so it is set for the tests of this
folder alone, and nothing here imports jvp_attention before; nor before --check-shapes has been read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.attention_cases import GuardedOutputs

pytest.importorskip("triton", reason="the kernels need triton")
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU and item.path.parent == Path(__file__).parent and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


def prepare_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter prepare Triton's language once per launch, not again for each function that a kernel calls.

    That was two fifths of its time.
    """
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("jvp_attention."):
            return self.rewrite()(*args, **kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run."""
    if ON_GPU:
        return "cuda"
    from tests.attention_cases import interpreter_works

    if not interpreter_works():
        pytest.skip("the interpreter of this triton needs numpy < 2.4")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    prepare_once(monkeypatch)
    return "cpu"


@pytest.fixture
def launches(device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched, as they are."""
    from jvp_attention import launch

    names: list[str] = []
    original = launch.Call.launch

    def record(self, tiles):
        names.append(self.name)
        original(self, tiles)

    monkeypatch.setattr(launch.Call, "launch", record)
    return names


@pytest.fixture
def guarded(device: str, monkeypatch: pytest.MonkeyPatch) -> "Iterator[GuardedOutputs]":
    """Results lie between guards, which are checked at the end."""
    from jvp_attention import launch
    from tests.attention_cases import GuardedOutputs

    guards = GuardedOutputs()
    monkeypatch.setattr(launch, "empty_rows", guards.rows)
    monkeypatch.setattr(launch, "empty_numbers", guards.numbers)
    monkeypatch.setattr(launch, "empty_residual", lambda x: guards.rows(x) if x.dtype.itemsize < 4 else torch.empty(0))
    yield guards
    guards.check()


@pytest.fixture
def small_tiles(device: str, monkeypatch: pytest.MonkeyPatch):
    """Call with the tiles that every kernel shall have, and whether the keys' side takes two launches."""
    from jvp_attention import launch
    from jvp_attention.tile_sizes import Tiles

    def choose(queries: int, keys: int, *, split: bool = False) -> None:
        monkeypatch.setattr(launch, "candidates", lambda *_: [Tiles(queries, keys, 4, 1)])
        monkeypatch.setattr(launch, "splits_keys", lambda *_: split)

    return choose
