"""Tiles fit every card: the choice of tables, what is refused, what is fallen back to, and compilation for each card.

The whole matrix takes the better part of an hour and runs only when asked for, in parts that may be chosen:

    pytest -m hour tests/jvp_attention/test_tile_sizes.py -k "sm_80 and bfloat16"
"""

import json
import os
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compile_report
from compile_report import SHARED_KIB
from jvp_attention import tile_sizes
from jvp_attention.shapes import Given
from jvp_attention.tile_sizes import Tiles, candidates
from tests.processes import python

TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
DUAL = ["forward_dual", "query_dual", "key_dual", "key_dual_k", "key_dual_v"]
MATMULS = {"forward": 2, "forward_dual": 6, "query": 3, "query_dual": 9, "key": 4, "key_dual": 12}
MATMULS |= {"key_dual_k": 9, "key_dual_v": 6}  # per pair of tiles: backward 7, and 21 in two kernels or 24 in three
SPILLED_AT_64 = {"forward_dual": 216, "query_dual": 24}  # bytes per thread, of 1020: for large tiles; others nothing
STACK = {"bfloat16": 512, "float16": 512, "float32": 2048}  # bytes per thread, with heads of at most 128 channels


def kernels(d: int, itemsize: int, kib: int) -> set[str]:
    """The names of the kernels that heads of d channels need and that fit."""
    channels = tile_sizes.channels_of_tile(d)
    keys = {"key_dual_k", "key_dual_v"} if tile_sizes.splits_keys(channels, itemsize) else {"key_dual"}
    names = {"forward", "query", "key", "forward_dual", "query_dual"} | keys
    return {name for name in names if candidates(name, channels, itemsize, kib)}


def compiled(folder: Path, dims: list[int], *options: str, sm: int = 90, dtype: str = "bfloat16") -> list[dict]:
    """The figures of the default kernels, by a process of its own, where nothing is interpreted: each fits its card."""
    file, cache = str(folder / "report.json"), str(folder / "cache")
    command = ["--arch", str(sm), "--dtype", dtype, "--json", file, "--dims", *map(str, dims), *options]
    run = python(compile_report.__file__, *command, TRITON_CACHE_DIR=cache)
    assert run.returncode == 0, run.stderr
    reports = json.loads(Path(file).read_text())
    assert not [r for r in reports if r["shared_kib"] > SHARED_KIB[sm]]
    assert not [r for r in reports if r["D"] <= 128 and r["stack"] > STACK[dtype]]
    return reports


@pytest.mark.slow
def test_on_hopper(tmp_path):
    """Every kernel is there, takes the matmuls that are documented, on the matrix units, and spills next to nothing.

    Two sums of 128 x 128 fill the registers of 1020 bytes; at most a tenth as much is spilled.
    """
    reports = compiled(tmp_path, [64, 128])
    for d in (64, 128):
        assert {r["kernel"] for r in reports if r["D"] == d} == kernels(d, 2, 227)
    assert {r["kernel"]: r["matmuls"] for r in reports} == MATMULS
    assert all(r["wgmma"] >= r["matmuls"] for r in reports)
    assert all(r["stack"] <= 102 for r in reports if r["D"] == 128)
    if TRITON >= (3, 9):  # tiles are chosen for what it makes of them
        assert not [r for r in reports if r["D"] == 64 and r["stack"] > SPILLED_AT_64.get(r["kernel"], 0)]


@pytest.mark.slow
def test_lengths_take_no_more_products_and_spill_next_to_nothing(tmp_path):
    reports = compiled(tmp_path, [64], "--lengths", "--causal")
    assert all(r["matmuls"] == MATMULS[r["kernel"]] <= r["wgmma"] for r in reports)
    assert not [r for r in reports if r["stack"] > SPILLED_AT_64.get(r["kernel"], 0)]


@pytest.mark.slow
def test_derivatives_fit_a_consumer_card(tmp_path):
    """Once no tile for derivatives with 128 channels fitted there."""
    reports = compiled(tmp_path, [128], "--kernels", *DUAL, sm=89)
    assert {r["kernel"] for r in reports} == kernels(128, 2, SHARED_KIB[89]) & set(DUAL)


