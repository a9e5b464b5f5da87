"""The table of layers: its verdicts, and that the page is what the command writes."""

from pathlib import Path

import pytest
import torch

from tvm_ref.experiments.layers import PAGE, TRIED, main, page, verdict, verdicts
from tvm_ref.flow_map import jvp

SITE = Path(__file__).parents[2] / "tutorials" / "site" / "layers_under_jvp.md"


@pytest.mark.parametrize(
    ("expression", "shape", "plain", "ready"),
    [
        ("nn.LayerNorm(8)", (2, 5, 8), "wrong (gradient", "right"),
        ("nn.GLU()", (3, 8), "refused", "right"),
        ("nn.BatchNorm1d(4)", (2, 4, 8), "refused", "refused"),
        ("x.logsumexp(-1)", (4, 4), "right", "right"),
    ],
)
def test_a_verdict(expression, shape, plain, ready):
    assert verdict(expression, shape, torch.func.jvp).startswith(plain)
    assert verdict(expression, shape, jvp) == ready


def test_the_page_lists_what_is_odd_and_what_is_right():
    results = [
        {"torch": "2.14", "found": {"a": ("right", "right"), "b": ("wrong (value, 1)", "right")}},
        {"torch": "2.11", "found": {"a": ("right", "right"), "b": ("refused", "right")}},
    ]
    text = page(results)
    assert "| `b` | wrong (value, 1) | right | refused | right |" in text
    assert "\n`a`.\n" in text


def test_what_is_tried_is_in_the_page():
    text = " ".join(SITE.read_text().split())
    for expression in (e for expressions in TRIED.values() for e in expressions.split(";")):
        assert f"`{' '.join(expression.split())}`" in text
    assert PAGE.split("{count}")[0].split("\n\n")[0] in SITE.read_text()


@pytest.mark.parametrize("does", ["echo trouble >&2; exit 1", "echo no JSON; echo trouble >&2", "exec nothing"])
def test_another_python_without_this_package_is_one_line(does, tmp_path, capfd, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.argv", ["layers", "--also", str(python)])
    with pytest.raises(SystemExit) as stop:
        main()
    *trouble, line = capfd.readouterr().err.splitlines()
    assert (stop.value.code, len(trouble)) == (2, 1)  # the other's own, and ours
    assert f"--also {python} cannot run this: " in line


@pytest.mark.slow
def test_the_page_says_what_is_found():
    """For the PyTorch that is installed, if the page has it; errors in one digit may differ."""
    found, text = verdicts(), SITE.read_text()
    header = next(line for line in text.splitlines() if line.startswith("| x passes")).split(" | ")
    if found["torch"] not in header:
        pytest.skip(f"the page was not made with PyTorch {found['torch']}")
    column = header.index(found["torch"])
    rows = {line.split("`")[1]: line.split(" | ") for line in text.splitlines() if line.startswith("| `")}
    for expression, pair in found["found"].items():
        told = (
            [cell.strip(" |") for cell in rows[expression][column : column + 2]]
            if expression in rows
            else ["right"] * 2
        )
        assert [v.split(",")[0] for v in told] == [v.split(",")[0] for v in pair], expression
