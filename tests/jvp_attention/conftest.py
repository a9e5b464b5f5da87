"""The kernels run on the GPU if there is one, else on the CPU in Triton's interpreter.

The interpreter is chosen by an environment variable when the kernels are imported, so it is set for the tests of this
folder alone, and nothing here imports jvp_attention before; nor before --check-shapes has been read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
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
    """The device on which the kernels run."""
    if ON_GPU:
        return "cuda"
    from tests.attention_cases import interpreter_works

    if not interpreter_works():
        pytest.skip("the interpreter of this triton needs numpy < 2.4")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    prepare_once(monkeypatch)
    return "cpu"


@pytest.fixture
def launch(device: str) -> ModuleType:
    """The module that launches kernels, imported where the interpreter has been chosen."""
    from jvp_attention import launch

    return launch


@pytest.fixture
def launches(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched, as they are."""
    names: list[str] = []
    original = launch.Call.launch

    def record(self, tiles):
        names.append(self.name)
        original(self, tiles)

    monkeypatch.setattr(launch.Call, "launch", record)
    return names


@pytest.fixture
def guarded(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> "Iterator[GuardedOutputs]":
    """Results lie between guards, which are checked at the end."""
    from jvp_attention import layout
    from tests.attention_cases import GuardedOutputs

    guards = GuardedOutputs()
    for module in (launch, layout):
        monkeypatch.setattr(module, "empty_rows", guards.rows)
        monkeypatch.setattr(module, "empty_numbers", guards.numbers)
    yield guards
    guards.check()


@pytest.fixture
def small_tiles(launch: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Call with the tiles that every kernel shall have, and whether the keys' side takes two launches."""
    from jvp_attention.tile_sizes import Tiles

    def choose(queries: int, keys: int, *, split: bool = False) -> None:
        monkeypatch.setattr(launch, "candidates", lambda *_: [Tiles(queries, keys, 4, 1)])
        monkeypatch.setattr(launch, "splits_keys", lambda *_: split)

    return choose


@pytest.fixture
def emulated(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter with bfloat16, which by itself computes with the bits of such numbers as if they were integers.

    Numbers are rounded to the nearest, ties to even, and multiplied exactly and summed in float32, as matrix units do.
    This is no GPU: the order of sums is numpy's.
    """
    if device != "cpu":
        pytest.skip("a GPU has bfloat16")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from tests.attention_cases import from_bfloat16, to_bfloat16

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bfloat16(src.data), tl.float32)
        assert tl.bfloat16 not in kinds
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(from_bfloat16(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *options)

    def get_bf16(self, value):
        return TensorHandle(to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)

    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "get_bf16", get_bf16, raising=False)
    monkeypatch.setattr("jvp_attention.operators.why_not", lambda given: "")
    return device


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def half(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    """A dtype of 16 bits, emulated where need be."""
    if request.param == torch.bfloat16 and device == "cpu":
        request.getfixturevalue("emulated")
    return request.param