@pytest.mark.hour
@pytest.mark.parametrize("dtype", STACK)
@pytest.mark.parametrize("sm", SHARED_KIB, ids=lambda sm: f"sm_{sm}")
@pytest.mark.parametrize("dims", [[16, 32, 64], [72, 96, 128], [192, 256]], ids=["up_to_64", "up_to_128", "up_to_256"])
def test_tiles_fit_every_card(tmp_path, dims, sm, dtype):
    """72 and 96 channels are padded to 128, 192 to 256."""
    reports = compiled(tmp_path, dims, sm=sm, dtype=dtype)
    for d in dims:
        expected = kernels(d, getattr(torch, dtype).itemsize, SHARED_KIB[sm])
        assert {r["kernel"] for r in reports if r["D"] == d} == expected


@pytest.mark.slow
def test_every_specialisation_passes_the_front_end():
    """Every combination of what may be absent; masks and lengths; sizes of 1, which the compiler makes constants."""
    paths = os.pathsep.join([str(Path(compile_report.__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = python("-m", "tests.jvp_attention.front_end", PYTHONPATH=paths)
    assert run.stdout.split() == ["800"], run.stderr[-2000:]


def test_small_cards_have_all_kernels_but_wide_derivatives_in_float32():
    """99 KiB hold everything in 16 bits; in float32 no derivative of heads over 128 channels."""
    for kib in (99, 163, 227):
        for d in (1, 16, 64, 72, 128, 192, 256):
            assert kernels(d, 2, kib) == kernels(d, 2, 10**6)
    assert kernels(128, 4, 99) == kernels(128, 4, 227)
    assert not kernels(256, 4, 99) & {"forward_dual", "query_dual"}
    assert not kernels(64, 2, 64)  # sm_75


def test_the_smaller_tiles_come_last():
    """After what is chosen for the largest cards there is what fits the smallest."""
    several = candidates("query_dual", 128, 2, 227)
    assert several[0] == Tiles(128, 32, 8, 2)
    assert several[-1] == candidates("query_dual", 128, 2, 99)[0]


@pytest.mark.parametrize("name", ["forward_dual", "query_dual", "key_dual"])
def test_short_sequences_leave_room_for_a_second_block(name):
    """4 warps of at most 255 registers are half of a multiprocessor's."""
    assert candidates(name, 64, 2, 227, True)[0].warps == 4


@pytest.mark.parametrize(
    ("capability", "kib", "hip", "d", "dtype", "dual", "reason"),
    [
        ((9, 0), 227, None, 256, torch.float32, True, ""),
        ((8, 9), 99, None, 256, torch.bfloat16, True, ""),
        ((8, 9), 99, None, 129, torch.float32, True, "derivatives of heads of 129 channels in 32 bits do not fit the"),
        ((8, 0), 163, None, 128, torch.float32, True, ""),
        ((7, 5), 64, None, 64, torch.float16, False, "the kernels need compute capability 8.0, this GPU has 7.5"),
        ((9, 4), 64, "6.2", 64, torch.float16, False, "the kernels are for NVIDIA GPUs"),
    ],
)
def test_what_no_tile_fits_is_said(launch, monkeypatch, capability, kib, hip, d, dtype, dual, reason):
    properties = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(launch, "shared_kib", launch.shared_kib.__wrapped__)
    found = launch._why_not.__wrapped__(torch.device("cuda", 0), dtype.itemsize, d, dual)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_what_does_not_fit_after_all_is_replaced(launch, device, monkeypatch):
    """A card, or a mask, that needs more than was thought: the next candidate is taken, and remembered."""
    from triton.runtime.errors import OutOfResources

    q = torch.randn(1, 1, 20, 16, device=device)
    given = Given(q, q, q, None, None, None, None, None, 0.25, False)
    tried, original = [], launch.Call.launch

    def too_large(self, tiles):
        tried.append(tiles)
        if tiles.queries > 16:
            raise OutOfResources(2, 1, "shared memory")
        original(self, tiles)

    monkeypatch.setattr(launch, "candidates", lambda *_: [Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1)])
    monkeypatch.setattr(launch.Call, "launch", too_large)
    monkeypatch.setattr(launch, "_too_large", set())
    for _ in range(2):
        o, *_ = launch.run(launch.forward_calls(given))
    assert [tiles.queries for tiles in tried] == [32, 16, 16]
    torch.testing.assert_close(o, torch.nn.functional.scaled_dot_product_attention(q, q, q), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(launch, "candidates", lambda *_: [Tiles(32, 16, 4, 1)])
    monkeypatch.setattr(launch, "_too_large", set())
    with pytest.raises(OutOfResources):
        launch.run(launch.forward_calls(given))
