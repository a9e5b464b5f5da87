"""The kernels compile for a Hopper GPU that is not there, onto its matrix units, and fit."""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest

import compile_report
from tests.processes import python

pytestmark = pytest.mark.slow  # some kernels compile for half a minute
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
MATMULS = {"forward": 2, "forward_dual": 6, "query": 3, "query_dual": 9, "key": 4, "key_dual": 12}
MATMULS |= {"key_dual_k": 9, "key_dual_v": 6}  # as the README counts them
SPILLED_AT_64 = {"forward_dual": 216, "query_dual": 24}  # bytes per thread, of 1020: for large tiles; others nothing
LARGEST_SHARED = 227  # KiB per block, sm_90


def compiled(file: Path, *options: str) -> list[dict]:
    """The figures of the default kernels in bfloat16, by a process of its own, where nothing is interpreted."""
    run = python(
        *(compile_report.__file__, "--json", str(file), *options),
        limit=1800,
        TRITON_CACHE_DIR=str(file.parent / "cache"),
    )
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """For heads of 64 and 128 channels."""
    return compiled(tmp_path_factory.mktemp("compiled") / "report.json", "--clocks")


@pytest.mark.slow
def test_every_specialisation_passes_the_front_end():
    """What may be absent, in every combination; masks and lengths; sizes of 1, which the compiler makes constants."""
    paths = [str(Path(compile_report.__file__).parent), os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(filter(None, paths))
    run = python("-m", "tests.jvp_attention.front_end", limit=1800, PYTHONPATH=paths)
    assert run.stdout.split() == ["800"], run.stderr[-2000:]


@pytest.mark.slow
def test_lengths_take_no_more_products_and_spill_next_to_nothing(tmp_path):
    reports = compiled(tmp_path / "report.json", "--lengths", "--causal", "--dims", "64")
    assert {r["kernel"]: r["matmuls"] for r in reports} == {r["kernel"]: MATMULS[r["kernel"]] for r in reports}
    assert all(r["wgmma"] >= r["matmuls"] and r["shared_kib"] <= LARGEST_SHARED for r in reports)
    assert not any(r["stack"] > SPILLED_AT_64.get(r["kernel"], 0) for r in reports)


@pytest.mark.slow
def test_every_kernel_is_there(reports):
    names = [{r["kernel"] for r in reports if r["D"] == d} for d in (64, 128)]
    assert names[0] == MATMULS.keys() - {"key_dual_k", "key_dual_v"}
    assert names[1] == MATMULS.keys() - {"key_dual"}


def test_matmuls_per_pair_of_tiles_are_as_documented(reports):
    """Forward 2 and 6; backward 7, and 21 in two kernels or 24 in three."""
    assert {r["kernel"]: r["matmuls"] for r in reports} == MATMULS
    assert MATMULS["query_dual"] + MATMULS["key_dual"] == 21
    assert MATMULS["query_dual"] + MATMULS["key_dual_k"] + MATMULS["key_dual_v"] == 24


def test_hoppers_matrix_units_are_used(reports):
    assert all(r["wgmma"] >= r["matmuls"] for r in reports)


@pytest.mark.skipif(TRITON < (3, 9), reason="tiles are chosen for what triton 3.9 makes of them")
def test_next_to_nothing_is_spilled_with_64_channels(reports):
    spilled = {r["kernel"]: r["stack"] for r in reports if r["D"] == 64}
    assert not {name: stack for name, stack in spilled.items() if stack > SPILLED_AT_64.get(name, 0)}


@pytest.mark.parametrize(
    ("d", "forward", "backward"),
    [(64, 5150, 19_500), (128, 9500, 45_000)],
)
def test_counted_clocks_without_overlap(reports, d, forward, backward):
    """Per 128 queries and 128 keys, of one multiprocessor."""
    clocks = {r["kernel"]: r["sum"] for r in reports if r["D"] == d and "sum" in r}
    assert clocks["forward_dual"] <= forward
    assert sum(x for name, x in clocks.items() if "_dual" in name and name != "forward_dual") <= backward


def test_hardly_anything_is_spilled_with_128_channels(reports):
    """Two sums of 128 x 128 fill the registers of 1020 bytes; at most a tenth as much is spilled."""
    assert all(r["stack"] <= 102 for r in reports if r["D"] == 128)


def test_shared_memory_suffices(reports):
    assert all(r["shared_kib"] <= LARGEST_SHARED for r in reports)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dims", "300"], "between 1 and 256"),
        (["--dtype", "int8"], "invalid choice"),
        (["--json", "nowhere/report.json"], "does not exist"),
        (["--json", __file__], "exists already"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options, message, capsys):
    try:
        status = compile_report.main(options)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_report.main([]) == 2
    assert "unset it" in capsys.readouterr().err
