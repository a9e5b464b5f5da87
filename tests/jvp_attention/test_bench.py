"""The parts of the benchmark that need no GPU: counting, refusals, tables."""

import sys

import pytest
import torch
from torch.autograd import forward_ad

import jvp_attention
from jvp_attention import bench, reference
from jvp_attention.bench import DIT, TABLE_5, Size

SMALL = Size(1, 2, 12, 8)


def test_the_sizes_are_the_papers_and_dit_xls():
    assert {(s.batch, s.channels) for s in TABLE_5} == {(1, 128)}
    assert [s.length for s in TABLE_5 if s.heads == 24] == [128, 1024, 4096, 8192, 16384, 32768]
    assert [s.heads * s.channels for s in DIT] == [1152] * 4  # DiT-XL's width


def test_one_product_is_counted_as_in_the_design():
    """B 1, H 24, N 8192, D 128: 412 GFLOP; the official table has 2474 for the 6 of the forward."""
    size = Size(1, 24, 8192, 128)
    assert size.flops("forward") / 6 == pytest.approx(412.3e9, rel=1e-3)
    assert size.flops("forward") == pytest.approx(2474e9, rel=1e-3)
    assert size.flops("both") == size.flops("forward") + size.flops("backward") == 27 * size.flops("forward") / 6


@pytest.mark.parametrize("function", [jvp_attention.attention, reference.attention])
def test_a_right_implementation_passes(function):
    assert bench.wrong(function, SMALL, "cpu", torch.float32) == {}


def forward_only(q, k, v):
    """Gradients through the tangent are dropped."""
    o, do = forward_ad.unpack_dual(reference.attention(q, k, v))
    return forward_ad.make_dual(o, do.detach() + 0 * do)


def unscaled(q, k, v):
    return reference.attention(q, k, v, scale=1.0)


def crashes(q, k, v):
    raise ValueError("no such kernel\nmore")


def not_a_number(q, k, v):
    return reference.attention(q, k, v) * torch.nan


@pytest.mark.parametrize(
    ("function", "passes", "message"),
    [
        (forward_only, {"backward"}, "gq off by"),
        (unscaled, {"forward", "backward"}, "o off by"),
        (not_a_number, {"forward", "backward"}, "o off by nan"),
        (crashes, {"forward"}, "ValueError: no such kernel"),
    ],
)
def test_a_wrong_implementation_is_found(function, passes, message):
    problems = bench.wrong(function, SMALL, "cpu", torch.float32)
    assert problems.keys() == passes
    assert message in "; ".join(problems.values())


@pytest.mark.parametrize(("function", "timed"), [(reference.attention, True), (forward_only, False), (unscaled, None)])
def test_what_is_wrong_is_not_timed(monkeypatch, function, timed):
    original, calls = bench.wrong, []
    monkeypatch.setattr(bench, "wrong", lambda f, size, device, dtype: original(f, size, "cpu", dtype))
    monkeypatch.setattr(bench, "measure", lambda *_, backward: calls.append(backward) or {"forward": 1.0})
    result = bench.row("some", SMALL, function, torch.float32)
    assert calls == ([] if timed is None else [timed])
    assert ("wrong" in result) == (timed is not True)


def test_the_table_and_the_speed_ups():
    size = Size(1, 24, 8192, 128)._asdict()
    rows = [
        {"name": "ours", **size, "forward": 5.0, "backward": 20.0, "both": 25.0, "mib": 100.0},
        {"name": "official", **size, "forward": 15.0, "backward": 60.0, "both": 75.0, "mib": 200.0},
        {"name": "other", **size, "forward": 10.0, "wrong": "gdq off by 1.0e+00"},
    ]
    lines = bench.table(rows, rate=1000.0).splitlines()
    assert "49.5%" in lines[1]  # 2474 GFLOP in 5 ms of 1000 TFLOP/s
    assert "43.3%" in lines[1]  # 8659 GFLOP in 20 ms
    assert lines[3].endswith("10.000 ms  24.7% not timed: gdq off by 1.0e+00")
    assert bench.speedups(rows).splitlines() == [
        "forward    3.00 x as fast as official (1 sizes)",
        "backward   3.00 x as fast as official (1 sizes)",
        "both       3.00 x as fast as official (1 sizes)",
        "forward    2.00 x as fast as other (1 sizes)",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "python -m jvp_attention.bench: error: needs a CUDA device\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--official", "nowhere"], "holds no jvp_utils"), (["--out", __file__], "exists already")],
)
def test_bad_options_are_refused(options, message, capsys):
    assert bench.main(options) == 2
    assert message in capsys.readouterr().err


def test_the_official_kernels_are_found_in_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "jvp_utils").mkdir()
    (tmp_path / "jvp_utils" / "functional.py").write_text("def sdpa_jvp(q, k, v):\n    return v\n")
    monkeypatch.setattr("sys.path", [*sys.path])
    assert bench.official_attention(tmp_path)(1, 2, 3) == 3
