"""The package alone: a wheel of kernels/ works where tvm_ref is not, and the snippets of its page run."""

import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import jvp_attention
from jvp_attention import reference
from tests.attention_cases import SelfAttention
from tests.processes import ROOT, python

PROJECT = ROOT / "kernels"
PAGE = ROOT / "tutorials" / "site" / "attention_use.md"
USE = """
import pathlib, sys
import torch, jvp_attention
from jvp_attention import bench
assert pathlib.Path(jvp_attention.__file__).is_relative_to(sys.path[0]), jvp_attention.__file__
try:
    import tvm_ref
    raise SystemExit("tvm_ref is there")
except ModuleNotFoundError:
    pass
x = torch.randn(6, 1, 2, 3, 4)
o, do = torch.func.jvp(jvp_attention.attention, tuple(x[:3]), tuple(x[3:]))
print(jvp_attention.__version__, bench.main([]))
"""


@pytest.mark.slow
def test_a_wheel_works_without_the_rest_of_the_project(tmp_path):
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    assert python(*build, str(PROJECT)).returncode == 0
    (wheel,) = tmp_path.glob(f"jvp_attention-{jvp_attention.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path / "site")
    assert {"jvp_attention/py.typed", "jvp_attention/bench.py", "jvp_attention/README.md"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith("jvp_attention") for name in names)
    # -S leaves out the links to this checkout that an editable installation put among the installed packages
    packages = [str(Path(torch.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), *packages]}\n{USE}"
    run = python("-S", "-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH="", CUDA_VISIBLE_DEVICES="")
    assert run.stdout.split() == [jvp_attention.__version__, "2"], run.stderr  # the benchmark asks for a GPU
    assert "needs a CUDA device" in run.stderr
    assert "torch.jit.script" not in run.stderr


class Net(nn.Module):
    """Self-attention of tokens [B, N, 8] that knows some times [B]."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.times = SelfAttention(attention, 8), nn.Linear(2, 8)

    def forward(self, x, *times):
        return self.attention(x + self.times(torch.stack([times[0], times[-1]], -1))[:, None])


def snippets() -> dict[str, str]:
    """The Python blocks of the page, by the name of the function that each defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    return {re.search(r"def (\w+)", block)[1]: block for block in blocks}


@pytest.mark.parametrize("name", ["meanflow_loss", "scm_loss", "tvm_loss"])
def test_the_page_s_losses_have_the_references_gradients(name):
    scope: dict = {}
    exec(snippets()[name], scope)
    x, z, t = *torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    arguments = {
        "meanflow_loss": (x, z, t / 2, t),
        "scm_loss": (x, z, t),
        "tvm_loss": (x, t, t / 2, lambda y, s: -y),
    }[name]
    results = []
    for attention in (jvp_attention.attention, reference.attention):
        torch.manual_seed(0)
        net = Net(attention).double()
        loss = scope[name](net, *arguments)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    torch.testing.assert_close(*results)
    assert float(results[0][1].norm()) > 1e-3
